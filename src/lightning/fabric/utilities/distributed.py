"""Share a sampler among processes, and find out whether they share a disk."""

from __future__ import annotations

import random
import sys
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DistributedSampler, Sampler

from lightning.fabric.utilities.cloud_io import local_path
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states

if TYPE_CHECKING:
    from lightning.fabric.strategies import Strategy

__all__ = ["DistributedSamplerWrapper", "is_shared_filesystem"]


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Gives each process its part of what another sampler gives.

    The other sampler gives the same in every process: where it draws from the random generators of Python, numpy or torch,
    it finds them seeded with ``seed`` plus the epoch, and they are afterwards as they were. A generator of its own must be
    seeded alike everywhere.

    Args:
        sampler: a sampler with a length, or any other sized iterable of indices.
        args: go to :class:`~torch.utils.data.DistributedSampler`, after the dataset.
        kwargs: go there too: ``num_replicas``, ``rank``, ``shuffle``, ``seed``, ``drop_last``.

    Raises:
        TypeError: if ``sampler`` has no length.

    Example::

        >>> list(DistributedSamplerWrapper([3, 1, 2, 0], num_replicas=2, rank=1, shuffle=False))
        [1, 0]
    """

    def __init__(self, sampler: Sampler[Any] | Iterable[Any], *args: Any, **kwargs: Any) -> None:
        if sized_len(sampler) is None:
            raise TypeError(
                f"The sampler {type(sampler).__name__} has no `__len__`, so its indices can't be shared out among processes. Give it "
                "a length, or choose the samples of each process yourself and pass use_distributed_sampler=False."
            )
        super().__init__(sampler, *args, **kwargs)  # type: ignore[arg-type]  # it asks for the length alone

    def __iter__(self) -> Iterator[Any]:
        indices = drawn_alike(self.dataset, self.seed + self.epoch)
        return (indices[place] for place in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        pass_on_epoch(self.dataset, epoch)


def drawn_alike(sampler: Any, seed: int) -> list[Any]:
    """What ``sampler`` gives, the same in every process that passes the same seed."""
    with seeded_alike(seed):
        return list(sampler)


@contextmanager
def seeded_alike(seed: int) -> Generator[None, None, None]:
    """A context in which the host's random generators start from ``seed``; those of devices are left alone."""
    states = collect_rng_states(include_cuda=False)
    random.seed(seed)
    torch.random.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the devices too
    if "numpy" in states:
        sys.modules["numpy"].random.seed(seed % 2**32)
    try:
        yield
    finally:
        set_rng_states(states)


def pass_on_epoch(sampler: Any, epoch: int) -> None:
    """Tell a wrapped sampler the epoch, if it wants to know."""
    set_epoch = getattr(sampler, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)


def _distributed_is_initialized() -> bool:
    """Whether this process belongs to a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_shared_filesystem(strategy: Strategy, path: str | Path | None = None, timeout: int = 3) -> bool:
    """Whether all processes see the same files under ``path``: rank 0 writes one there, and the others look for it.

    All processes must call it. A URL is shared, and so is any path with one process.

    Args:
        strategy: knows the other processes.
        path: an existing folder, or a file in it; None for the working directory. Must be the same everywhere.
        timeout: how many seconds the others wait for the file to show up.

    Raises:
        FileNotFoundError: if there is no such path on one of the machines.
    """
    local = local_path("." if path is None else path)
    if strategy.world_size == 1 or local is None:
        return True
    here = Path(local).absolute()
    if not strategy.reduce_boolean_decision(strategy.broadcast(here) == here, all=True):
        return False
    if not strategy.reduce_boolean_decision(here.exists(), all=True):
        raise FileNotFoundError(
            f"is_shared_filesystem(path={str(path)!r}): the path does not exist on every machine, so there is nothing to compare."
        )
    folder = here if here.is_dir() else here.parent
    probe = folder / strategy.broadcast(f".shared-{uuid.uuid4().hex}")
    if strategy.is_global_zero:
        probe.touch()
    strategy.barrier()
    try:
        return strategy.reduce_boolean_decision(_appears(probe, timeout), all=True)
    finally:
        if strategy.is_global_zero:
            with suppress(OSError):
                probe.unlink()


def _appears(path: Path, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(min(0.1, timeout))
    return True
