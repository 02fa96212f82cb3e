"""Loaders of datasets with indices: continued by drawing the order again, without loading what was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.loader_state.common import (
    AHEAD,
    Batches,
    Cursor,
    State,
    load_samplers,
    sampler_states,
    set_shuffle_seed,
    shuffle_seed,
)  # fmt: skip
from lightning.fabric.utilities.loader_state.indices import Indices, innermost
from lightning.fabric.utilities.loader_state.randomness import generators_within, set_states, states_of
from lightning.fabric.utilities.loader_state.workers import (
    WAIT,
    PassingOver,
    Recorder,
    Ring,
    Skipped,
    Snapshot,
    Starter,
    own_states,
    restore_own,
    slot_size,
)  # fmt: skip
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states

TORCH = ("torch.utils.data.sampler", "torch.utils.data.distributed", "torch.utils.data.dataloader", "builtins")


class MapStyle:
    """A torch DataLoader of a dataset with indices.

    It iterates over a copy of the loader, whose sampler counts and whose workers keep their random states.

    Args:
        loader: the user's, which stays as it is.
        looks_ahead: whether batches are fetched before those before them are used.
    """

    kind = "map"

    def __init__(self, loader: DataLoader[Any], looks_ahead: bool) -> None:
        self.loader = loader
        self.workers = loader.num_workers
        self.looks_ahead = looks_ahead and self.workers == 0  # those of workers are kept anyway
        self.persistent = bool(loader.persistent_workers) and self.workers > 0
        self.indices = Indices(None)
        self.clone: DataLoader[Any] | None = None
        self.ring: Ring | None = None
        self.born: torch.Tensor | None = None  # the state from which persistent workers drew their seeds
        self.born_now = True  # whether that was in this pass
        self.prepared = [0] * self.workers  # batches of each worker in the passes before
        self.began = 0  # the first batch of this pass that this process loads
        self.restored: list[State | None] = [None] * self.workers

    # ---- a pass -----------------------------------------------------------------------------------------------------

    def open(self, carried: State | None) -> Batches:
        """A whole pass.

        Args:
            carried: what persistent workers of an interrupted run left behind; None if there were none.
        """
        cursor = Cursor(self._start())
        if self.persistent and self.clone is not None:
            self.prepared = [count + self._prepared_by(worker, self.indices.drawn) for worker, count in enumerate(self.prepared)]
            self.began, self.born_now = 0, False
            self.indices.resume(None, 0)
            return self._batches(iter(self.clone), cursor)
        carried = carried if self.persistent else None
        self.clone = self._copy(carried, 0)
        return self._batches(iter(self.clone), cursor)

    def resume(self, state: State) -> Batches:
        """The rest of a pass; the random states of this process stay as they are."""
        kept = collect_rng_states(include_cuda=False)
        generators, done = self._generators(), state["batches"]
        set_rng_states(state["start"]["rng"])
        set_states(generators, state["start"]["generators"])
        load_samplers(self.loader, state["start"]["samplers"])
        set_shuffle_seed(self.loader, state["start"]["seed"])
        cursor = Cursor(self._start(), done)
        phantoms = done % self.workers if self._in_order else 0
        self.clone = self._copy(state, phantoms)
        self.indices.resume({"batches": done, **state["indices"]}, phantoms)
        self.began = done
        batches = self._batches(iter(self.clone), cursor)
        first = state["indices"]["first"]
        if self.workers == 0 and first is not None:
            self.indices.first = first
            set_rng_states(first["rng"])
            set_states(generators, first["generators"])
        if self.workers == 0:
            self.indices.pass_over()
        for _ in range(phantoms):
            assert isinstance(next(batches.iterator), Skipped)
        ahead = state["ahead"]
        before = state["before"] if self.workers == 0 else None
        if self.workers == 0 and done == 0 and ahead > 0 and before is None:
            self.indices.draw_first()  # what the dataset draws is told from it
        inexact = batches.fetch_again(ahead, before, self._restore)
        if self.workers == 0 and state["own"] is not None:
            restore_own(self._roots, state["own"])
        if self.workers == 0 and inexact:
            warn_of_unkept(ahead)
        if state["indices"]["ended"] and self.indices.total == state["indices"]["drawn"]:
            self.indices.reach_end()
        if (self.indices.total, self.indices.ended) == (state["indices"]["drawn"], state["indices"]["ended"]):
            set_states(generators, state["generators"])
        set_rng_states(kept)
        self.indices.warn_of_mismatch()
        if self.workers > 0 and not self._in_order:
            rank_zero_warn(
                "The loader has in_order=False, so its batches came in the order in which the workers finished them: in the rest of this "
                "epoch some may come twice, or not at all, and random numbers of the workers are others."
            )
        return batches

    def _restore(self, before: State) -> None:
        set_rng_states(before["rng"])
        restore_own(self._roots, before)

    def _batches(self, iterator: Iterator[Any], cursor: Cursor) -> Batches:
        return Batches(iterator, cursor, Snapshot(self._roots) if self.looks_ahead else None)

    def _copy(self, state: State | None, phantoms: int) -> DataLoader[Any]:
        """The loader with what counts and keeps in the places of its sampler, collate function and start of workers."""
        loader, clone = self.loader, copy.copy(self.loader)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler = getattr(loader, name)
        earlier = state is not None and self.persistent and state["born"] is not None
        # What is fetched again in this process draws its indices again too, with all random numbers that this takes.
        keep = 0 if self.workers == 0 or _draws_alike(sampler) else AHEAD + self.workers * (loader.prefetch_factor or 0)
        # It must not hold this object, and so the clone: workers are to end with the last reference, not with the next garbage collection.
        observe = partial(_random_states, self._generators())
        self.indices = Indices(sampler, keep, observe, swallow=1 if earlier else 0)
        attributes = vars(clone)  # a DataLoader refuses to change some of these, as that can't work while it iterates
        attributes.update({name: self.indices, "_iterator": None})
        if self.workers == 0:
            return clone
        self.prepared, self.began = [0] * self.workers, 0
        self.restored = [None] * self.workers
        if state is not None and state["workers"] is not None and len(state["workers"]) == self.workers and self._in_order:
            self.restored = state["workers"]
        if earlier:
            assert state is not None
            self.born, self.born_now = state["born"], False
            attributes["generator"] = torch.Generator().set_state(state["born"])  # from which the seeds are drawn again
        else:
            source = torch.default_generator if loader.generator is None else loader.generator
            self.born, self.born_now = source.get_state(), True
        slots = AHEAD + 2 + (loader.prefetch_factor or 0)
        self.ring = Ring(self.workers, slots, slot_size(self._roots))
        attributes["collate_fn"] = Recorder(loader.collate_fn, self.ring)
        if phantoms:
            attributes["dataset"] = PassingOver(loader.dataset)
        if phantoms or any(each is not None for each in self.restored):
            attributes["worker_init_fn"] = Starter(loader.worker_init_fn, self.restored, loader.collate_fn)
        return clone

    # ---- state ------------------------------------------------------------------------------------------------------

    @property
    def order_drawn_from(self) -> State | None:
        """See :attr:`ResumableLoader.order_drawn_from`: under ``torch`` the global one, under ``generator`` that of the sampler's own."""
        first = self.indices.first
        if first is None:
            return None
        own = getattr(innermost(self.indices.inner), "generator", None)
        states = [state for generator, state in zip(self._generators(), first["generators"]) if generator is own]
        return {"torch": first["rng"]["torch"], "generator": states[0] if states else None}

    def state(self, cursor: Cursor, batches: int) -> State:
        """The place after some batches of this pass."""
        ahead = cursor.ahead_of(batches)
        return {
            "start": cursor.start,
            "batches": batches,
            "ahead": ahead,
            "before": cursor.states_before(ahead) if self.workers == 0 else None,
            "indices": self.indices.state(batches),
            "generators": states_of(self._generators()),
            "own": own_states(self._roots) if self.workers == 0 else None,
            "workers": self._worker_states(batches, 0.0),
            "born": self.born if self.persistent and not self.born_now else None,
        }

    def state_between(self, at_end: bool) -> State:
        """What the next pass depends on, after this one.

        Args:
            at_end: whether the loop is about to ask for more than there is, which moves a sampler's generator on.
        """
        if at_end:
            self.indices.reach_end()
        return {
            "batches": None,
            "generators": states_of(self._generators()),
            "samplers": sampler_states(self.loader),
            "seed": shuffle_seed(self.loader),
            "own": own_states(self._roots) if self.workers == 0 else None,
            "workers": self._worker_states(self.indices.drawn, WAIT) if self.persistent and self.clone is not None else None,
            "born": self.born if self.persistent else None,
        }

    def load_between(self, state: State) -> None:
        """Take over what :meth:`state_between` returned, but for the workers' part."""
        set_states(self._generators(), state["generators"])
        load_samplers(self.loader, state["samplers"])
        set_shuffle_seed(self.loader, state["seed"])
        if self.workers == 0 and state["own"] is not None:
            restore_own(self._roots, state["own"])

    def describe(self) -> State:
        """What must be the same for the rest to be exact."""
        sampler = self.loader.batch_sampler if self.loader.batch_sampler is not None else self.loader.sampler
        return {
            "samples": sized_len(self.loader.dataset),
            "batch size": self.loader.batch_size,
            "sampler": type(innermost(sampler)).__qualname__,
            "workers": self.workers,
        }

    def _worker_states(self, batches: int, wait: float) -> list[State | None] | None:
        if self.ring is None or not self._in_order:
            return None
        states: list[State | None] = []
        for worker, before in enumerate(self.prepared):
            number = before + self._prepared_by(worker, batches)
            state = self.ring.read(worker, number, wait) if number else self.restored[worker]
            if number and state is None:
                rank_zero_warn(
                    f"The random state of worker {worker} of the loader could not be kept: its dataset's state takes more than "
                    f"{self.ring.size} bytes. Its random numbers will be others after a resume from this checkpoint."
                )
            states.append(state)
        return states

    def _prepared_by(self, worker: int, batches: int) -> int:
        """How many of this pass's batches, up to a number of them, a worker of this process has prepared."""
        return _share(batches, worker, self.workers) - _share(self.began, worker, self.workers)

    def _start(self) -> State:
        return {**_random_states(self._generators()), "samplers": sampler_states(self.loader), "seed": shuffle_seed(self.loader)}

    def _generators(self) -> list[Any]:
        """Those that decide on the order of the samples."""
        return generators_within([self.loader.generator, self.loader.batch_sampler, self.loader.sampler])

    @property
    def keeps_on(self) -> bool:
        """Whether a state between two passes is needed when the next begins: workers that stay go on."""
        return self.persistent

    @property
    def _roots(self) -> list[Any]:
        return [self.loader.dataset, self.loader.collate_fn]

    @property
    def _in_order(self) -> bool:
        return self.workers > 0 and getattr(self.loader, "in_order", True)


def _random_states(generators: list[Any]) -> State:
    return {"rng": collect_rng_states(include_cuda=False), "generators": states_of(generators)}


def warn_of_unkept(ahead: int) -> None:
    """Tell that batches which were fetched before the checkpoint was saved, and not used, may come out differently."""
    rank_zero_warn(
        f"The checkpoint was saved after {ahead} more batches were fetched than used, and the dataset draws random numbers: those of "
        "these batches will be others. Save after a batch, for example in `on_train_batch_end`."
    )


def _share(batches: int, worker: int, workers: int) -> int:
    """How many of the first batches are those of a worker; they go to the workers in turn."""
    return (max(batches - worker, 0) + workers - 1) // workers


def _draws_alike(sampler: Any) -> bool:
    """Whether a sampler's order follows from the random state at its start, whatever else draws numbers meanwhile."""
    return type(innermost(sampler)).__module__ in TORCH
