"""Batches in parts: how a batch is cut, and how what its parts gave becomes what the whole would have given."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning.fabric.utilities.apply_func import rebuild_dataclass, rebuild_mapping

PLAIN = (str, bytes, Number, Path, type(None), torch.dtype, torch.device)


class CannotBeSplitError(Exception):
    """Why a batch cannot be cut into parts."""


def plan(batch: Any) -> tuple[int, Callable[[int, int], Any]]:
    """The number of samples in a batch, and a function that gives the part from one sample up to another.

    Tensors and arrays are cut along their first dimension; lists and tuples of anything else where they are as long as
    that. Where tensors differ in length, a collection of lists that are all of one length is cut there.

    Raises:
        CannotBeSplitError: if there is no such length, or something that nobody knows how to cut.

    Example::

        >>> size, part = plan({"x": torch.arange(4), "names": ["a", "b", "c", "d"], "scale": 2.0})
        >>> size, part(2, 4)
        (4, {'x': tensor([2, 3]), 'names': ['c', 'd'], 'scale': 2.0})
    """
    lengths = set(_lengths(batch))
    if len(lengths) == 1:
        size = lengths.pop()
        return size, lambda start, stop: _cut(batch, size, start, stop)
    if not lengths:
        raise CannotBeSplitError(f"the batch, a {type(batch).__name__}, holds no tensors")
    rows = list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, (list, tuple)) else []
    if rows and all(isinstance(row, (list, tuple)) for row in rows) and len({len(row) for row in rows}) == 1:
        return len(rows[0]), lambda start, stop: _rebuilt(batch, [row[start:stop] for row in rows])
    raise CannotBeSplitError(f"the tensors of the batch have different lengths: {sorted(lengths)}")


def bounds(size: int, largest: float) -> list[tuple[int, int]]:
    """Where to cut so many samples into the fewest parts of at most ``largest``, all about as large."""
    count = 1 if largest >= size else -(-size // int(largest))
    return [(size * index // count, size * (index + 1) // count) for index in range(count)]


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _children(data: Any) -> list[Any] | None:
    """What a collection holds; None if it is none."""
    if isinstance(data, Mapping):
        return list(data.values())
    if isinstance(data, PackedSequence):
        raise CannotBeSplitError("the batch holds a packed sequence")
    if isinstance(data, (list, tuple)):
        return list(data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return [getattr(data, field.name) for field in dataclasses.fields(data)]
    return None


def _lengths(data: Any) -> Iterator[int]:
    """The first dimension of each tensor and array."""
    if isinstance(data, Tensor) or _is_array(data):
        if isinstance(data, Tensor) and data.layout is not torch.strided:
            raise CannotBeSplitError(f"the batch holds a tensor of the layout {data.layout}")
        if data.ndim:
            yield data.shape[0]
        return
    children = _children(data)
    if children is None and not isinstance(data, PLAIN):
        raise CannotBeSplitError(f"the batch holds a {type(data).__name__}")
    for child in children or ():
        yield from _lengths(child)


def _cut(data: Any, size: int, start: int, stop: int) -> Any:
    if isinstance(data, Tensor) or _is_array(data):
        return data[start:stop] if data.ndim else data
    children = _children(data)
    if children is None:
        return data
    if isinstance(data, (list, tuple)) and not hasattr(data, "_fields") and len(data) == size and not any(_lengths(data)):
        return data[start:stop]
    return _rebuilt(data, [_cut(child, size, start, stop) for child in children])


def _rebuilt(data: Any, children: list[Any]) -> Any:
    """A collection of the type of ``data`` that holds others."""
    if isinstance(data, Mapping):
        items = dict(zip(data, children))
        return items if type(data) is dict else rebuild_mapping(data, items)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*children)
    if isinstance(data, (list, tuple)):
        return type(data)(children)
    return rebuild_dataclass(data, {field.name: child for field, child in zip(dataclasses.fields(data), children)})


# ---- together again --------------------------------------------------------------------------------------------------


def merged(values: list[Any], sizes: list[int]) -> Any:
    """What ``training_step`` returned for parts of these sizes as for the whole: means of numbers, and samples in one tensor.

    Example::

        >>> merged([{"loss": torch.tensor(1.0), "y": torch.zeros(1)}, {"loss": torch.tensor(4.0), "y": torch.ones(2)}], [1, 2])
        {'loss': tensor(3.), 'y': tensor([0., 1., 1.])}
    """
    first = values[0]
    if len(values) == 1:
        return first
    if all(isinstance(value, Tensor) for value in values):
        if all(value.ndim == 0 for value in values):
            return mean(values, sizes) if first.is_floating_point() else torch.stack(values)
        if all(value.ndim and value.shape[0] == size for value, size in zip(values, sizes)):
            return torch.cat(values)
    if all(isinstance(value, Mapping) and value.keys() == first.keys() for value in values):
        return {key: merged([value[key] for value in values], sizes) for key in first}
    if all(isinstance(value, list) and len(value) == size for value, size in zip(values, sizes)):
        return [item for value in values for item in value]
    return values


def mean(values: list[Any], weights: list[int]) -> Any:
    """The weighted mean of numbers or tensors."""
    total = sum(weights)
    return sum(value * (weight / total) for value, weight in zip(values, weights))
