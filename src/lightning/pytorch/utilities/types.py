"""Types of what users return and pass."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, Union, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import NotRequired, Required

__all__ = [
    "EVALUATE_OUTPUT",
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "DistributedDataParallel",
    "LRSchedulerConfig",
    "LRSchedulerConfigType",
    "LRSchedulerPLType",
    "LRSchedulerTypeUnion",
    "OptimizerConfig",
    "OptimizerLRScheduler",
    "OptimizerLRSchedulerConfig",
]

STEP_OUTPUT = Union[Tensor, Mapping[str, Any], None]
"""What ``training_step``, ``validation_step`` and ``test_step`` may return."""

EVALUATE_OUTPUT = list[Mapping[str, float]]
"""What ``validate`` and ``test`` return: one dict of metrics for each loader."""

TRAIN_DATALOADERS = Any
"""Any iterable, or a nested collection of iterables."""

EVAL_DATALOADERS = Any
"""Any iterable, or a sequence of iterables."""

LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]
LRSchedulerPLType = LRSchedulerTypeUnion


class DistributedDataParallel(Protocol):
    """What a data-parallel wrapper offers: the module, and a context in which gradients stay local."""

    def __init__(
        self,
        module: Any,
        device_ids: Any = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool = True,
        process_group: Any = None,
        bucket_cap_mb: int = 25,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
    ) -> None: ...

    @contextmanager
    def no_sync(self) -> Generator[None, None, None]:
        """Keep gradients local inside this context."""
        yield


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass
class LRSchedulerConfig:
    """A learning rate scheduler and when it steps.

    Args:
        scheduler: the scheduler.
        name: what a learning rate monitor calls it; None for a name made from the optimizer's class.
        interval: ``"epoch"`` or ``"step"``: after each training epoch, or after each optimizer step.
        frequency: every how many intervals.
        reduce_on_plateau: whether it takes the value of ``monitor``.
        monitor: the metric that such a scheduler watches.
        strict: whether a missing metric is an error (True) or a warning.
    """

    scheduler: LRSchedulerTypeUnion
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


class LRSchedulerConfigType(TypedDict, total=False):
    """A scheduler in the form of a dict, as ``configure_optimizers`` may return it."""

    scheduler: Required[LRSchedulerTypeUnion]
    name: str | None
    interval: Literal["epoch", "step"]
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """An optimizer in the form of a dict, as ``configure_optimizers`` may return it."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict):
    """An optimizer and its scheduler in the form of a dict, as ``configure_optimizers`` may return it."""

    optimizer: Optimizer
    lr_scheduler: NotRequired[LRSchedulerTypeUnion | LRSchedulerConfigType]
    monitor: NotRequired[str]


OptimizerLRScheduler = Union[
    Optimizer,
    Sequence[Optimizer],
    tuple[Sequence[Optimizer], Sequence[Union[LRSchedulerTypeUnion, LRSchedulerConfig]]],
    OptimizerConfig,
    OptimizerLRSchedulerConfig,
    Sequence[OptimizerConfig],
    Sequence[OptimizerLRSchedulerConfig],
    None,
]
"""Everything that ``configure_optimizers`` may return."""
