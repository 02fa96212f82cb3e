"""The trainer's arguments: one frozen object, validated in one place."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from numbers import Integral, Real
from typing import Any, Union

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info

Limit = Union[int, float]

BAREBONES_CONFLICTS = (
    "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "num_sanity_val_steps",
    "fast_dev_run", "detect_anomaly", "profiler",
)  # fmt: skip

# Arguments that are on or off, and whether None leaves the choice to the trainer.
SWITCHES = {
    "enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True, "benchmark": True,
    "inference_mode": False, "use_distributed_sampler": False, "detect_anomaly": False, "barebones": False,
    "sync_batchnorm": False, "enable_autolog_hparams": False, "async_checkpointing": False,
    "overlap_transfer": True, "auto_resume": False,
}  # fmt: skip


@dataclass(frozen=True)
class TrainerConfig:
    """The arguments of :class:`Trainer` that bound, time or shape its loops, with defaults filled in.

    ``max_epochs`` and ``max_steps`` are -1 where there is no bound; ``max_epochs`` is None until fit decides. Limits are a
    number of batches, or a fraction as float.
    """

    fast_dev_run: int
    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: Any
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit
    limit_predict_batches: Limit
    overfit_batches: Limit
    val_check_interval: Limit
    val_check_seconds: float | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: float
    log_every_n_steps: int
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    deterministic: bool | str | None
    benchmark: bool | None
    inference_mode: bool
    detect_anomaly: bool
    barebones: bool
    reload_dataloaders_every_n_epochs: int
    default_root_dir: str
    use_distributed_sampler: bool
    async_checkpointing: bool
    overlap_transfer: bool | None
    auto_resume: bool
    on_save_error: str
    uneven_inputs: str
    on_nonfinite: str | None
    on_out_of_memory: str
    compile: dict[str, Any] | None
    gc_interval: int | None

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """Keywords of ``torch.compile``; None where it is not asked for."""
        given = self.compile
        return None if given is None or given == {"step": True} else {name: value for name, value in given.items() if name != "step"}


def refuse_barebones_conflicts(given: dict[str, Any]) -> None:
    """With ``barebones=True`` refuse what was asked for and would slow the loop down.

    Raises:
        ValueError: naming the argument.
    """
    for name in BAREBONES_CONFLICTS:
        value = given[name]
        if value:
            raise ValueError(
                f"`Trainer(barebones=True, {name}={value!r})`: a barebones trainer has none of that. "
                f"Leave out `{name}`, or leave out `barebones`."
            )


def build_config(given: dict[str, Any]) -> TrainerConfig:
    """Validate the arguments and fill in defaults.

    Args:
        given: the arguments of ``Trainer.__init__`` by name.

    Raises:
        MisconfigurationException: for a value, or a combination, that is not accepted; its message names the argument.
        TypeError: for a value of the wrong type, where Lightning says so.
        ValueError: for a conflict with ``barebones=True``.
    """
    switches: dict[str, Any] = {name: _flag(name, given[name], none) for name, none in SWITCHES.items()}
    registry = given["model_registry"]
    if registry is not None and not isinstance(registry, str):
        raise MisconfigurationException(f"model_registry={registry!r}: accepted is the name of a model as a string, or None.")
    if given["barebones"]:
        refuse_barebones_conflicts(given)
        given = {**given, "num_sanity_val_steps": 0, "log_every_n_steps": 0}
    seconds = _seconds(given["val_check_interval"])
    if seconds is not None:
        given = {**given, "val_check_interval": 1.0}
    config = TrainerConfig(
        **{name: check(name, given[name]) for name, check in CHECKS.items()},
        val_check_seconds=seconds,
        max_time=given["max_time"],  # the Timer that is made of it checks it
        **{name: value for name, value in switches.items() if name in TrainerConfig.__dataclass_fields__},
    )
    _check_together(config)
    return _with_overfit(_with_fast_dev_run(config))


def changed(config: TrainerConfig, name: str, value: Any) -> TrainerConfig:
    """The configuration with another value of one argument, checked like the first.

    Raises:
        MisconfigurationException: if it is not accepted, alone or with the others.
    """
    if name == "val_check_interval":
        seconds = _seconds(value)
        config = replace(config, val_check_seconds=seconds)
        value = 1.0 if seconds is not None else value
    config = replace(config, **{name: CHECKS[name](name, value)})
    _check_together(config)
    return config


def _check_together(config: TrainerConfig) -> None:
    if config.check_val_every_n_epoch is None and config.val_check_seconds is None and isinstance(config.val_check_interval, float):
        raise MisconfigurationException(
            f"val_check_interval={config.val_check_interval!r} with check_val_every_n_epoch=None: batches are then counted across epochs, "
            "so give the interval as a whole number of batches, or as a duration."
        )


def _with_fast_dev_run(config: TrainerConfig) -> TrainerConfig:
    """A trial run of n batches: everything runs, nothing is kept."""
    n = config.fast_dev_run
    if not n:
        return config
    rank_zero_info(f"fast_dev_run: runs {n} batch(es) of train, val, test and predict, one epoch, without logger and checkpoints.")
    return replace(
        config,
        max_steps=n, max_epochs=1, num_sanity_val_steps=0, val_check_interval=1.0, val_check_seconds=None, check_val_every_n_epoch=1,
        limit_train_batches=n, limit_val_batches=n, limit_test_batches=n, limit_predict_batches=n,
    )  # fmt: skip


def _with_overfit(config: TrainerConfig) -> TrainerConfig:
    if config.overfit_batches == 0 or config.fast_dev_run:
        return config
    return replace(config, limit_train_batches=config.overfit_batches, limit_val_batches=config.overfit_batches)


def _number(value: Any) -> int | float | None:
    """A number of Python's, of whatever type it comes (numpy has its own); None if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _count(name: str, value: Any, lowest: int, none: bool = False, default: int | None = None) -> int | None:
    if value is None and (none or default is not None):
        return default
    number = _number(value)
    if number is None or number < lowest or number % 1 != 0:
        accepted = f"a whole number, {lowest} or more" + (" (-1: no bound)" if lowest == -1 else "") + (", or None" if none else "")
        raise MisconfigurationException(f"{name}={value!r}: accepted is {accepted}.")
    return int(number)


