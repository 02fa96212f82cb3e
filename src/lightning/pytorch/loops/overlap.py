"""``Trainer(overlap_transfer=...)``: a batch is copied to the device while the step before is still computed there."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.loops.graph_watch import PLAIN

FIRST = 3  # transfers of a user's own that are looked at
WORTHWHILE = 2**20  # bytes of a tensor: 20 to 40 microseconds of copying, about as much as the host needs to arrange it
AHEAD = 2  # steps by which the host may be ahead of the device; each has its batch in memory


class OverlappedTransfer:
    """Moves batches to a CUDA device on a stream of their own.

    The loop asks for a batch as soon as the host has launched the step before, which the device may not even have begun. On the
    stream of the steps the copy would wait for all of that; on its own it runs meanwhile, if the batch lies in pinned memory, and the
    next step waits for it. No batch is fetched any earlier than without: what is resumed, and who draws which random numbers, stay.

    A host that is far ahead would fill the memory with batches, for on a stream of its own a copy never finds that of an unfinished step
    free. So it waits until the device is at most :data:`AHEAD` steps behind, which leaves that enough to do.

    Args:
        transfer: moves a batch.
        device: to which.
        is_users: whether it is the user's own: one that reads tensors of the device, which steps may still write, runs on their stream.
        always: whether batches that are hardly worth it go there too.
        asked: whether the user is told why where none can.
    """

    def __init__(
        self, transfer: Callable[..., Any], device: torch.device, is_users: bool = False, always: bool = True, asked: bool = True
    ) -> None:
        self.transfer, self.device, self.always, self.asked = transfer, device, always, asked
        self.stream = stream_for_copies(device)
        self.copied: Any = None  # an event at the end of a copy
        self.of_steps: Any = None  # their stream, under the numbers that torch has for it
        self.unknown = FIRST if is_users else 0
        self.apart = True
        self.ends: deque[tuple[torch.cuda.Event, Any]] = deque()  # of the last steps, with batches that have to be kept until then
        self.kept: Any = None  # such a batch, of the step that runs next

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.apart or not (self.always or is_large(batch)) or is_on(batch, self.device):
            return self.transfer(batch, *args, **kwargs)
        if self.unknown:
            return self.look(batch, *args, **kwargs)
        steps = self.stream_of_steps()
        self.hold_back(steps)
        with self.stream:
            moved = self.transfer(batch, *args, **kwargs)
        self.copied.record(self.stream)
        steps.wait_event(self.copied)
        if not is_recorded(moved, steps):
            self.kept = moved
        return moved

    def stream_of_steps(self) -> torch.cuda.Stream:
        """The current stream: a new object for it, and a new event, at each step would take as long as the copies."""
        numbers = torch._C._cuda_getCurrentStream(self.stream.device_index)
        if self.of_steps is None or self.of_steps[0] != numbers:
            self.of_steps, self.copied = (numbers, torch.cuda.current_stream(self.device)), torch.cuda.Event()
        return self.of_steps[1]  # type: ignore[no-any-return]

    def hold_back(self, steps: torch.cuda.Stream) -> None:
        """Note where the step before ends, and wait for the end of one some steps earlier."""
        event = torch.cuda.Event(blocking=True) if len(self.ends) < AHEAD else self.ends[0][0]
        event.synchronize()  # at once, where it is new
        if len(self.ends) == AHEAD:
            self.ends.popleft()  # not before, with what it keeps
        event.record(steps)
        self.ends.append((event, self.kept))
        self.kept = None

    def look(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Move a batch on the stream of the steps, and see whether the user's transfer reads what is on the device already."""
        self.unknown -= 1
        with Reading(self.device) as reading:
            moved = self.transfer(batch, *args, **kwargs)
        if reading.found is not None:
            self.apart = False
            if self.asked:
                rank_zero_warn(
                    "Trainer(overlap_transfer=True): `transfer_batch_to_device` reads tensors that are on the device already "
                    f"({reading.found}), which steps may still write. So batches are not copied on a stream of their own. Compute in "
                    "`on_after_batch_transfer`."
                )
        return moved


@cache
def stream_for_copies(device: torch.device) -> torch.cuda.Stream:
    """The one stream for it: memory that was allocated on a stream is used again on it alone."""
    return torch.cuda.Stream(device)


class Reading(TorchDispatchMode):
    """Sees whether anything inside of it reads a tensor of a device that is older.

    Args:
        device: which.

    Attributes:
        found: the operation that does; None if there is none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: str | None = None
        self.made: set[int] = set()
        self.kept: list[Any] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, Tensor) and tensor.device == self.device and id(tensor) not in self.made:
                self.found = str(func)
        result = func(*args, **(kwargs or {}))
        self.made.update(id(each) for each in tree_leaves(result))
        self.kept.append(result)
        return result


def is_on(batch: Any, device: torch.device) -> bool:
    """Whether the first tensor of a batch is on a device; of the usual structures."""
    while isinstance(batch, (list, tuple, Mapping)) and batch:
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return isinstance(batch, Tensor) and batch.device == device


def is_large(batch: Any) -> bool:
    """Whether a tensor of a batch, of the usual structures, is worth a copy on a stream of its own."""
    if isinstance(batch, Tensor):
        return batch.nbytes >= WORTHWHILE
    if not isinstance(batch, (list, tuple)):
        if not isinstance(batch, Mapping):
            return False
        batch = batch.values()
    for each in batch:  # noqa: SIM110 - a generator takes twice as long
        if each.nbytes >= WORTHWHILE if isinstance(each, Tensor) else is_large(each):
            return True
    return False


def is_recorded(batch: Any, stream: torch.cuda.Stream) -> bool:
    """Tell the allocator that a stream reads a batch: its memory is not given to a later one before that is done.

    Returns:
        whether all tensors in it could be found; else somebody has to hold the batch until then.
    """
    if isinstance(batch, Tensor):
        known = batch.layout is torch.strided and not batch.is_nested
        if known and batch.is_cuda:
            batch.record_stream(stream)
        return known
    if isinstance(batch, (list, tuple)):
        parts = list(batch)
    elif isinstance(batch, Mapping):
        parts = list(batch.values())
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    else:
        return isinstance(batch, PLAIN)
    found = [is_recorded(each, stream) for each in parts]  # each of them, whatever the first ones are
    return all(found)
