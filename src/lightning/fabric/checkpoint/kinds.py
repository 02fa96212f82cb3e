"""Values beyond torch's plain types that a checkpoint can hold: how each is written as plain data, and read back.

A :class:`Kind` turns a value into ``(details, content)`` and back. ``details`` is plain data and is stored as it is;
``content`` may hold any values and is encoded in turn. Reading runs nothing that the file names.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import math
import pathlib
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lightning.fabric.checkpoint.classes import CannotBuild

MAX_INT_BITS = 2000  # torch's safe reader knows integers of up to 255 bytes


class Kind(NamedTuple):
    """How one kind of value is written and read."""

    name: str
    write: Callable[[Any], tuple[dict[str, Any], Any]]
    read: Callable[[dict[str, Any], Any], Any]


# --- the standard library -------------------------------------------------------------------------------------------

PATHS = (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
FACTORIES = {kind.__name__: kind for kind in (list, dict, set, int, float, str, bool, tuple, collections.OrderedDict, collections.Counter)}


def write_path(path: pathlib.PurePath) -> tuple[dict[str, Any], Any]:
    return {"flavour": type(path).__name__}, str(path)


def read_path(details: dict[str, Any], content: Any) -> pathlib.PurePath:
    flavour = details["flavour"]
    if flavour == type(pathlib.Path()).__name__:
        return pathlib.Path(content)
    if flavour == "PurePosixPath":
        return pathlib.PurePosixPath(content)
    if flavour == "PureWindowsPath":
        return pathlib.PureWindowsPath(content)
    # a real path of the other operating system: the same path as this one spells it
    return pathlib.Path(pathlib.PureWindowsPath(content).as_posix() if flavour == "WindowsPath" else content)


def write_datetime(value: datetime.datetime) -> tuple[dict[str, Any], Any]:
    fields = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return {"fields": fields, "fold": value.fold}, value.tzinfo


def write_time(value: datetime.time) -> tuple[dict[str, Any], Any]:
    return {"fields": [value.hour, value.minute, value.second, value.microsecond], "fold": value.fold}, value.tzinfo


def read_zone(details: dict[str, Any], content: Any) -> datetime.tzinfo:
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(content)
    except zoneinfo.ZoneInfoNotFoundError:
        raise CannotBuild(f"this machine does not know the time zone {content}") from None


def write_defaultdict(value: collections.defaultdict[Any, Any]) -> tuple[dict[str, Any], Any]:
    factory = value.default_factory
    if factory is not None and FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        raise CannotBuild(f"a defaultdict may have one of these factories: {', '.join(FACTORIES)}, None; this one has {factory!r}")
    return {"factory": None if factory is None else factory.__name__}, dict(value)


def plain(name: str, write: Callable[[Any], Any], read: Callable[[Any], Any]) -> Kind:
    """A kind without details."""
    return Kind(name, lambda value: ({}, write(value)), lambda details, content: read(content))


def attribute_dict(content: Any) -> Any:
    from lightning.fabric.utilities.data import AttributeDict

    return AttributeDict(content)


def listed(content: Any) -> list[Any]:
    """The content, which must be a list: to go through a range or a text that a file has put there could take for ever."""
    if type(content) is not list:
        raise ValueError(f"a {type(content).__name__} in the place of a list")
    return content


def read_fraction(content: Any) -> fractions.Fraction:
    if [type(part) for part in listed(content)] != [int, int]:  # from a text, powers of ten would be computed
        raise ValueError("a fraction is two integers")
    return fractions.Fraction(*content)


STANDARD: dict[type, Kind] = {
    **dict.fromkeys(PATHS, Kind("path", write_path, read_path)),
    int: plain("int", hex, lambda text: int(text, 16)),
    bytes: plain("bytes", list, lambda c: bytes(listed(c))),
    frozenset: plain("frozenset", list, lambda c: frozenset(listed(c))),
    collections.deque: Kind("deque", lambda v: ({"maxlen": v.maxlen}, list(v)), lambda d, c: collections.deque(listed(c), d["maxlen"])),
    collections.defaultdict: Kind(
        "defaultdict",
        write_defaultdict,
        lambda d, c: collections.defaultdict(None if d["factory"] is None else FACTORIES[d["factory"]], c),
    ),
    range: plain("range", lambda v: [v.start, v.stop, v.step], lambda c: range(*c)),
    slice: plain("slice", lambda v: [v.start, v.stop, v.step], lambda c: slice(*c)),
    type(...): plain("ellipsis", lambda v: None, lambda c: ...),
    decimal.Decimal: plain("decimal", str, decimal.Decimal),
    fractions.Fraction: plain("fraction", lambda v: [v.numerator, v.denominator], read_fraction),
    uuid.UUID: plain("uuid", str, uuid.UUID),
    argparse.Namespace: plain("argparse.Namespace", lambda v: dict(vars(v)), lambda c: argparse.Namespace(**c)),
    types.SimpleNamespace: plain("types.SimpleNamespace", lambda v: dict(vars(v)), lambda c: types.SimpleNamespace(**c)),
    datetime.datetime: Kind("datetime", write_datetime, lambda d, c: datetime.datetime(*d["fields"]).replace(tzinfo=c, fold=d["fold"])),
    datetime.date: plain("date", lambda v: [v.year, v.month, v.day], lambda c: datetime.date(*c)),
    datetime.time: Kind("time", write_time, lambda d, c: datetime.time(*d["fields"]).replace(tzinfo=c, fold=d["fold"])),
    datetime.timedelta: plain("timedelta", lambda v: [v.days, v.seconds, v.microseconds], lambda c: datetime.timedelta(*c)),
    datetime.timezone: plain("timezone", lambda v: [v.utcoffset(None), v.tzname(None)], lambda c: datetime.timezone(*c)),
}
ZONE = plain("zoneinfo", lambda v: v.key, lambda c: read_zone({}, c))
ATTRIBUTE_DICT = plain("AttributeDict", dict, attribute_dict)


# --- torch ----------------------------------------------------------------------------------------------------------

MEMORY_FORMATS = {name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")}


def on_cpu(data: torch.Tensor) -> torch.Tensor:
    """Data that is no model's tensor, and that ``map_location`` may have taken along."""
    if data.is_meta:
        raise CannotBuild("its data went to the meta device: load with another map_location")
    return data.cpu()