def _fast_dev_run(name: str, value: Any) -> int:
    number = int(value or False) if isinstance(value, bool) or value is None else _number(value)
    if not isinstance(number, int) or number < 0:
        raise MisconfigurationException(f"{name}={value!r}: accepted are True, False, or the number of batches to run (0 or more).")
    return number


def _flag(name: str, value: Any, none: bool = False) -> bool | None:
    if value is None and none:
        return None
    if isinstance(value, str) or value not in (True, False):
        raise MisconfigurationException(f"{name}={value!r}: accepted are True and False{', or None' if none else ''}.")
    return bool(value)


def _limit(name: str, value: Any, default: float = 1.0) -> Limit:
    if value is None:
        return default
    number = _number(value)
    if number is None or not 0 <= number <= (1 if isinstance(number, float) else number):
        raise MisconfigurationException(
            f"{name}={value!r}: accepted are a number of batches (a whole number, 0 or more) "
            "or a fraction of them (a float from 0.0 to 1.0)."
        )
    if number == 1 and isinstance(number, int):
        rank_zero_info(f"{name}=1 runs 1 batch; for all batches give 1.0.")
    return number


def _val_check_interval(name: str, value: Any) -> Limit:
    number = 1.0 if value is None else _number(value)
    if number is None or not 0 < number <= (1 if isinstance(number, float) else number):
        raise MisconfigurationException(
            f"{name}={value!r}: accepted are a number of batches (1 or more), a fraction of the epoch "
            "(a float above 0.0 and up to 1.0), or a duration ('DD:HH:MM:SS', a timedelta, or a dict of its arguments)."
        )
    return number


def _seconds(value: Any) -> float | None:
    """The seconds of a validation interval given as a duration; None if it is no duration."""
    if isinstance(value, timedelta):
        return _positive(value)
    if isinstance(value, dict):
        try:
            return _positive(timedelta(**value))
        except TypeError:
            raise MisconfigurationException(
                f"val_check_interval={value!r}: a dict must hold arguments of timedelta, such as hours=2."
            ) from None
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+):(\d\d?):(\d\d?):(\d\d?)", value.strip())
        if match is None:
            raise MisconfigurationException(f"val_check_interval={value!r}: a string must have the form 'DD:HH:MM:SS'.")
        days, hours, minutes, seconds = map(int, match.groups())
        return _positive(timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds))
    return None


def _positive(duration: timedelta) -> float:
    if duration <= timedelta(0):
        raise MisconfigurationException(f"val_check_interval={duration!r}: a duration must be longer than zero.")
    return duration.total_seconds()


def _sanity_steps(name: str, value: Any) -> float:
    number = 2 if value is None else _number(value)
    if number == float("inf") or number == -1:
        return float("inf")
    if not isinstance(number, int) or number < -1:
        raise MisconfigurationException(f"{name}={value!r}: accepted is a number of batches, 0 for none, -1 for all.")
    return number


