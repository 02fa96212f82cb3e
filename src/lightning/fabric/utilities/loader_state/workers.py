"""The random states of a loader's worker processes, after each batch that they prepared.

A worker is ahead of the batches that were given, so its state now is not the one to keep. It writes its state after each batch into a
ring of slots in shared memory; the main process reads the slot that belongs to the last batch given, and only when somebody saves.
Batches travel as they would without this.
"""

from __future__ import annotations

import copy
import pickle
import random
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from lightning.fabric.utilities.loader_state.indices import Nothing
from lightning.fabric.utilities.loader_state.randomness import generators_within, is_stateful, set_states, states_of
from lightning.fabric.utilities.seed import _without_arrays, set_rng_states

HEADER = struct.Struct("<QQ")  # the number of the state, and its size in bytes
STATE_BYTES = 16 * 1024  # python's, numpy's and torch's take 11 KB
WAIT = 30.0  # seconds for a worker to finish the batches of an epoch that was left


class Skipped:
    """Stands for a batch that was given before the run was interrupted."""


class Ring:
    """The last states of each worker, in shared memory.

    Args:
        workers: how many there are.
        slots: how many states of each to keep.
        size: bytes for one.
    """

    def __init__(self, workers: int, slots: int, size: int) -> None:
        self.slots = slots
        self.size = size
        self.memory = torch.zeros(workers, slots, HEADER.size + size, dtype=torch.uint8).share_memory_()

    def write(self, worker: int, number: int, payload: bytes) -> None:
        """Keep the state of a worker after its batch with this number, from 1; one that is too large is marked as such."""
        slot = self.memory[worker, number % self.slots].numpy().data
        fits = len(payload) <= self.size
        if fits:
            slot[HEADER.size : HEADER.size + len(payload)] = payload
        slot[: HEADER.size] = HEADER.pack(number, len(payload) if fits else 0)

    def read(self, worker: int, number: int, wait: float = 0.0) -> dict[str, Any] | None:
        """The state of a worker after its batch with this number; None if there is none.

        Args:
            worker: which.
            number: of the batch, from 1.
            wait: how many seconds the worker may need until then.
        """
        slot = self.memory[worker, number % self.slots].numpy().data
        deadline = time.monotonic() + wait
        while HEADER.unpack(slot[: HEADER.size])[0] != number:
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.001)
        length = HEADER.unpack(slot[: HEADER.size])[1]
        # Written by our own process, a moment ago.
        return unpacked(bytes(slot[HEADER.size : HEADER.size + length])) if length else None


class Recorder:
    """A ``collate_fn`` that keeps the worker's state after each batch.

    Args:
        collate: the loader's own.
        ring: where the states go.
    """

    def __init__(self, collate: Callable[[Any], Any], ring: Ring) -> None:
        self.collate = collate
        self.ring = ring
        self.number = 0
        self.snapshot: Snapshot | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __call__(self, samples: Any) -> Any:
        if isinstance(samples, (Nothing, Skipped)):
            return Skipped()
        batch = self.collate(samples)
        if self.snapshot is None:
            info: Any = get_worker_info()
            self.worker, self.snapshot = info.id, Snapshot([info.dataset, self.collate])
        self.number += 1
        self.ring.write(self.worker, self.number, self.snapshot.take())
        return batch


class Snapshot:
    """The state of everything random in this process, packed; of what did not change only a comparison is made.

    Args:
        roots: the dataset and the function that collates, which may have generators of their own.
        stateful: what has a state of its own; None for those of the roots that do.
    """

    def __init__(self, roots: Sequence[Any], stateful: list[Any] | None = None) -> None:
        self.generators = generators_within(roots)
        self.stateful = [root for root in roots if is_stateful(root)] if stateful is None else stateful
        self.python: tuple[Any, bytes] | None = None
        self.numpy_raw = b""
        self.numpy_packed: bytes | None = None
        self.numpy_gauss = True
        self.numpy_view = _numpy_memory()

    def take(self) -> bytes:
        """The states now."""
        state = random.getstate()
        if self.python is None or self.python[0] != state:
            self.python = (state, pickle.dumps(state))
        carried = pickle.dumps(_own_states(self.generators, self.stateful)) if self.generators or self.stateful else b""
        return pickle.dumps((torch.get_rng_state().numpy().tobytes(), self.python[1], self._numpy(), carried))

    def _numpy(self) -> bytes | None:
        """numpy takes long to tell its state, so it is asked only when its memory changed."""
        if "numpy.random" not in sys.modules:
            return None
        raw = self.numpy_view() if self.numpy_view is not None else b""
        if self.numpy_packed is None or not raw or raw != self.numpy_raw or self.numpy_gauss:
            import numpy as np

            state: Any = np.random.get_state(legacy=False)
            self.numpy_raw, self.numpy_packed = raw, pickle.dumps(state)
            self.numpy_gauss = bool(state.get("has_gauss", True))  # a number in store is given without a change of the memory
        return self.numpy_packed


