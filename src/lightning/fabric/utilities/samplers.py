"""Which samples each process gets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning.fabric.utilities.data import has_iterable_dataset, replace_sampler, sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper, drawn_alike, pass_on_epoch

__all__ = ["UnrepeatedDistributedSampler", "UnrepeatedDistributedSamplerWrapper", "distribute", "needs_distributing", "shared_seed"]


class UnrepeatedDistributedSampler(DistributedSampler[Any]):
    """A DistributedSampler that gives no sample twice and leaves none out, so that processes may get different numbers.

    Args:
        args: those of :class:`~torch.utils.data.DistributedSampler`; ``drop_last`` has no effect.
        kwargs: the same by name.

    Example::

        >>> [list(UnrepeatedDistributedSampler(range(5), num_replicas=2, rank=rank, shuffle=False)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total_size = len(self.dataset)  # type: ignore[arg-type]
        self.num_samples = len(range(self.rank, self.total_size, self.num_replicas))

    def __iter__(self) -> Iterator[Any]:
        if not self.shuffle:
            return iter(range(self.rank, self.total_size, self.num_replicas))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.total_size, generator=generator)[self.rank :: self.num_replicas].tolist())


class UnrepeatedDistributedSamplerWrapper(UnrepeatedDistributedSampler):
    """Gives each process its part of what another sampler gives, with no repetition.

    Random samplers give the same in every process, as in :class:`~lightning.fabric.utilities.distributed.DistributedSamplerWrapper`.

    Args:
        sampler: a sampler with a length, or any other sized iterable of indices.
        args: go to :class:`UnrepeatedDistributedSampler`, after the dataset.
        kwargs: go there too.

    Raises:
        TypeError: if ``sampler`` has no length.

    Example::

        >>> list(UnrepeatedDistributedSamplerWrapper([3, 1, 2], num_replicas=2, rank=1, shuffle=False))
        [1]
    """

    def __init__(self, sampler: Sampler[Any] | Iterable[Any], *args: Any, **kwargs: Any) -> None:
        _require_length(sampler)
        super().__init__(sampler, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        indices = drawn_alike(self.dataset, self.seed + self.epoch)
        return (indices[place] for place in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        pass_on_epoch(self.dataset, epoch)


def distribute(
    dataloader: Any, num_replicas: int, rank: int, *, training: bool, shuffle: bool | None = None, seed: int | None = None
) -> Any:
    """The loader as one of several processes needs it: with a sampler that gives this process its part.

    In training each process gets the same number of samples, for which a few may come twice. In evaluation no sample comes
    twice, so that processes may get different numbers of them. Whatever is no DataLoader with indices, or has a
    distributed sampler already, is returned as it is; custom batch samplers are made anew with their arguments.

    Args:
        dataloader: any loader.
        num_replicas: the number of processes.
        rank: the index of this one.
        training: whether it is for training.
        shuffle: in which order. None: in training at random, unless the loader has a sampler of the user's own, whose order is kept;
            in evaluation in the loader's order.
        seed: from which samples are drawn; None for :func:`shared_seed`.

    Raises:
        TypeError: if the loader has a sampler without a length, or a batch sampler that another sampler can't be put into.

    Example::

        >>> loader = distribute(DataLoader(range(5), batch_size=2), 2, 1, training=False)
        >>> [batch.tolist() for batch in loader]
        [[1, 3]]
    """
    if not needs_distributing(dataloader):
        return dataloader
    sampler = _innermost_sampler(dataloader)
    options: dict[str, Any] = {"num_replicas": num_replicas, "rank": rank, "seed": shared_seed() if seed is None else seed}
    if _takes_every_sample_once(sampler, dataloader.dataset):
        options["shuffle"] = (training or isinstance(sampler, RandomSampler)) if shuffle is None else shuffle
        kind: Any = DistributedSampler if training else UnrepeatedDistributedSampler
        return replace_sampler(dataloader, kind(dataloader.dataset, **options))
    options["shuffle"] = bool(shuffle) and not isinstance(sampler, RandomSampler)
    _require_length(sampler)
    wrapper: Any = DistributedSamplerWrapper if training else UnrepeatedDistributedSamplerWrapper
    return replace_sampler(dataloader, wrapper(sampler, **options))


def shared_seed() -> int:
    """The seed that every process has from ``seed_everything``; 0 where nobody has called it."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def needs_distributing(dataloader: Any) -> bool:
    """Whether every process would get the same samples from this loader.

    Example::

        >>> needs_distributing(DataLoader(range(3))), needs_distributing([1, 2])
        (True, False)
    """
    if not isinstance(dataloader, DataLoader) or has_iterable_dataset(dataloader):
        return False
    return not isinstance(dataloader.sampler, DistributedSampler) and not isinstance(_innermost_sampler(dataloader), DistributedSampler)


def _innermost_sampler(dataloader: Any) -> Any:
    """What decides on the order of samples: below the batch sampler, where that says so."""
    if dataloader.batch_sampler is not None:
        return getattr(dataloader.batch_sampler, "sampler", dataloader.sampler)
    if isinstance(dataloader.sampler, BatchSampler):  # DataLoader(dataset, sampler=BatchSampler(...), batch_size=None)
        return dataloader.sampler.sampler
    return dataloader.sampler


def _takes_every_sample_once(sampler: Any, dataset: Any) -> bool:
    """Whether ``sampler`` is what a DataLoader makes from ``shuffle=True`` or ``shuffle=False``."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == sized_len(sampler.data_source) == sized_len(dataset)
    return type(sampler) is SequentialSampler and sized_len(sampler.data_source) == sized_len(dataset)


def _require_length(sampler: Any) -> None:
    if sized_len(sampler) is None:
        raise TypeError(
            f"The sampler {type(sampler).__name__} has no `__len__`, so its indices can't be shared out among processes. Give it "
            "a length, or choose the samples of each process yourself and pass use_distributed_sampler=False."
        )