def read_generator(details: dict[str, Any], content: Any) -> torch.Generator:
    try:
        generator = torch.Generator(device=details["device"])
    except RuntimeError as error:
        raise CannotBuild(f"this machine has no device {details['device']} for a random generator ({error})") from None
    return generator.set_state(on_cpu(content))


def write_tensor(tensor: torch.Tensor) -> tuple[dict[str, Any], Any]:
    """A tensor with Python attributes of its own, some of which torch would refuse."""
    bare: torch.Tensor = tensor.detach()
    if isinstance(tensor, torch.nn.Parameter):
        bare = torch.nn.Parameter(bare, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad:
        bare.requires_grad_()
    return {}, [bare, dict(vars(tensor))]


def read_tensor(content: Any) -> torch.Tensor:
    tensor, attributes = content
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"a {type(tensor).__name__} in the place of a tensor")
    vars(tensor).update(attributes)
    return tensor


GENERATOR = Kind("torch.Generator", lambda v: ({"device": str(v.device)}, v.get_state()), read_generator)
MEMORY_FORMAT = plain("torch.memory_format", lambda v: str(v).removeprefix("torch."), lambda c: MEMORY_FORMATS[c])
TENSOR = Kind("tensor", write_tensor, lambda details, content: read_tensor(content))


# --- numpy ----------------------------------------------------------------------------------------------------------


def write_array(array: Any) -> tuple[dict[str, Any], Any]:
    """An array (or scalar) as the bytes of its elements in C order; arrays of objects as a list."""
    import numpy as np

    array = np.asarray(array)
    details = {"shape": list(array.shape), "dtype": write_dtype(array.dtype)}
    if array.dtype.hasobject:
        if array.dtype.str != "|O":
            raise CannotBuild(f"arrays of dtype {array.dtype} mix objects and numbers")
        return details, array.ravel().tolist()
    if array.nbytes == 0:
        return details, torch.empty(0, dtype=torch.uint8)
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    return details, torch.from_numpy(array.reshape(-1).view(np.uint8))


def read_array(details: dict[str, Any], content: Any) -> Any:
    import numpy as np

    dtype, shape = read_dtype(details["dtype"]), tuple(details["shape"])
    if isinstance(content, torch.Tensor) and not dtype.hasobject:
        if content.numel() == 0 and math.prod(shape) * dtype.itemsize:
            raise ValueError("no elements for the shape")  # np.empty would show what lies in memory
        return on_cpu(content).numpy().view(dtype).reshape(shape) if content.numel() else np.empty(shape, dtype)
    if dtype.str != "|O" or type(content) is not list:
        raise ValueError("elements and dtype do not fit together")
    array = np.empty(len(content), object)
    for i, value in enumerate(content):
        array[i] = value
    return array.reshape(shape)


def write_dtype(dtype: Any) -> Any:
    import numpy as np

    if dtype.metadata is not None:
        raise CannotBuild("a dtype with metadata can't be written as plain data")
    description = np.lib.format.dtype_to_descr(dtype)
    if np.lib.format.descr_to_dtype(description) != dtype:
        raise CannotBuild(f"the dtype {dtype} is not one of numpy's own")
    return description


def read_dtype(description: Any) -> Any:
    import numpy as np

    return np.lib.format.descr_to_dtype(description)


ARRAY = Kind("numpy.ndarray", write_array, read_array)
SCALAR = Kind("numpy.generic", write_array, lambda details, content: read_array(details, content)[()])
DTYPE = Kind("numpy.dtype", lambda v: ({"dtype": write_dtype(v)}, None), lambda details, content: read_dtype(details["dtype"]))


def special_kind(value: Any, cls: type) -> Kind | None:
    """The kind of a value that is known by more than its exact type."""
    if isinstance(value, torch.Generator):
        return GENERATOR
    if isinstance(value, torch.memory_format):
        return MEMORY_FORMAT
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if cls is numpy.ndarray:
            return ARRAY
        if isinstance(value, numpy.generic):
            return SCALAR
        if isinstance(value, numpy.dtype):
            return DTYPE
    if (zoneinfo := sys.modules.get("zoneinfo")) is not None and cls is zoneinfo.ZoneInfo and value.key is not None:
        return ZONE
    if (data := sys.modules.get("lightning.fabric.utilities.data")) is not None and cls is data.AttributeDict:
        return ATTRIBUTE_DICT
    if (omegaconf := sys.modules.get("omegaconf")) is not None and cls in (omegaconf.DictConfig, omegaconf.ListConfig):
        from lightning.fabric.checkpoint.omega import OMEGACONF

        return OMEGACONF
    return None


def kind_named(name: str) -> Kind | None:
    """The kind that a file calls ``name``."""
    if name == "omegaconf":
        from lightning.fabric.checkpoint.omega import OMEGACONF

        return OMEGACONF
    return KINDS.get(name)


KINDS = {kind.name: kind for kind in (*STANDARD.values(), ZONE, ATTRIBUTE_DICT, GENERATOR, MEMORY_FORMAT, TENSOR, ARRAY, SCALAR, DTYPE)}
