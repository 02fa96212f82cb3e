"""What the trainer reads off batches and loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning.fabric.utilities.data import has_iterable_dataset, has_len, is_shuffled, sized_len, warn_of_inexact_length
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["extract_batch_size", "has_iterable_dataset", "has_len", "has_len_all_ranks", "is_shuffled", "sized_len"]

_warned_of: set[int] = set()


def extract_batch_size(batch: Any) -> int:
    """The number of samples in ``batch``: the length of the first dimension of the tensors in it.

    Mappings, sequences and other iterables, and dataclasses are searched, nested as you like. A tensor without
    dimensions counts as one sample, a packed sequence as many as it packs; strings and numbers do not count. Where
    tensors differ the first one counts, with one warning for each such size.

    Raises:
        MisconfigurationException: if there is no tensor in ``batch``.

    Example::

        >>> extract_batch_size({"image": torch.zeros(8, 3, 4, 4), "label": torch.zeros(8), "name": "train"})
        8
    """
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else 1
    found: int | None = None
    for size in _batch_sizes(batch):
        if found is None:
            found = size
        elif size != found:
            _warn_of_ambiguity(found)
            break
    if found is None:
        raise MisconfigurationException(
            f"The batch size can't be inferred: there is no tensor in this batch of type {type(batch).__name__}. Tell the size with "
            "`self.log(..., batch_size=batch_size)`, or put tensors into the batch."
        )
    return found


def _batch_sizes(data: Any) -> Iterator[int]:
    """The size that each tensor in ``data`` suggests."""
    if isinstance(data, PackedSequence):
        yield int(data.batch_sizes[0])  # lies on the CPU always
        return
    if isinstance(data, Mapping):
        data = data.values()
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = [getattr(data, field.name) for field in dataclasses.fields(data)]
    elif isinstance(data, (str, bytes, Iterator)) or hasattr(data, "__array__") or not isinstance(data, Iterable):
        return  # an iterator would be used up by looking, a numpy array holds numbers only
    for element in data:
        if isinstance(element, Tensor):
            yield element.size(0) if element.ndim else 1
        elif not isinstance(element, (str, bytes, int, float)):
            yield from _batch_sizes(element)


def _warn_of_ambiguity(size: int) -> None:
    if size not in _warned_of:
        _warned_of.add(size)
        rank_zero_warn(
            f"The batch holds tensors of several first dimensions; its size is taken to be that of the first one, {size}. If that "
            "is wrong the means of logged values are: tell the size with `self.log(..., batch_size=batch_size)`."
        )


def has_len_all_ranks(
    dataloader: object, strategy: Strategy, allow_zero_length_dataloader_with_multiple_devices: bool = False
) -> TypeGuard[Sized]:
    """Whether ``dataloader`` has a length, and on every rank one above 0.

    Warns if the lengths of all ranks are 0, and if the length may be wrong because several workers read one stream.

    Args:
        dataloader: the loader of this rank.
        strategy: knows the other ranks.
        allow_zero_length_dataloader_with_multiple_devices: whether a rank may have no data while others have: a warning then,
            otherwise an error.

    Raises:
        RuntimeError: if this rank has no data while others have, and that is not allowed.
    """
    length = sized_len(dataloader)
    if length is None:
        return False
    name = type(dataloader).__name__
    total = strategy.reduce(torch.tensor(length, device=strategy.root_device), reduce_op="sum")
    if total == 0:
        rank_zero_warn(f"`{name}` has the length 0 on every rank: it gives no batch. Check that this is what you want.")
    elif length == 0 and allow_zero_length_dataloader_with_multiple_devices:
        rank_zero_warn(f"`{name}` has the length 0 on this rank and not on others: ranks that wait for each other may hang.")
    elif length == 0:
        raise RuntimeError(
            f"`{name}` has the length 0 on this rank and {int(total)} on the others together; each rank needs a batch at least. "
            "Set `allow_zero_length_dataloader_with_multiple_devices = True` on the module or datamodule to go on all the same."
        )
    warn_of_inexact_length(dataloader)
    return True
