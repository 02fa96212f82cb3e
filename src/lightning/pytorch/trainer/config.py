"""The trainer's arguments: one frozen object, validated in one place."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Union

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info

Limit = Union[int, float]

BAREBONES_CONFLICTS = {
    "logger": None,
    "enable_checkpointing": None,
    "enable_progress_bar": None,
    "enable_model_summary": None,
    "log_every_n_steps": None,
    "num_sanity_val_steps": None,
    "fast_dev_run": False,
    "detect_anomaly": False,
    "profiler": None,
}


@dataclass(frozen=True)
class TrainerConfig:
    """The arguments of :class:`Trainer` that bound, time or shape its loops, with defaults filled in.

    ``max_epochs`` and ``max_steps`` are -1 where there is no bound; ``max_epochs`` is None until fit decides. Limits are a number of batches, or a fraction as float.
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


def refuse_barebones_conflicts(given: dict[str, Any]) -> None:
    """With ``barebones=True`` refuse what was asked for and would slow the loop down.

    Raises:
        ValueError: naming the argument.
    """
    for name, default in BAREBONES_CONFLICTS.items():
        value = given[name]
        if value is not default and value is not False and value != 0:
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
        ValueError: for a conflict with ``barebones=True``.
    """
    barebones = given["barebones"]
    if barebones:
        refuse_barebones_conflicts(given)
    fast = given["fast_dev_run"]
    if isinstance(fast, float) or (not isinstance(fast, bool) and (not isinstance(fast, int) or fast < 0)):
        raise MisconfigurationException(f"fast_dev_run={fast!r}: accepted are True, False, or the number of batches to run (0 or more).")
    registry = given["model_registry"]
    if registry is not None and not isinstance(registry, str):
        raise MisconfigurationException(f"model_registry={registry!r}: accepted is the name of a model as a string, or None.")
    seconds = _seconds(given["val_check_interval"])
    config = TrainerConfig(
        fast_dev_run=int(fast),
        max_epochs=_count("max_epochs", given["max_epochs"], lowest=-1, none=True),
        min_epochs=_count("min_epochs", given["min_epochs"], lowest=0, none=True),
        max_steps=_count("max_steps", given["max_steps"], lowest=-1),  # type: ignore[arg-type]
        min_steps=_count("min_steps", given["min_steps"], lowest=0, none=True),
        max_time=given["max_time"],
        limit_train_batches=_limit("limit_train_batches", given["limit_train_batches"]),
        limit_val_batches=_limit("limit_val_batches", given["limit_val_batches"]),
        limit_test_batches=_limit("limit_test_batches", given["limit_test_batches"]),
        limit_predict_batches=_limit("limit_predict_batches", given["limit_predict_batches"]),
        overfit_batches=_limit("overfit_batches", given["overfit_batches"]),
        val_check_interval=1.0 if seconds is not None else _val_check_interval(given["val_check_interval"]),
        val_check_seconds=seconds,
        check_val_every_n_epoch=_count("check_val_every_n_epoch", given["check_val_every_n_epoch"], lowest=1, none=True),
        num_sanity_val_steps=0 if barebones else _sanity_steps(given["num_sanity_val_steps"]),
        log_every_n_steps=0 if barebones else _count("log_every_n_steps", _default(given["log_every_n_steps"], 50), lowest=0),  # type: ignore[arg-type]
        accumulate_grad_batches=_count("accumulate_grad_batches", given["accumulate_grad_batches"], lowest=1),  # type: ignore[arg-type]
        gradient_clip_val=_clip_value(given["gradient_clip_val"]),
        gradient_clip_algorithm=_clip_algorithm(given["gradient_clip_algorithm"]),
        deterministic=_deterministic(given["deterministic"]),
        benchmark=given["benchmark"],
        inference_mode=_flag("inference_mode", given["inference_mode"]),
        detect_anomaly=_flag("detect_anomaly", given["detect_anomaly"]),
        barebones=barebones,
        reload_dataloaders_every_n_epochs=_count("reload_dataloaders_every_n_epochs", given["reload_dataloaders_every_n_epochs"], lowest=0),  # type: ignore[arg-type]
        default_root_dir=_root_dir(given["default_root_dir"]),
        use_distributed_sampler=given["use_distributed_sampler"],
    )
    _check_together(config, given["val_check_interval"])
    return _with_overfit(_with_fast_dev_run(config))


def _check_together(config: TrainerConfig, val_check_interval: Any) -> None:
    if config.check_val_every_n_epoch is None and config.val_check_seconds is None and isinstance(config.val_check_interval, float):
        raise MisconfigurationException(
            f"val_check_interval={val_check_interval!r} with check_val_every_n_epoch=None: batches are then counted across epochs, "
            "so give the interval as a whole number of batches, or as a duration."
        )


def _with_fast_dev_run(config: TrainerConfig) -> TrainerConfig:
    """A trial run of n batches: everything runs, nothing is kept."""
    n = config.fast_dev_run
    if not n:
        return config
    rank_zero_info(f"fast_dev_run: runs {n} batch(es) of train, val, test and predict, one epoch, without logger and checkpoints.")
    return replace(
        config, max_steps=n, max_epochs=1, num_sanity_val_steps=0, val_check_interval=1.0, val_check_seconds=None, check_val_every_n_epoch=1,
        limit_train_batches=n, limit_val_batches=n, limit_test_batches=n, limit_predict_batches=n,
    )  # fmt: skip


def _with_overfit(config: TrainerConfig) -> TrainerConfig:
    if config.overfit_batches == 0 or config.fast_dev_run:
        return config
    return replace(config, limit_train_batches=config.overfit_batches, limit_val_batches=config.overfit_batches)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _count(name: str, value: Any, lowest: int, none: bool = False) -> int | None:
    if value is None and none:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        accepted = f"a whole number, {lowest} or more" + (" (-1: no bound)" if lowest == -1 else "") + (", or None" if none else "")
        raise MisconfigurationException(f"{name}={value!r}: accepted is {accepted}.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MisconfigurationException(f"{name}={value!r}: accepted are True and False.")
    return value


def _limit(name: str, value: Any) -> Limit:
    if value is None:
        return 1.0
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or value < 0 or (isinstance(value, float) and value > 1):
        raise MisconfigurationException(
            f"{name}={value!r}: accepted are a number of batches (a whole number, 0 or more) or a fraction of them (a float from 0.0 to 1.0)."
        )
    if value == 1 and isinstance(value, int):
        rank_zero_info(f"{name}=1 runs 1 batch; for all batches give 1.0.")
    return value  # type: ignore[no-any-return]


def _val_check_interval(value: Any) -> Limit:
    value = 1.0 if value is None else value
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or value <= 0 or (isinstance(value, float) and value > 1):
        raise MisconfigurationException(
            f"val_check_interval={value!r}: accepted are a number of batches (1 or more), a fraction of the epoch "
            "(a float above 0.0 and up to 1.0), or a duration ('DD:HH:MM:SS', a timedelta, or a dict of its arguments)."
        )
    return value  # type: ignore[no-any-return]


def _seconds(value: Any) -> float | None:
    """The seconds of a validation interval given as a duration; None if it is no duration."""
    if isinstance(value, timedelta):
        return _positive(value)
    if isinstance(value, dict):
        try:
            return _positive(timedelta(**value))
        except TypeError:
            raise MisconfigurationException(f"val_check_interval={value!r}: a dict must hold arguments of timedelta, such as hours=2.") from None
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


def _sanity_steps(value: Any) -> float:
    value = 2 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise MisconfigurationException(f"num_sanity_val_steps={value!r}: accepted is a number of batches, 0 for none, -1 for all.")
    return float("inf") if value == -1 else value


def _clip_value(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"gradient_clip_val={value!r}: accepted are a number, or None for no clipping.")
    return value  # type: ignore[no-any-return]


def _clip_algorithm(value: Any) -> str | None:
    if value is not None and str(value).lower() not in ("norm", "value"):
        raise MisconfigurationException(f"gradient_clip_algorithm={value!r}: accepted are 'norm', 'value', or None for 'norm'.")
    return None if value is None else str(value).lower()


def _deterministic(value: Any) -> bool | str | None:
    if value not in (None, True, False, "warn"):
        raise MisconfigurationException(f"deterministic={value!r}: accepted are True, False, 'warn', or None.")
    return value  # type: ignore[no-any-return]


def _root_dir(value: Any) -> str:
    if value is None:
        return os.getcwd()
    try:
        return os.fspath(value)
    except TypeError:
        raise TypeError(f"default_root_dir={value!r}: accepted is a path or a URL.") from None


def as_list(name: str, value: Any) -> list[Any]:
    """None, one object, or a sequence of them, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
