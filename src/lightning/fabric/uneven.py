"""Loaders of different lengths: a policy that makes every process take the same number of steps.

Collectives within a step (averaging gradients, synchronised batch normalisation, gathering what the user gathers) need
every process. So no process may step alone, and the question is what those do that ran out of data.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from lightning.fabric import collectives
from lightning.fabric.plugins.layer_sync import HostSyncBatchNorm
from lightning.fabric.utilities.data import has_iterable_dataset, sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["POLICIES", "Lockstep", "batch_norm_held"]

POLICIES = ("join", "shortest", "error")
UNKNOWN = -1
WHAT_TO_DO = (
    'Give each the same number of samples, or choose what happens: `Trainer(uneven_inputs="shortest")` ends with the first that runs out, '
    '"join" with the last.'
)
END = object()  # in the place of a batch: there is none


class Lockstep:
    """A loader that gives every process the same number of batches.

    Where every loader has a length, the lengths are compared once, before the first pass. Where one has none, each step tells
    the others whether there is a next batch; the message travels while the step computes.

    Args:
        loader: of this process.
        policy: what happens if the loaders give different numbers of batches. ``"error"``: an error in every process, before the
            first step where lengths are known. ``"shortest"``: the pass ends with the first that runs out. ``"join"``: it ends
            with the last; the others repeat their last batch, and what they compute counts nothing (see :meth:`weight`).
        divide_by_all: with ``"join"``, average gradients over all processes, as though those that ran out had gradients of zero;
            by default over those that have data, which is the mean over these data.
        group: the processes; None for all.

    Raises:
        ValueError: for another policy.

    Example::

        loader = Lockstep(DataLoader(...), policy="join")
        for index, batch in enumerate(loader):
            with loader.turn(index, model):
                loss = model(batch).mean() * loader.weight(index)
                loss.backward()
            optimizer.step()
    """

    def __init__(
        self,
        loader: Iterable[Any],
        policy: Literal["join", "shortest", "error"] | str = "error",
        divide_by_all: bool = False,
        group: Any = None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not known. Accepted: {', '.join(map(repr, POLICIES))}.")
        self.loader, self.policy, self.divide_by_all, self.group = loader, policy, divide_by_all, group
        self.lengths: list[int] = []  # of every process, where all are known
        self.num_batches: float = math.inf
        self.start = 0  # the index of the first batch of the next pass; a resumed run sets it, whose loader begins there by itself
        self.own_start = 0  # how many batches of its own this process had before that one
        self._own = 0  # how many batches this process has of its own, as far as it is known
        self._active: list[tuple[int, int]] = []  # from which index on how many processes have a batch of their own

    def __len__(self) -> int:
        if not self.lengths:
            raise TypeError("Lockstep: the processes have not agreed on a length, or a loader has none.")
        return int(self.num_batches)

    @property
    def is_even(self) -> bool:
        """Whether all processes are known to have the same number of batches, so that every weight is 1."""
        return len(set(self.lengths)) == 1

    # ---- how many ---------------------------------------------------------------------------------------------------

    def agree(self, length: float | None = None) -> float:
        """Compare lengths with the other processes, and return how many batches all take; infinity where that isn't known.

        Every process must call it. Iterating does so too, where nobody has.

        Args:
            length: how many batches this process takes, if not all; infinity for an unknown number.

        Raises:
            MisconfigurationException: in every process, if they have different lengths and the policy is ``"error"``.
        """
        if length is None:
            known = None if has_iterable_dataset(self.loader) else sized_len(self.loader)
            length = math.inf if known is None else known
        mine = UNKNOWN if length == math.inf else int(length)
        sent = torch.tensor([mine], device=collectives.host_device(self.group)) if collectives.is_distributed() else torch.tensor([mine])
        lengths = collectives.all_gather(sent, self.group).flatten().tolist()
        if UNKNOWN in lengths:
            self.lengths, self.num_batches = [], math.inf
            return self.num_batches
        if self.policy == "error" and len(set(lengths)) > 1:
            raise MisconfigurationException(
                f"The loaders of the processes have different lengths: {_by_rank(lengths, 'batches')}. {WHAT_TO_DO}"
            )
        self.lengths, self._own = lengths, mine
        self.num_batches = max(lengths) if self.policy == "join" else min(lengths)
        return self.num_batches

    def own(self, batches: int) -> int:
        """How many of the first batches of the pass were this process's own."""
        return min(batches, self._own)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def weight(self, index: int) -> float:
        """What the loss of this process counts in step ``index`` of the pass: multiply by it before backward.

        0 where the batch is a repeated one. Else such that the mean over all processes is the mean over those with data.
        """
        if index >= self._own:
            return 0.0
        if self.divide_by_all or self.policy != "join":
            return 1.0
        if self.lengths:
            return len(self.lengths) / sum(length > index for length in self.lengths)
        return self._world_size() / next(active for start, active in reversed(self._active) if start <= index)

    def turn(self, index: int, module: Module) -> AbstractContextManager[Any]:
        """A context for step ``index``: if its batch is a repeated one, it leaves no trace in the module's batch normalisation."""
        return nullcontext() if index < self._own else batch_norm_held(module)

    # ---- the batches ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        if not self.lengths:
            self.agree()
        (start, own), self.start, self.own_start = (self.start, self.own_start), 0, 0
        return self._counted(start) if self.lengths else self._asked(start, own)

    def _counted(self, start: int) -> Iterator[Any]:
        batches = iter(self.loader)
        batch: Any = END
        for index in range(start, int(self.num_batches)):
            if index < self._own:
                batch = next(batches, END)
                if batch is END:
                    raise RuntimeError(f"The loader has the length {self._own} and gave {index} batches. Its `__len__` has to be right.")
            if index == start and min(self.lengths) <= start:
                batch = self._lent(batch, [length > start for length in self.lengths])
            yield batch

    def _asked(self, start: int, own: int) -> Iterator[Any]:
        batches = iter(self.loader)
        self._own, self._active = own, [(start, self._world_size())]
        batch = last = next(batches, END)
        asking = _Asking(batch is not END, self.group)
        index = start
        while True:
            active = asking.answer()
            if active < self._world_size() and self._ends(active, index, batch is not END):
                return
            if index == start and active < self._world_size():
                last = self._lent(last, collectives.gather_object(batch is not END, self.group))
            if active != self._active[-1][1]:
                self._active.append((index, active))
            if batch is not END:
                last, self._own = batch, index + 1
            following = END if batch is END else next(batches, END)
            # The next answer comes while this step computes. Should the step raise, nobody waits for it.
            asking = _Asking(following is not END, self.group)
            yield last
            batch = following
            index += 1

    def _ends(self, active: int, index: int, has_batch: bool) -> bool:
        """Whether the pass ends, now that some process has no batch."""
        if self.policy == "error" and active > 0:
            having = collectives.gather_object(has_batch, self.group)
            without = [str(rank) for rank, has in enumerate(having) if not has]
            raise MisconfigurationException(
                f"The loaders of the processes have different lengths: after {index} batches there are none left on rank "
                f"{', '.join(without[: collectives.SHOWN_RANKS])}, and {active} of {len(having)} processes have more. {WHAT_TO_DO}"
            )
        return self.policy != "join" or active == 0

    def _lent(self, batch: Any, having: list[bool]) -> Any:
        """This process's batch, or one of another process, so that those without any data can take part."""
        lender = having.index(True)
        if self.group is not None:
            lender = torch.distributed.get_global_rank(self.group, lender)
        lent = collectives.broadcast(batch if batch is not END else None, lender, self.group)
        return lent if batch is END else batch

    def _world_size(self) -> int:
        return torch.distributed.get_world_size(self.group) if collectives.is_distributed() else 1


