"""One logged key: the rules of where and how it may be logged, its step value, and its reduction over the epoch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Complex, Number, Real
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException

DATALOADER_SUFFIX = "/dataloader_idx_"

BATCH_TRAIN = dict.fromkeys(
    ("training_step", "on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward",
     "on_before_optimizer_step", "on_before_zero_grad", "backward", "optimizer_step", "optimizer_zero_grad",
     "configure_gradient_clipping"),
    (True, False),
)  # fmt: skip
BATCH_EVAL = dict.fromkeys(
    ("validation_step", "on_validation_batch_start", "on_validation_batch_end", "test_step", "on_test_batch_start", "on_test_batch_end"),
    (False, True),
)
# The hooks that may log, with the defaults of (on_step, on_epoch). Batch hooks take any of both, the others epoch only.
BATCH_DEFAULTS = BATCH_TRAIN | BATCH_EVAL
EPOCH_ONLY = (
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end",
    "on_test_start", "on_test_epoch_start", "on_test_epoch_end",
)  # fmt: skip

REDUCTIONS: dict[Any, str] = {
    "mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max",
    torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", min: "min", max: "max", sum: "sum",
}  # fmt: skip


WIDE = (torch.float32, torch.float64)
NUMBERS = (float, int, bool)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are published: never less than single precision, which an epoch's mean deserves."""
    if dtype in WIDE:
        return dtype
    default = torch.get_default_dtype()
    return default if default in WIDE else torch.float32


