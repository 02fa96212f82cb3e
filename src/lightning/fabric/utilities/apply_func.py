"""Apply a function to every element of a nested batch, and move batches between devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def apply_to_collection(data: Any, dtype: type | tuple[type, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``data`` with ``function(element, *args, **kwargs)`` in place of each element of type ``dtype``.

    Walks mappings, lists, tuples, named tuples and dataclasses, and keeps their types; anything else is left as it is.

    Args:
        data: a nested collection, or a single element.
        dtype: the type, or types, of the elements to replace.
        function: called with each such element, then ``args`` and ``kwargs``.

    Example::

        >>> apply_to_collection({"a": [1, "x"], "b": (2,)}, int, lambda v: v * 10)
        {'a': [10, 'x'], 'b': (20,)}
    """
    if isinstance(data, dtype):
        return function(data, *args, **kwargs)
    if isinstance(data, (str, bytes)):
        return data
    if isinstance(data, Mapping):
        items = {k: apply_to_collection(v, dtype, function, *args, **kwargs) for k, v in data.items()}
        return items if type(data) is dict else rebuild_mapping(data, items)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(apply_to_collection(v, dtype, function, *args, **kwargs) for v in data))
    if isinstance(data, (list, tuple)):
        return type(data)([apply_to_collection(v, dtype, function, *args, **kwargs) for v in data])
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return rebuild_dataclass(
            data,
            {f.name: apply_to_collection(getattr(data, f.name), dtype, function, *args, **kwargs) for f in dataclasses.fields(data)},
        )
    return data


def rebuild_mapping(data: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the type of ``data`` with other values under the same keys."""
    import copy

    if not isinstance(data, MutableMapping):
        return type(data)(items)  # type: ignore[call-arg]
    result: Any = copy.copy(data)  # keeps a default factory and whatever else the type carries
    for key, value in items.items():
        result[key] = value
    return result


def rebuild_dataclass(data: Any, values: dict[str, Any]) -> Any:
    """A shallow copy of a dataclass instance with other field values; frozen ones and ``init=False`` fields included."""
    import copy

    result = copy.copy(data)
    for name, value in values.items():
        object.__setattr__(result, name, value)
    return result


def move_data_to_device(batch: Any, device: torch.device | str | int) -> Any:
    """Return ``batch`` with every tensor in it on ``device``.

    Anything that has a method ``to(device)`` is moved through it: tensors, packed sequences, batch encodings, graphs.
    Copies to a GPU do not block the host; they overlap with it where the tensor lies in pinned memory.

    Args:
        batch: a tensor, or mappings, lists, tuples, named tuples and dataclasses of them, nested as you like.
        device: where to.

    Example::

        >>> move_data_to_device({"x": torch.zeros(2)}, "cpu")["x"].device
        device(type='cpu')
    """
    if not isinstance(device, torch.device):
        device = torch.device(device)
    # The host would read what has not arrived yet if it did not wait for copies to its own memory.
    overlap = device.type not in ("cpu", "mps")
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=overlap)
    kind = type(batch)
    if kind is list or kind is tuple:
        return kind([x.to(device, non_blocking=overlap) if isinstance(x, Tensor) else move_data_to_device(x, device) for x in batch])
    if kind is dict:
        return {
            k: x.to(device, non_blocking=overlap) if isinstance(x, Tensor) else move_data_to_device(x, device) for k, x in batch.items()
        }
    if hasattr(batch, "to") and not isinstance(batch, type):
        moved = batch.to(device)
        return batch if moved is None else moved  # some `to` methods work in place and return nothing
    if isinstance(batch, Mapping):
        return rebuild_mapping(batch, {k: move_data_to_device(v, device) for k, v in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind(*(move_data_to_device(x, device) for x in batch))
    if isinstance(batch, (list, tuple)):
        return kind([move_data_to_device(x, device) for x in batch])
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return rebuild_dataclass(batch, {f.name: move_data_to_device(getattr(batch, f.name), device) for f in dataclasses.fields(batch)})
    return batch


def convert_to_tensors(data: Any, device: torch.device) -> Any:
    """Return ``data`` with numbers, booleans and numpy arrays turned into tensors, and every tensor moved to ``device``."""
    import numpy as np

    data = apply_to_collection(data, (bool, int, float, np.ndarray), torch.as_tensor)
    return apply_to_collection(data, Tensor, lambda t: t.to(device).contiguous())


def convert_tensors_to_scalars(data: Any) -> Any:
    """Return ``data`` with each one-element tensor turned into a Python number.

    Raises:
        ValueError: if a tensor has more than one element.
    """

    def to_scalar(value: Tensor) -> int | float | bool | complex:
        if value.numel() != 1:
            raise ValueError(f"The tensor {value} has {value.numel()} elements; only one-element tensors convert to a number.")
        return value.item()

    return apply_to_collection(data, Tensor, to_scalar)
