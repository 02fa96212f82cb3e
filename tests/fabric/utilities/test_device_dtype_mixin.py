"""Modules that know their device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric.utilities.device_dtype_mixin import DeviceDtypeMixin


class Inner(DeviceDtypeMixin):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


class Outer(DeviceDtypeMixin):
    """Holds another one inside a module of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Sequential(nn.ReLU(), Inner())


class Empty(DeviceDtypeMixin):
    pass


CONVERSIONS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "to(dtype)": (lambda m: m.to(torch.float64), torch.float64),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to(dtype=)": (lambda m: m.to(dtype=torch.bfloat16, non_blocking=True), torch.bfloat16),
    "to(tensor)": (lambda m: m.to(torch.ones(1, dtype=torch.float64)), torch.float64),
    "type(dtype)": (lambda m: m.type(torch.float64), torch.float64),
    "type(string)": (lambda m: m.type("torch.DoubleTensor"), torch.float64),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.double().float(), torch.float32),
    "to(memory_format)": (lambda m: m.to(memory_format=torch.channels_last), torch.float32),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_dtype_follows_every_conversion_in_all_submodules_and_parameters(name: str) -> None:
    convert, expected = CONVERSIONS[name]
    module = Outer()
    assert convert(module) is module
    inner: Any = module.sequence[1]
    assert module.dtype is inner.dtype is inner.layer.weight.dtype is expected
    assert module.device == inner.device == torch.device("cpu")


@pytest.mark.parametrize("name", CONVERSIONS)
def test_dtype_is_known_without_any_parameter(name: str) -> None:
    convert, expected = CONVERSIONS[name]
    assert convert(Empty()).dtype is expected


def test_device_follows_a_move_there_and_back() -> None:
    module = Outer().to("meta")
    inner: Any = module.sequence[1]
    assert module.device == inner.device == inner.layer.weight.device == torch.device("meta")
    module.to_empty(device="cpu")
    assert module.device == inner.device == inner.layer.weight.device == torch.device("cpu")
    assert module.cpu().device == torch.device("cpu")


def test_moving_keeps_the_dtype() -> None:
    module = Outer().double().to("meta")
    assert (module.device.type, module.dtype) == ("meta", torch.float64)


def test_converting_a_part_leaves_the_whole_as_it_was() -> None:
    module = Outer()
    module.sequence.double()
    inner: Any = module.sequence[1]
    assert (inner.dtype, module.dtype) == (torch.float64, torch.float32)


def test_a_move_that_fails_is_not_remembered() -> None:
    module = Outer().to("meta")
    with pytest.raises(NotImplementedError):
        module.to("cpu")  # a meta tensor has no data to copy
    assert module.device.type == "meta"


def test_integers_are_refused_as_a_dtype_and_nothing_changes() -> None:
    module = Outer()
    with pytest.raises(TypeError, match="floating point"):
        module.to(torch.int32)
    assert module.dtype is torch.float32


def test_device_and_dtype_start_with_torchs_defaults() -> None:
    with torch.device("meta"):
        assert Inner().device.type == "meta"
    torch.set_default_dtype(torch.float64)
    try:
        assert Inner().dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_neither_can_be_set_by_hand() -> None:
    module = Inner()
    with pytest.raises(RuntimeError, match=r"module\.to\(new_dtype\)"):
        module.dtype = torch.float64
    with pytest.raises(AttributeError):
        module.device = torch.device("cpu")  # type: ignore[misc]


def test_sharing_memory_changes_nothing() -> None:
    module = Outer().share_memory()
    assert (module.device.type, module.dtype) == ("cpu", torch.float32)
