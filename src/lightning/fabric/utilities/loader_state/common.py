"""What both kinds of loaders share: the place in an epoch, and the random states around it."""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import Dataset, DistributedSampler, Sampler

from lightning.fabric.utilities.loader_state.randomness import is_stateful
from lightning.fabric.utilities.loader_state.workers import Snapshot, unpacked
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import collect_rng_states

State = dict[str, Any]
# How many batches may have been fetched that do not count as used: the loop's look-ahead, that of processes in lockstep, the batch of the
# moment, and one for which there was none of another loader.
AHEAD = 4


class Cursor:
    """The place in a pass over the data; it outlives the iterator, whose workers end with it.

    Args:
        start: the random states right before the pass, and those of the samplers.
        given: batches given so far.
    """

    __slots__ = ("before", "given", "over", "ready", "start")

    def __init__(self, start: State, given: int = 0) -> None:
        self.start = start
        self.given = given
        self.over = False
        self.ready: deque[Any] = deque()  # batches that the interrupted run had fetched ahead, fetched again
        self.before: deque[bytes] = deque(maxlen=AHEAD)  # the random states before the last batches, where a loop looks ahead

    def ahead_of(self, batches: int) -> int:
        """How many of the batches fetched do not count.

        Raises:
            ValueError: if that can't be.
        """
        ahead = self.given + len(self.ready) - batches
        if not 0 <= ahead <= AHEAD:
            raise ValueError(f"state_dict(batches={batches}): {self.given} batches were given, of which at most {AHEAD} may be unused.")
        return ahead

    def states_before(self, ahead: int) -> list[State] | None:
        """The random states before each of the last batches, where they were kept."""
        if len(self.before) < ahead:
            return None
        return [unpacked(packed) for packed in list(self.before)[len(self.before) - ahead :]]


class Batches:
    """The batches of one pass, counted.

    Args:
        iterator: gives them.
        cursor: counts them.
        snapshot: takes the random states before each batch, for a loop that fetches batches before it uses them; else None.
    """

    __slots__ = ("cursor", "iterator", "snapshot")

    def __init__(self, iterator: Iterator[Any], cursor: Cursor, snapshot: Snapshot | None) -> None:
        self.iterator = iterator
        self.cursor = cursor
        self.snapshot = snapshot

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        cursor = self.cursor
        if cursor.ready:
            batch = cursor.ready.popleft()
        else:
            if self.snapshot is not None:
                cursor.before.append(self.snapshot.take())
            try:
                batch = next(self.iterator)
            except StopIteration:
                cursor.over = True
                if self.snapshot is not None:
                    cursor.before.pop()  # it belongs to no batch
                raise
        cursor.given += 1
        return batch

    def fetch_again(self, ahead: int, before: list[State] | None, restore: Callable[[State], None]) -> bool:
        """Fetch the batches that the interrupted run had fetched and not used; True if they may differ from those.

        Args:
            ahead: how many.
            before: the random states before each of them, where they were kept.
            restore: goes back to such a state.
        """
        inexact = False
        for i in range(ahead):
            if before is not None:
                restore(before[i])
            if self.snapshot is not None:
                self.cursor.before.append(self.snapshot.take())
            random_state = digest_of_rng()
            try:
                self.cursor.ready.append(next(self.iterator))
            except StopIteration:
                break
            inexact = inexact or (before is None and digest_of_rng() != random_state)
        return inexact


def stateful_samplers(loader: Any) -> list[Any]:
    """The samplers of a loader that can tell and take their state, each once."""
    return [each for each in _samplers(loader) if is_stateful(each)]


def sampler_states(loader: Any) -> list[Any]:
    """The states of those; copies, since a sampler may go on changing what it returned."""
    return [copy.deepcopy(sampler.state_dict()) for sampler in stateful_samplers(loader)]


def load_samplers(loader: Any, states: list[Any]) -> None:
    """The inverse of :func:`sampler_states`."""
    samplers = stateful_samplers(loader)
    if len(samplers) != len(states):
        rank_zero_warn(
            f"The checkpoint holds the states of {len(states)} samplers of the loader, and {len(samplers)} of its samplers take one "
            "now: they start afresh, so the order of the samples may differ."
        )
        return
    for sampler, state in zip(samplers, states):
        sampler.load_state_dict(copy.deepcopy(state))


def shuffle_seed(loader: Any) -> int | None:
    """The seed from which a distributed sampler shuffles, or lets the sampler within it draw; None for other samplers."""
    sampler = _distributed_sampler(loader)
    return None if sampler is None else getattr(sampler, "seed", None)


def set_shuffle_seed(loader: Any, seed: int | None) -> None:
    """Shuffle as the interrupted run did, whatever seed this one was given."""
    sampler = _distributed_sampler(loader)
    if seed is not None and sampler is not None and getattr(sampler, "seed", None) != seed:
        sampler.seed = seed


def _distributed_sampler(loader: Any) -> Any:
    """torch's or one derived from it, such as those that share out what another sampler gives."""
    return next((each for each in _samplers(loader) if isinstance(each, DistributedSampler)), None)


def _samplers(loader: Any) -> list[Any]:
    """The samplers of a loader from the outermost to that which is wrapped by others, each once."""
    found: list[Any] = []
    for each in (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
        while each is not None and not any(each is other for other in found):
            found.append(each)
            wrapped = getattr(each, "dataset", None) if isinstance(each, DistributedSampler) else getattr(each, "sampler", None)
            each = wrapped if isinstance(wrapped, (Sampler, Iterable)) and not isinstance(wrapped, Dataset) else None
    return found


def digest_of_rng(states: State | None = None) -> int:
    """A number that tells one state of a process's random generators from another: of this one's now, if none is given."""
    states = collect_rng_states(include_cuda=False) if states is None else dict(states)
    states["torch"] = states["torch"].numpy().tobytes()
    return zlib.crc32(repr(states).encode())
