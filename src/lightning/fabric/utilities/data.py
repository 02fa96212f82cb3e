"""What the runtime needs to know of a loader, and loaders with another sampler."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Sized
from functools import partial
from typing import Any, TypeGuard

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import pl_worker_init_function

__all__ = [
    "AttributeDict",
    "has_iterable_dataset",
    "has_len",
    "is_shuffled",
    "replace_batch_sampler",
    "replace_sampler",
    "seed_workers",
    "set_sampler_epoch",
    "sized_len",
    "suggested_max_num_workers",
]


def has_iterable_dataset(dataloader: object) -> bool:
    """Whether ``dataloader`` reads from a :class:`~torch.utils.data.IterableDataset`.

    Example::

        >>> has_iterable_dataset(DataLoader(range(3)))
        False
    """
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def sized_len(dataloader: object) -> int | None:
    """The length of ``dataloader``, or None if it has none.

    Example::

        >>> sized_len([1, 2]), sized_len(iter([1, 2]))
        (2, None)
    """
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def has_len(dataloader: object) -> TypeGuard[Sized]:
    """Whether ``dataloader`` has a length. Warns if that is 0, or may be wrong because several workers read one stream.

    Example::

        >>> has_len(DataLoader(range(3))), has_len(iter([1]))
        (True, False)
    """
    length = sized_len(dataloader)
    if length == 0:
        rank_zero_warn(f"`{type(dataloader).__name__}` has the length 0: it gives no batch. Check that this is what you want.")
    if length is not None:
        warn_of_inexact_length(dataloader)
    return length is not None


def warn_of_inexact_length(dataloader: object) -> None:
    """Warn if ``dataloader`` has a length that its workers multiply, unless each of them reads a part of its own."""
    if has_iterable_dataset(dataloader) and getattr(dataloader, "num_workers", 0) > 1:
        rank_zero_warn(
            "Your `IterableDataset` has `__len__` defined, and several worker processes read it. Each reads all of it, unless "
            "the dataset gives every worker its own part (`torch.utils.data.get_worker_info()`): then data comes twice, and "
            "the length is too small."
        )


def suggested_max_num_workers(local_world_size: int) -> int:
    """How many worker processes a loader can use on this machine: an equal share of the CPUs, less one for the process itself.

    Args:
        local_world_size: how many training processes run on this machine.

    Raises:
        ValueError: if that is less than 1.
    """
    if local_world_size < 1:
        raise ValueError(f"suggested_max_num_workers(local_world_size={local_world_size}): there must be at least one process.")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // local_world_size - 1)


def is_shuffled(dataloader: object) -> bool:
    """Whether ``dataloader`` draws its samples in a random order, as far as its sampler is one of torch's.

    Example::

        >>> is_shuffled(DataLoader(range(3), shuffle=True)), is_shuffled(DataLoader(range(3)))
        (True, False)
    """
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    return isinstance(getattr(dataloader, "sampler", None), RandomSampler) or isinstance(
        getattr(batch_sampler, "sampler", None), RandomSampler
    )


def set_sampler_epoch(dataloader: object, epoch: int) -> None:
    """Call ``set_epoch(epoch)`` on the sampler of ``dataloader``, and on that of its batch sampler, where they have it."""
    sampler = getattr(dataloader, "sampler", None)
    inner = getattr(getattr(dataloader, "batch_sampler", None), "sampler", None)
    for each in (sampler,) if sampler is inner else (sampler, inner):
        set_epoch = getattr(each, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def seed_workers(dataloader: object, rank: int) -> None:
    """Give the workers of ``dataloader`` seeds of their own, if ``seed_everything(workers=True)`` asked for that.

    A loader that has a ``worker_init_fn`` keeps it.

    Args:
        dataloader: the loader; anything but a DataLoader is left alone.
        rank: the global rank of this process.
    """
    wanted = os.environ.get("PL_SEED_WORKERS", "0") == "1"
    if wanted and isinstance(dataloader, DataLoader) and dataloader.worker_init_fn is None:
        dataloader.worker_init_fn = partial(pl_worker_init_function, rank=rank)


def replace_sampler(dataloader: DataLoader[Any], sampler: Sampler[Any] | Iterable[Any]) -> DataLoader[Any]:
    """A loader like ``dataloader`` that draws its samples from ``sampler``.

    It is of the same class and keeps everything else: arguments, attributes that were set later, and the batch sampler,
    which is made anew around ``sampler``. ``dataloader`` itself stays as it is.

    Args:
        dataloader: a DataLoader, or an instance of a subclass with whatever constructor.
        sampler: gives the indices of samples in order.

    Raises:
        MisconfigurationException: if the dataset is iterable, and so has no sampler.
        TypeError: if the loader has a batch sampler that holds no sampler.

    Example::

        >>> loader = replace_sampler(DataLoader(range(5), batch_size=2, shuffle=True), [4, 3, 2, 1, 0])
        >>> [batch.tolist() for batch in loader]
        [[4, 3], [2, 1], [0]]
    """
    if has_iterable_dataset(dataloader):
        raise MisconfigurationException(
            f"replace_sampler: the {type(dataloader).__name__} reads from an IterableDataset "
            f"({type(dataloader.dataset).__name__}), which decides itself what comes next; only loaders of datasets with indices "
            "have a sampler."
        )
    if dataloader.batch_sampler is not None:
        return _copy_loader(dataloader, sampler, _rebuild_batch_sampler(dataloader.batch_sampler, sampler))
    if isinstance(dataloader.sampler, BatchSampler):  # DataLoader(dataset, sampler=BatchSampler(...), batch_size=None)
        sampler = _rebuild_batch_sampler(dataloader.sampler, sampler)
    return _copy_loader(dataloader, sampler, None)


def replace_batch_sampler(dataloader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A loader like ``dataloader`` that draws its batches from ``batch_sampler``, and keeps everything else.

    Args:
        dataloader: a DataLoader, or an instance of a subclass, that makes batches.
        batch_sampler: gives a list of indices of samples for each batch.

    Example::

        >>> loader = replace_batch_sampler(DataLoader(range(5), batch_size=2), [[0, 4], [2]])
        >>> [batch.tolist() for batch in loader]
        [[0, 4], [2]]
    """
    return _copy_loader(dataloader, getattr(batch_sampler, "sampler", dataloader.sampler), batch_sampler)


