"""What the hooks of an evaluation may gather from all processes, which may have other batches than this one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch.data import EvalLoaders
    from lightning.pytorch.trainer.trainer import Trainer

UNKNOWN = float("inf")


class Gathering:
    """A context for a run over loaders of evaluation: a gathering that not all processes would answer alike is an error.

    In evaluation no sample comes twice, so the processes may have different numbers of batches, and last batches of different
    sizes. A collective that only some of them reach would be taken for the next one that the others reach.

    Args:
        trainer: whose run it is.
        name: ``"validation"``, ``"test"`` or ``"predict"``, which its hooks carry in their names.
        loaders: those that are run through.
        limit: the most batches of each.
    """

    def __init__(self, trainer: Trainer, name: str, loaders: EvalLoaders, limit: float = UNKNOWN) -> None:
        self.strategy = trainer.strategy
        self.name = name
        self.loaders = loaders
        self.limit = limit
        self.counts: list[float] = []  # batches of each process, while the loader is run through of which they differ

    def __enter__(self) -> Gathering:
        self.strategy.before_gathering = self.check
        return self

    def __exit__(self, *_: object) -> None:
        self.strategy.before_gathering = None

    def over(self, sources: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The loaders with their indices; while one of them is taken, its numbers of batches count."""
        for index, source in enumerate(sources):
            counts = [min(each[index], self.limit) for each in self.loaders.of_all]
            self.counts = counts if len(set(counts)) > 1 else []
            yield index, source
        self.counts = []

    def check(self, tensor: Tensor, stacks: bool) -> None:
        """Look at what this process is about to gather from all, or to reduce over all.

        Args:
            tensor: of this process.
            stacks: whether those of all processes are stacked, for which their shapes have to be equal.

        Raises:
            MisconfigurationException: in every process that gets here, if the others have more or fewer batches, or other shapes.
        """
        if self.counts:
            raise MisconfigurationException(
                f"Tensors of all processes were asked for in a hook of the batches of {self.name}, of which the processes have different "
                f"numbers: {_by_rank([f'{count:.0f}' for count in self.counts])}. Those with fewer batches would never answer. Keep what "
                f"you need and gather it in `on_{self.name}_epoch_end`; or give all processes the same number, such as by a loader with "
                "a torch.utils.data.DistributedSampler of its own, which repeats samples."
            )
        if not stacks:
            return
        mine = f"{tuple(tensor.shape)} of {tensor.dtype}"
        others = self.strategy.compare({"all_gather": mine}, mine)
        if others is not None:
            raise MisconfigurationException(
                f"`all_gather` stacks tensors of one shape, and in {self.name} the processes gave different ones: {_by_rank(others)}. "
                "No sample comes twice in evaluation, so a process may have fewer samples than another. Gather sums and counts in place of "
                "samples, fill up to one shape, or gather any objects with `torch.distributed.all_gather_object`."
            )


def _by_rank(values: list[Any]) -> str:
    from lightning.fabric.collectives import SHOWN_RANKS

    shown = [f"{value} on rank {rank}" for rank, value in enumerate(values[:SHOWN_RANKS])]
    return ", ".join(shown) + (", ..." if len(values) > SHOWN_RANKS else "")
