"""Loaders that give their batches one after the other: continued by their own state, or by reading them again."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.loader_state.common import Batches, Cursor, State, digest_of_rng, load_samplers, sampler_states
from lightning.fabric.utilities.loader_state.map_style import warn_of_unkept
from lightning.fabric.utilities.loader_state.randomness import generators_within, is_stateful, set_states, states_of
from lightning.fabric.utilities.loader_state.workers import Snapshot
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states


class Watched:
    """A dataset that is known to be at its end as soon as it has nothing more.

    Args:
        dataset: the user's.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.ended = False

    def __iter__(self) -> Iterator[Any]:
        self.ended = False
        return self._samples(iter(self.dataset))  # started now, as a loader starts it

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def _samples(self, samples: Iterator[Any]) -> Iterator[Any]:
        yield from samples
        self.ended = True


class Stream:
    """Any iterable of batches.

    Args:
        loader: the user's. A state of its own, or that of its dataset if it has no workers, is used; else batches are read again.
        looks_ahead: whether batches are fetched before those before them are used.
    """

    kind = "stream"
    keeps_on = True  # a state between two passes is needed when the next begins

    def __init__(self, loader: Iterable[Any], looks_ahead: bool) -> None:
        self.loader = loader
        self.looks_ahead = looks_ahead
        self.dataset = getattr(loader, "dataset", None)
        self.workers = int(getattr(loader, "num_workers", 0) or 0)
        # Whose state says where the data are: the loader's, or the dataset's in this process.
        self.owner: Any = next((each for each in (loader, self.dataset) if is_stateful(each)), None)
        if self.workers > 0 and self.owner is not loader:
            self.owner = None  # the dataset's state is in the workers
        self.watched: Watched | None = None
        self.cursor: Cursor | None = None
        self.loaded_end = False  # whether the owner was given the state at the end of a pass
        self.workers_stayed = False  # whether those of the interrupted run go on into the next pass

    # ---- a pass -----------------------------------------------------------------------------------------------------

    def open(self, carried: State | None) -> Batches:
        """A whole pass."""
        cursor = Cursor(self._start())
        if not self.loaded_end:
            batches = self._batches(self._iterate(), cursor)
            stayed, self.workers_stayed = self.workers_stayed, False
            if stayed or (carried is not None and carried.get("workers_stay")):  # which got their seeds in an earlier pass, not in this one
                set_rng_states(cursor.start["rng"])
                set_states(self._generators(), cursor.start["generators"])
            return batches
        # Some begin anew from such a state, others find that nothing is left of their pass, and begin the next one after that.
        self.loaded_end = False
        batches = self._batches(self._iterate(), cursor)
        batches.fetch_again(1, None, self._restore)
        if not cursor.ready:
            set_rng_states(cursor.start["rng"])
            cursor = Cursor(cursor.start)
            batches = self._batches(self._iterate(), cursor)
        return batches

    def resume(self, state: State) -> Batches:
        """The rest of a pass; the random states of this process stay as they are."""
        kept = collect_rng_states(include_cuda=False)
        generators, done, ahead, before = self._generators(), state["batches"], state["ahead"], state["before"]
        set_rng_states(state["start"]["rng"])
        set_states(generators, state["start"]["generators"])
        if self.owner is not self.loader:
            load_samplers(self.loader, state["start"]["samplers"])
        cursor = Cursor(state["start"], done)
        if state["over"] and ahead == 0:
            set_states(generators, state["generators"])
            set_rng_states(kept)
            self._load_end(state["owner"])
            self.workers_stayed = state.get("workers_stay", False)
            cursor.over = True
            return self._batches(iter(()), cursor)
        position = self._position_of(state)
        if position is not None:
            self.owner.load_state_dict(copy.deepcopy(position))
        batches = self._batches(self._iterate(), cursor)
        if position is None:
            self._read_again(batches.iterator, state)
        if batches.fetch_again(ahead, before, self._restore):
            warn_of_unkept(ahead)
        set_states(generators, state["generators"])
        set_rng_states(kept)
        return batches

    def _iterate(self) -> Iterator[Any]:
        if self.owner is None or self.owner is self.loader:
            return iter(self.loader)
        clone = copy.copy(self.loader)
        self.watched = Watched(self.dataset)
        vars(clone).update(dataset=self.watched, _iterator=None)
        return iter(clone)

    def _load_end(self, state: Any) -> None:
        if self.owner is not None and state is not None and not isinstance(self.owner, DataLoader):
            self.owner.load_state_dict(copy.deepcopy(state))
            self.loaded_end = True

    def _is_over(self, cursor: Cursor | None) -> bool:
        """Whether a pass is through; of a dataset, which may be so before its loader is asked for more, it is known first."""
        return cursor is not None and (cursor.over or (self.watched is not None and self.watched.ended))

    def _position_of(self, state: State) -> Any:
        """The state of the loader, or the dataset, after the last batch that counts; None if that was not kept."""
        if self.owner is None or not state["owned"]:
            return None
        if state["ahead"] == 0:
            return state["owner"]
        return state["before"][0]["stateful"][0] if state["before"] is not None else None

    def _restore(self, before: State) -> None:
        set_rng_states(before["rng"])
        set_states(self._generators(), before["generators"])

    def _read_again(self, iterator: Iterator[Any], state: State) -> None:
        done, began = state["batches"], time.monotonic()
        created = digest_of_rng()
        for i in range(done):
            try:
                next(iterator)
            except StopIteration:
                rank_zero_warn(f"The {self._name} gives {i} batches, fewer than the {done} that were given before: the epoch ends here.")
                return
        drew = digest_of_rng() != created
        if done and not isinstance(self.loader, Sequence):  # which takes no time
            once = " It is an iterator, which can't begin anew: what it gives now must be its first batches." if self._once else ""
            rank_zero_warn(
                f"The {self._name} can't tell where it is, so {done} batch(es) were read again to come to the same place, which took "
                f"{time.monotonic() - began:.1f} s. Give it, or its dataset, `state_dict` and `load_state_dict`.{once}"
            )
        reached = state["rng"]
        if drew and self.workers == 0 and digest_of_rng() != reached:
            rank_zero_warn(
                f"The {self._name} draws random numbers in the process that trains, and so does the training, in turn: if which data "
                "come depends on the numbers drawn before, the rest of this epoch differs. Use workers, a generator of its own, or give "
                "it `state_dict` and `load_state_dict`."
            )

    def _batches(self, iterator: Iterator[Any], cursor: Cursor) -> Batches:
        self.cursor = cursor
        # Of an iterable that is no DataLoader and has no state of its own, nothing is kept at each batch: it may be as fast as a list.
        anything = self.owner is None and not isinstance(self.loader, DataLoader)
        if not self.looks_ahead or anything or (self.workers > 0 and self.owner is None):
            return Batches(iterator, cursor, None)
        owner = [] if self.owner is None else [self.owner]
        return Batches(iterator, cursor, Snapshot(self._roots, owner))

    # ---- state ------------------------------------------------------------------------------------------------------

    def state(self, cursor: Cursor, batches: int) -> State:
        """The place after some batches of this pass."""
        ahead = cursor.ahead_of(batches)
        before = cursor.states_before(ahead)
        return {
            "start": cursor.start,
            "batches": batches,
            "ahead": ahead,
            "over": self._is_over(cursor),
            "before": before,
            "generators": states_of(self._generators()),
            "owned": self.owner is not None,
            "owner": copy.deepcopy(self.owner.state_dict()) if self.owner is not None and ahead == 0 else None,
            "rng": digest_of_rng(before[0]["rng"] if before else None),
            "workers_stay": self._workers_stay,
        }

    def state_between(self, at_end: bool) -> State:
        """What the next pass depends on, after this one."""
        owned = self.owner is not None and self._is_over(self.cursor)  # else the state is that of a place that nobody goes back to
        return {
            "batches": None,
            "generators": states_of(self._generators()),
            "samplers": [] if self.owner is self.loader else sampler_states(self.loader),
            "owner": copy.deepcopy(self.owner.state_dict()) if owned else None,
            "workers_stay": self._workers_stay,
        }

    def load_between(self, state: State) -> None:
        """Take over what :meth:`state_between` returned."""
        set_states(self._generators(), state["generators"])
        if self.owner is not self.loader:
            load_samplers(self.loader, state["samplers"])
        self._load_end(state["owner"])

    def describe(self) -> State:
        """What must be the same for the rest to be exact."""
        return {"batch size": getattr(self.loader, "batch_size", None), "workers": self.workers, "samples": sized_len(self.dataset)}

    def _start(self) -> State:
        rng = collect_rng_states(include_cuda=False)
        samplers = [] if self.owner is self.loader else sampler_states(self.loader)
        return {"rng": rng, "generators": states_of(self._generators()), "samplers": samplers}

    @property
    def _workers_stay(self) -> bool:
        return self.workers_stayed or (self.owner is None and getattr(self.loader, "_iterator", None) is not None)

    def _generators(self) -> list[Any]:
        return generators_within(self._roots)

    @property
    def _roots(self) -> list[Any]:
        names = ("generator", "batch_sampler", "sampler", "dataset", "collate_fn")
        parts = [getattr(self.loader, name, None) for name in names]
        return parts if isinstance(self.loader, DataLoader) else [self.loader, *parts]

    @property
    def _once(self) -> bool:
        return iter(self.loader) is self.loader if isinstance(self.loader, Iterator) else False

    @property
    def _name(self) -> str:
        if isinstance(self.loader, DataLoader):
            return f"{type(self.loader).__name__} of a {type(self.dataset).__name__}"
        return f"loader, a {type(self.loader).__name__},"
