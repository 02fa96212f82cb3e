"""Where in its data an epoch is, in samples: what lets another number of processes take the rest of it, each sample once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning.fabric.utilities.data import has_iterable_dataset, replace_sampler, sized_len
from lightning.fabric.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch.data import TrainLoader

Position = dict[str, Any]


def describe(loader: TrainLoader, batches: int, replicas: int) -> Position:
    """Where an epoch is, as plain data and tensors; its ``order`` is None where that can't be said in samples.

    Args:
        loader: of this process, which has given some batches of the epoch.
        batches: how many.
        replicas: how many processes share the data.
    """
    plain = loader.combined.flattened[0]
    if loader.rest_from is not None:
        saved, used = loader.rest_from, batches - loader.done
        return {**saved, "samples": saved["samples"] + used * plain.batch_size * replicas, "replicas": replicas, "rest": True}
    order = _order(loader, plain, replicas) if len(loader.combined.flattened) == 1 else None
    if order is None:
        return {"replicas": replicas, "order": None}
    return {"samples": batches * plain.batch_size * replicas, "replicas": replicas, "length": sized_len(plain.dataset), "order": order}


def _order(loader: TrainLoader, plain: Any, replicas: int) -> dict[str, Any] | None:
    """In which order the samples come, where that follows from a few numbers."""
    if _batch_size(plain) is None:
        return None
    sampler = plain.sampler
    if type(sampler) is DistributedSampler:
        return {"shuffle": sampler.shuffle, "seed": sampler.seed} if sampler.num_replicas == replicas else None
    if replicas > 1:  # the user's own way to share the samples
        return None
    if type(sampler) is SequentialSampler:
        return {"shuffle": False}
    drawn_from = loader.parts[0].order_drawn_from if type(sampler) is RandomSampler else None
    if drawn_from is None:
        return None
    return {"shuffle": True, "drawn_from": drawn_from, "replacement": sampler.replacement, "num_samples": sampler._num_samples}


def rest_of(loader: TrainLoader, saved: Position, epoch: int, replicas: int, rank: int) -> tuple[TrainLoader, int] | None:
    """The loader for the rest of an epoch that another number of processes has begun.

    Args:
        loader: of this process, for whole epochs.
        saved: from :func:`describe`, in the run that began the epoch.
        epoch: which one.
        replicas: how many processes share the data now.
        rank: which of them this one is.

    Returns:
        a loader that gives nothing for the batches that are done, and the number of these, in batches of this run; None if the
        order of the samples can't be told.
    """
    plain = loader.combined.flattened[0]
    if len(loader.combined.flattened) > 1 or _batch_size(plain) is None or saved["order"] is None:
        rank_zero_warn(
            f"The checkpoint was saved by {saved['replicas']} processes and is gone on from by {replicas}, and which samples are left of "
            "its epoch can't be told from this loader and sampler: the epoch begins anew, so that some samples come twice. Save at the "
            "ends of epochs, or use a DataLoader with torch's sampler."
        )
        return None
    length = sized_len(plain.dataset)
    if length != saved["length"]:
        rank_zero_warn(f"The checkpoint was saved with {saved['length']} training samples, and there are {length} now.")
    indices = _indices(saved["order"], int(length or 0), epoch)[saved["samples"] :]
    share = -(-len(indices) // replicas)
    # A process whose part is one sample short takes one of the others' where it would else have one batch fewer than they.
    size = _batch_size(plain) or 1
    mine = indices[rank::replicas]
    if len(mine) < share and -(-len(mine) // size) < -(-share // size):
        mine = mine + indices[:1]
    done = saved["samples"] // (size * replicas)
    return type(loader).continued(replace_sampler(plain, mine), done, saved), done


def _batch_size(loader: Any) -> int | None:
    known = isinstance(loader, DataLoader) and not has_iterable_dataset(loader) and type(loader.batch_sampler) is BatchSampler
    return loader.batch_size if known else None  # None as well where the user made the batch sampler


def _indices(order: dict[str, Any], length: int, epoch: int) -> list[int]:
    """All samples of an epoch in their order: drawn again, or that of torch's DistributedSampler, where they are shuffled."""
    if not order["shuffle"]:
        return list(range(length))
    if "drawn_from" in order:
        return _drawn_again(order, length)
    return torch.randperm(length, generator=torch.Generator().manual_seed(order["seed"] + epoch)).tolist()


def _drawn_again(order: dict[str, Any], length: int) -> list[int]:
    state = order["drawn_from"]
    generator = None if state["generator"] is None else torch.Generator().set_state(state["generator"])
    with torch.random.fork_rng(devices=()):
        torch.set_rng_state(state["torch"])
        return list(RandomSampler(range(length), order["replacement"], order["num_samples"], generator))


class Continued:
    """A loader whose first batches are done.

    Args:
        loader: gives the others.
        done: how many are done; None stands in the place of each.
    """

    def __init__(self, loader: Any, done: int) -> None:
        self.loader = loader
        self.done = done

    def __iter__(self) -> Iterator[Any]:
        return chain(repeat(None, self.done), self.loader)

    def __len__(self) -> int:
        return self.done + len(self.loader)