def _copy_loader(dataloader: DataLoader[Any], sampler: Any, batch_sampler: Any) -> DataLoader[Any]:
    # A copy instead of a second construction: it holds for any constructor, and for attributes that were set afterwards.
    # A DataLoader refuses to change these attributes through `setattr`, since that can't work while it iterates.
    clone = copy.copy(dataloader)
    replaced = {id(dataloader.sampler): sampler, id(dataloader.batch_sampler): batch_sampler}
    attributes = vars(clone)
    for name, value in attributes.items():
        if value is not None and id(value) in replaced:  # wherever a subclass keeps a second reference
            attributes[name] = replaced[id(value)]
    attributes.update(sampler=sampler, batch_sampler=batch_sampler, _iterator=None)
    return clone


def _rebuild_batch_sampler(batch_sampler: Any, sampler: Any) -> Any:
    """A batch sampler like ``batch_sampler`` around ``sampler``."""
    kind = type(batch_sampler)
    if kind is BatchSampler:
        return BatchSampler(sampler, batch_sampler.batch_size, batch_sampler.drop_last)
    if not all(hasattr(batch_sampler, name) for name in ("sampler", "batch_size", "drop_last")):
        raise TypeError(
            f"replace_sampler: the batch sampler {kind.__name__} has no attributes `sampler`, `batch_size` and `drop_last`, so "
            "another sampler can't be put into it. Derive it from torch.utils.data.BatchSampler, or choose the samples of each "
            "process yourself and pass use_distributed_sampler=False."
        )
    parameters = inspect.signature(kind).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = vars(batch_sampler)
    if "sampler" in parameters and all(p.kind in by_name and p.name in known for p in parameters.values()):
        # Its constructor may derive more from the sampler than a reference to it, such as a list of batches.
        return kind(**{**{name: known[name] for name in parameters}, "sampler": sampler})
    clone = copy.copy(batch_sampler)
    attributes = vars(clone)
    for name, value in attributes.items():
        if value is batch_sampler.sampler:
            attributes[name] = sampler
    return clone


class AttributeDict(dict[str, Any]):
    """A dict whose items are attributes too.

    Its representation has a line for each item, in the order of the keys.

    Example::

        >>> settings = AttributeDict(lr=0.1, layers=2)
        >>> settings.lr = 0.2
        >>> settings
        "layers": 2
        "lr":     0.2
    """

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{key}'") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        del self[key]

    def __repr__(self) -> str:
        names = {key: f'"{key}":' for key in sorted(self, key=str)}
        width = max(map(len, names.values()), default=0)
        return "\n".join(f"{name:<{width}} {self[key]}" for key, name in names.items())