def _clip_value(name: str, value: Any) -> Limit | None:
    number = _number(value)
    if value is not None and (number is None or number != number):
        raise TypeError(f"{name}={value!r}: accepted are a number, or None for no clipping.")
    return number


def _clip_algorithm(name: str, value: Any) -> str | None:
    if value is not None and str(value).lower() not in ("norm", "value"):
        raise MisconfigurationException(f"{name}={value!r}: accepted are 'norm', 'value', or None for 'norm'.")
    return None if value is None else str(value).lower()


def _deterministic(name: str, value: Any) -> bool | str | None:
    if value not in (None, True, False, "warn"):
        raise MisconfigurationException(f"{name}={value!r}: accepted are True, False, 'warn', or None.")
    return value if value in (None, "warn") else bool(value)


def _on_save_error(name: str, value: Any) -> str:
    if value not in ("raise", "retry"):
        raise MisconfigurationException(f"{name}={value!r}: accepted are 'raise' and 'retry'.")
    return str(value)


def _uneven(name: str, value: Any) -> str:
    if value not in ("error", "shortest", "join"):
        raise MisconfigurationException(f"{name}={value!r}: accepted are 'error', 'shortest' and 'join'.")
    return str(value)


def _on_nonfinite(name: str, value: Any) -> str | None:
    if value not in (None, "error", "warn", "skip"):
        raise MisconfigurationException(f"{name}={value!r}: accepted are 'error', 'warn', 'skip', or None for no check.")
    return None if value is None else str(value)


def _on_out_of_memory(name: str, value: Any) -> str:
    if value not in ("raise", "split_batch"):
        raise MisconfigurationException(f"{name}={value!r}: accepted are 'raise' and 'split_batch'.")
    return str(value)


COMPILE_NAMES = {"default": {}, "step": {"step": True}}
COMPILE_OPTIONS = ("step", "fullgraph", "dynamic", "backend", "mode", "options")


def _compile(name: str, value: Any) -> dict[str, Any] | None:
    """``step``, and keywords of ``torch.compile``; None for neither."""
    if value is None or value is False:
        return None
    if isinstance(value, str) and value in COMPILE_NAMES:
        return dict(COMPILE_NAMES[value])
    if isinstance(value, dict) and set(value) <= set(COMPILE_OPTIONS) and isinstance(value.get("step", False), bool):
        return dict(value)
    raise MisconfigurationException(
        f"{name}={value!r}: accepted are 'default' (torch.compile), 'step' (the whole step as a CUDA graph), a dict of keywords of "
        f"torch.compile and `step` ({', '.join(COMPILE_OPTIONS)}), or None."
    )


def _root_dir(name: str, value: Any) -> str:
    if value is None:
        return os.getcwd()
    try:
        path = str(os.fspath(value))
    except TypeError:
        raise TypeError(f"{name}={value!r}: accepted is a path or a URL.") from None
    return path if "://" in path else os.path.normpath(os.path.expanduser(path))


# How each argument is checked: a function of its name and value, which returns the value in its final form.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "fast_dev_run": _fast_dev_run,
    "max_epochs": partial(_count, lowest=-1, none=True),
    "min_epochs": partial(_count, lowest=0, none=True),
    "max_steps": partial(_count, lowest=-1),
    "min_steps": partial(_count, lowest=0, none=True),
    "limit_train_batches": _limit,
    "limit_val_batches": _limit,
    "limit_test_batches": _limit,
    "limit_predict_batches": _limit,
    "overfit_batches": partial(_limit, default=0.0),
    "val_check_interval": _val_check_interval,
    "check_val_every_n_epoch": partial(_count, lowest=1, none=True),
    "num_sanity_val_steps": _sanity_steps,
    "log_every_n_steps": partial(_count, lowest=0, default=50),
    "accumulate_grad_batches": partial(_count, lowest=1),
    "gradient_clip_val": _clip_value,
    "gradient_clip_algorithm": _clip_algorithm,
    "deterministic": _deterministic,
    "reload_dataloaders_every_n_epochs": partial(_count, lowest=0),
    "default_root_dir": _root_dir,
    "uneven_inputs": _uneven,
    "on_save_error": _on_save_error,
    "compile": _compile,
    "gc_interval": partial(_count, lowest=1, none=True),
    "on_nonfinite": _on_nonfinite,
    "on_out_of_memory": _on_out_of_memory,
}


def as_list(name: str, value: Any) -> list[Any]:
    """None, one object, or a sequence of them, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