class _Asking:
    """How many processes have a next batch; the answer is collected when it is needed."""

    def __init__(self, has_batch: bool, group: Any) -> None:
        self.work = None
        self.count = torch.tensor(int(has_batch))
        if collectives.is_distributed():
            self.count = self.count.to(collectives.host_device(group))
            self.work = torch.distributed.all_reduce(self.count, group=group, async_op=True)

    def answer(self) -> int:
        if self.work is not None:
            self.work.wait()
        return int(self.count)


def _by_rank(numbers: list[int], what: str) -> str:
    shown = [f"{number} {what} on rank {rank}" for rank, number in enumerate(numbers[: collectives.SHOWN_RANKS])]
    return ", ".join(shown) + (f", ... (from {min(numbers)} to {max(numbers)})" if len(numbers) > len(shown) else "")


# ---- batch normalisation ----------------------------------------------------------------------------------------------


@contextmanager
def batch_norm_held(module: Module) -> Generator[None, None, None]:
    """A context in which a batch leaves no trace in batch normalisation: neither here nor, synchronised, in other processes.

    Synchronised layers still talk to the other processes, which wait for them, but count no sample.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training]
    outer = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = partial(_normalise_held, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, outer):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward


def _normalise_held(layer: Any, input: Tensor) -> Tensor:
    synchronised = isinstance(layer, (torch.nn.SyncBatchNorm, HostSyncBatchNorm))
    mean, variance = layer.running_mean, layer.running_var
    if synchronised and mean is not None and variance is not None:
        mean, variance = mean.clone(), variance.clone()  # the other processes' batches change them below, and backward needs these
    output = torch.nn.functional.batch_norm(
        input, mean, variance, layer.weight, layer.bias, training=mean is None or variance is None, eps=layer.eps
    )
    if synchronised:
        # An empty batch takes part in the forward pass's exchange, and through the sum of nothing in that of the backward pass.
        output = output + type(layer).forward(layer, input[:0]).sum()
    return output