def is_metric(value: Any) -> bool:
    """Whether ``value`` is a torchmetrics Metric; never imports torchmetrics."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


@dataclass(frozen=True)
class Options:
    """The settings of one key, as :meth:`LightningModule.log` got them, with the defaults of its hook filled in."""

    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduction: str
    enable_graph: bool
    sync_dist: bool
    sync_dist_group: Any
    add_dataloader_idx: bool
    metric_attribute: str | None
    rank_zero_only: bool


def check_value(name: str, value: Any) -> None:
    """Refuse what cannot be logged.

    Raises:
        ValueError: for nested dicts, and anything but numbers, one-element tensors and metrics.
        TypeError: for complex numbers.
    """
    if isinstance(value, dict):
        raise ValueError(f"`self.log({name!r}, {value})`: nested dictionaries cannot be logged; log each item under its own name.")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"`self.log({name!r}, ...)` got a tensor of shape {tuple(value.shape)}: only one element can be logged. "
                "Reduce it first, for example with `.mean()`."
            )
    elif isinstance(value, Complex) and not isinstance(value, Real):
        raise TypeError(f"`self.log({name!r}, {value!r})`: complex numbers have no order and no place in a log; log their parts or `abs`.")
    elif not is_metric(value) and not isinstance(value, Number):
        raise ValueError(
            f"`self.log({name!r}, {value!r})`: values of type {type(value).__name__} cannot be logged; "
            "accepted are numbers, one-element tensors and torchmetrics Metrics."
        )


def resolve_options(name: str, scope: str | None, given: tuple[Any, ...]) -> Options:
    """Fill in the hook's defaults, and refuse what the hook does not allow.

    Args:
        name: the key.
        scope: the hook that logs, None outside of one.
        given: the arguments of ``log`` in its order, without name, value and batch_size.

    Raises:
        MisconfigurationException: if the hook cannot log, or cannot log in this way.
    """
    prog_bar, logger, on_step, on_epoch, reduce_fx, graph, sync, group, add_idx, attribute, rank_zero = given
    if scope is None or (scope not in BATCH_DEFAULTS and scope not in EPOCH_ONLY):
        where = f"inside `{scope}`" if scope else "here, outside of the hooks of a running loop"
        raise MisconfigurationException(f"`self.log({name!r}, ...)` is not possible {where}: no loop would collect the value.")
    default_step, default_epoch = BATCH_DEFAULTS.get(scope, (False, True))
    on_step = default_step if on_step is None else on_step
    on_epoch = default_epoch if on_epoch is None else on_epoch
    if scope in EPOCH_ONLY and on_step:
        raise MisconfigurationException(f"`self.log({name!r}, on_step=True)` is not possible inside `{scope}`, no step: leave it out.")
    if scope in EPOCH_ONLY and not on_epoch:
        raise MisconfigurationException(f"`self.log({name!r}, on_epoch=False)` inside `{scope}` would log nothing: leave it out.")
    if not on_step and not on_epoch:
        raise MisconfigurationException(f"`self.log({name!r}, on_step=False, on_epoch=False)` would log nothing: set one of them to True.")
    if DATALOADER_SUFFIX in name:
        raise MisconfigurationException(
            f"`self.log({name!r}, ...)`: the part '{DATALOADER_SUFFIX}' of the name is added by the trainer; leave it out."
        )
    reduction = REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx) if _hashable(reduce_fx) else None
    if reduction is None:
        raise MisconfigurationException(
            f"`self.log({name!r}, reduce_fx={reduce_fx!r})`: accepted are 'mean', 'sum', 'min', 'max' and torch's functions of them. "
            "For anything else log a torchmetrics Metric."
        )
    return Options(prog_bar, logger is not False, on_step, on_epoch, reduction, graph, sync, group, add_idx, attribute, rank_zero)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class Entry:
    """One key as logged by one hook for one loader.

    Args:
        name: the key.
        scope: the hook that logs it.
        dataloader_idx: the loader, None if there is only one.
        given: the arguments of ``log`` as they came, to be compared with later calls.
        options: the same with defaults filled in.
    """

    __slots__ = (
        "add", "borrowed", "dataloader_idx", "dtype", "given", "host_total", "merged", "name", "on_epoch", "on_step", "options", "scope",
        "serial", "shadow", "source", "synced", "total", "value", "weight", "weighted",
    )  # fmt: skip

    def __init__(self, name: str, scope: str, dataloader_idx: int | None, given: tuple[Any, ...], options: Options) -> None:
        self.name, self.scope, self.dataloader_idx, self.given, self.options = name, scope, dataloader_idx, given, options
        self.on_step, self.on_epoch = options.on_step, options.on_epoch
        self.weighted = options.on_epoch and options.reduction == "mean" and scope in BATCH_DEFAULTS
        self.add: Callable[[Any, float], None] = self._add_value
        self.source: Any = None  # the Metric, if that is what is logged
        self.dtype: torch.dtype | None = None
        self.serial = -1  # the batch that logged last
        self.merged = True  # whether the step value has reached the dictionaries of the trainer
        self.borrowed = False  # whether the value lies where the next replay of a recorded step writes
        self.shadow: Any = None  # the running total of such steps
        self.reset()

    def reset(self) -> None:
        """Forget all values; a Metric is reset too."""
        self.settle()
        if self.source is not None:
            self.source.reset()
        self.source = None
        self.synced = False  # whether the epoch value is that of all processes
        self.value: Any = None
        self.total: Tensor | None = None
        self.host_total: float | None = None
        self.weight: float = 0

    def take_metric(self) -> None:
        """From here on a Metric is logged, which accumulates by itself."""
        self.add, self.weighted = self.add_metric, False

    @property
    def takes_metric(self) -> bool:
        """Whether a Metric is logged."""
        return self.add == self.add_metric

    def forked(self, on_step: bool) -> str:
        """The name that loggers and the bar see: ``x_step`` and ``x_epoch`` when both are logged."""
        name = f"{self.name}_{'step' if on_step else 'epoch'}" if self.on_step and self.on_epoch else self.name
        return name + self.suffix

    @property
    def suffix(self) -> str:
        """``/dataloader_idx_i`` where there are several loaders, unless switched off."""
        if self.dataloader_idx is None or not self.options.add_dataloader_idx:
            return ""
        return f"{DATALOADER_SUFFIX}{self.dataloader_idx}"

    # ---- adding: no value is read from its device here -----------------------------------------------------------

    def add_metric(self, value: Any, weight: float) -> None:
        """Take note of a Metric; it accumulates by itself."""
        if not is_metric(value):
            self._refuse_mixture()
        self.source = value
        if self.on_step:
            cached = value._forward_cache
            if cached is not None:
                self.value = cached.detach().clone() if isinstance(cached, Tensor) else cached
        if self.on_epoch:
            self.weight += 1

    def _add_value(self, value: Any, weight: float) -> None:
        if not isinstance(value, Tensor):
            self._add_number(value, weight)
            return
        if value.numel() != 1:
            check_value(self.name, value)
        if value.dim():
            value = value.reshape(())
        if self.options.enable_graph:
            self._add_with_graph(value, weight)
            return
        value = value.detach()
        if self.on_step:
            # A copy: what was logged must not change when the user changes the tensor in place.
            self.value = value.clone() if value.dtype in WIDE else value.to(widened(value.dtype))
        if self.on_epoch:
            total = self.total
            if total is None:
                total = self._new_total(value)
            elif total.device != value.device:
                total, value = self._to_one_device(total, value)
            reduction = self.options.reduction
            if reduction == "mean":
                total.add_(value, alpha=weight)
            elif reduction == "sum":
                total.add_(value)
            elif reduction == "max":
                torch.maximum(total, value.to(total.dtype), out=total)
            else:
                torch.minimum(total, value.to(total.dtype), out=total)
            self.weight += weight

    def _new_total(self, value: Tensor) -> Tensor:
        # Sums in double precision: a float32 sum over a long epoch loses digits. Not every device has doubles.
        wide = torch.float32 if value.device.type in ("mps", "xla") else torch.float64
        start = {"max": -float("inf"), "min": float("inf")}.get(self.options.reduction, 0.0)
        with torch.inference_mode(False):  # the total outlives the evaluation loop's inference mode
            self.total = torch.full((), start, dtype=wide, device=value.device)
        self.dtype = widened(value.dtype)
        return self.total

    def _to_one_device(self, total: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # From the host to the device, never back: that would wait for it.
        if total.device.type == "cpu":
            self.total = total = total.to(value.device)
            return total, value
        return total, value.to(total.device)

    def _refuse_mixture(self) -> None:
        raise MisconfigurationException(
            f"`self.log({self.name!r}, ...)` got a Metric and a plain value in the same `{self.scope}`: log them under two names."
        )

    def _add_number(self, value: Any, weight: float) -> None:
        if type(value) not in NUMBERS:
            check_value(self.name, value)
            if is_metric(value):
                self._refuse_mixture()
        value = float(value)
        if self.on_step:
            self.value = value
        if self.on_epoch:
            total, reduction = self.host_total, self.options.reduction
            if reduction == "mean":
                self.host_total = (total or 0.0) + value * weight
            elif reduction == "sum":
                self.host_total = (total or 0.0) + value
            elif total is None or value != value:
                self.host_total = value
            else:
                self.host_total = max(total, value) if reduction == "max" else min(total, value)
            self.weight += weight

    def _add_with_graph(self, value: Tensor, weight: float) -> None:
        value = value.clone()
        if self.on_step:
            self.value = value
        if self.on_epoch:
            total, reduction = self.total, self.options.reduction
            self.dtype = value.dtype
            if reduction in ("mean", "sum"):
                value = value * weight if reduction == "mean" else value
                self.total = value if total is None else total + value
            else:
                self.total = value if total is None else (torch.maximum if reduction == "max" else torch.minimum)(total, value)
            self.weight += weight

    # ---- reading -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take over what replayed steps have logged (``loops/graph_recording.py``)."""
        if self.borrowed:
            self.own()
        if self.shadow is not None:
            self.shadow.hand_over()

    def own(self) -> None:
        """Keep a copy of a step value that the next replay would write over."""
        self.value, self.borrowed = self.value.clone() if self.borrowed else self.value, False

    @property
    def has_epoch_value(self) -> bool:
        """Whether anything was logged since the last reset."""
        if self.shadow is not None:
            self.shadow.hand_over()
        return self.on_epoch and self.weight > 0

    @property
    def is_unused(self) -> bool:
        """Whether nothing at all was logged since the last reset."""
        self.settle()
        return self.value is None and self.weight == 0 and self.source is None

    def epoch_value(self) -> Any:
        """The reduction over all that was logged since the last reset: a tensor where it is, or a number."""
        if self.source is not None:
            computed = self.source.compute()  # over all processes, where there are several
            check_value(self.name, computed)
            return computed.detach() if isinstance(computed, Tensor) else computed
        reduction = self.options.reduction
        if self.total is None:
            assert self.host_total is not None
            return self.host_total / self.weight if reduction == "mean" else self.host_total
        total = self.total
        if self.host_total is not None:  # both numbers and tensors were logged under this key
            if reduction in ("mean", "sum"):
                total = total + self.host_total
            else:
                total = total.clamp(min=self.host_total) if reduction == "max" else total.clamp(max=self.host_total)
        if reduction == "mean":
            total = total / self.weight
        return total.to(self.dtype) if self.dtype is not None else total