def _numpy_memory() -> Callable[[], bytes] | None:
    """A function that copies the memory of numpy's global generator; None if numpy does not tell where that is."""
    if "numpy.random" not in sys.modules:
        return None
    import ctypes

    import numpy as np

    if not hasattr(np.random, "get_bit_generator"):
        return None
    generator = np.random.get_bit_generator()
    if type(generator).__name__ != "MT19937":
        return None
    address = generator.ctypes.state_address
    return lambda: ctypes.string_at(address, 625 * 4)  # 624 words and the place among them


def _own_states(generators: list[Any], stateful: list[Any]) -> tuple[list[Any], list[Any]]:
    return states_of(generators), [each.state_dict() for each in stateful]


def own_states(roots: Sequence[Any]) -> dict[str, Any]:
    """The states of the generators within the dataset and the like, and of these themselves."""
    generators, stateful = _own_states(generators_within(roots), [root for root in roots if is_stateful(root)])
    return {"generators": generators, "stateful": copy.deepcopy(stateful)}


def unpacked(packed: bytes) -> dict[str, Any]:
    """Plain data, in the form of :func:`~lightning.fabric.utilities.seed.collect_rng_states`."""
    torch_bytes, python, numpy, carried = pickle.loads(packed)
    rng: dict[str, Any] = {"torch": torch.frombuffer(bytearray(torch_bytes), dtype=torch.uint8), "python": pickle.loads(python)}
    if numpy is not None:
        rng["numpy"] = _without_arrays(pickle.loads(numpy))
    generators, stateful = pickle.loads(carried) if carried else ([], [])
    return {"rng": rng, "generators": generators, "stateful": stateful}


def slot_size(roots: Sequence[Any]) -> int:
    """The bytes that a state of a worker may take: with room to grow for states of the user's own."""
    generators, stateful = generators_within(roots), [root for root in roots if is_stateful(root)]
    return STATE_BYTES + 4 * len(pickle.dumps(_own_states(generators, stateful))) if generators or stateful else STATE_BYTES


class Starter:
    """A ``worker_init_fn`` that, after the user's own, moves a worker's random generators to where an earlier worker's were.

    Args:
        init: the user's, or None.
        states: for each worker what :meth:`Ring.read` gave; None for one that starts afresh.
        roots: the function that collates.
    """

    def __init__(self, init: Callable[[int], Any] | None, states: Sequence[dict[str, Any] | None], collate: Any) -> None:
        self.init = init
        self.states = states
        self.collate = collate

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        if isinstance(info.dataset, PassingOver):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # frozen; the user's code sees its own
        if self.init is not None:
            self.init(worker)
        state = self.states[worker] if worker < len(self.states) else None
        if state is not None:
            set_rng_states(state["rng"])
            restore_own([info.dataset, self.collate], state)


def restore_own(roots: Sequence[Any], state: dict[str, Any]) -> None:
    """Give the generators within the dataset and the like, and these themselves, their states."""
    set_states(generators_within(roots), state["generators"])
    stateful = [root for root in roots if is_stateful(root)]
    if len(stateful) == len(state["stateful"]):
        for each, own in zip(stateful, state["stateful"]):
            each.load_state_dict(own)


class PassingOver:
    """A dataset that is asked for nothing where a batch was given already.

    Args:
        dataset: the user's, with indices.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: Any) -> Any:
        return Skipped() if isinstance(index, Nothing) else self.dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        if isinstance(indices, Nothing):
            return indices
        several = getattr(self.dataset, "__getitems__", None)
        return several(indices) if several else [self.dataset[index] for index in indices]
