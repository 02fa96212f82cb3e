"""Functions on nested batches, and their way to a device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning.fabric.utilities.apply_func import (
    apply_to_collection,
    convert_tensors_to_scalars,
    convert_to_tensors,
    move_data_to_device,
)

Pair = namedtuple("Pair", "first second")


class MyList(list[Any]):
    pass


@dataclasses.dataclass
class Batch:
    x: Tensor
    name: str = "n"
    total: int = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(frozen=True)
class FrozenBatch:
    x: Tensor
    more: list[Tensor]


def negate(value: Any) -> Any:
    return -value


# ---- apply_to_collection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (1, -1),
        ("1", "1"),
        (b"1", b"1"),
        (None, None),
        ([1, "x", None], [-1, "x", None]),
        ((1, (2, [3])), (-1, (-2, [-3]))),
        ({"a": 1, 2: {"b": 3}}, {"a": -1, 2: {"b": -3}}),
        (Pair(1, "x"), Pair(-1, "x")),
        (OrderedDict(b=1, a=2), OrderedDict(b=-1, a=-2)),
        (MyList([1]), MyList([-1])),
        (MappingProxyType({"a": 1}), MappingProxyType({"a": -1})),
        ({1, 2}, {1, 2}),
        ([], []),
        ({}, {}),
    ],
)
def test_elements_of_the_type_are_replaced_and_collections_keep_theirs(data: Any, expected: Any) -> None:
    result = apply_to_collection(data, int, negate)
    assert result == expected
    assert type(result) is type(expected)


def test_a_default_dict_keeps_its_factory_and_the_original_its_values() -> None:
    data: dict[str, Any] = defaultdict(list, a=1)
    result = apply_to_collection(data, int, negate)
    assert result["a"] == -1
    assert result["new"] == []
    assert data == {"a": 1}


def test_several_types_and_further_arguments_reach_the_function() -> None:
    assert apply_to_collection([1, 2.0, "x"], (int, float), lambda v, add, times: (v + add) * times, 1, times=10) == [20, 30.0, "x"]


def test_a_collection_of_the_type_itself_is_handed_over_whole() -> None:
    assert apply_to_collection([[1, 2], {"a": (3,)}], (list, tuple), len) == 2
    assert apply_to_collection({"a": [1, 2]}, list, len) == {"a": 2}


def test_dataclasses_are_copied_with_fields_that_init_does_not_take() -> None:
    batch = Batch(torch.ones(2))
    batch.total = 5
    result = apply_to_collection(batch, (Tensor, int), negate)
    assert result is not batch
    assert result.x.tolist() == [-1, -1]
    assert (result.total, result.name) == (-5, "n")
    assert batch.total == 5


def test_frozen_dataclasses_are_copied_too() -> None:
    result = apply_to_collection(FrozenBatch(torch.ones(1), [torch.ones(1)]), Tensor, negate)
    assert isinstance(result, FrozenBatch)
    assert (result.x.item(), result.more[0].item()) == (-1, -1)


def test_a_dataclass_itself_is_no_batch() -> None:
    assert apply_to_collection([Batch], Tensor, negate) == [Batch]


# ---- move_data_to_device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: [t],
        lambda t: (t, [t]),
        lambda t: {"a": t, "b": {"c": (t,)}},
        lambda t: Pair(t, [Pair(t, t)]),
        lambda t: OrderedDict(a=t),
        lambda t: UserDict(a=t),
        lambda t: MappingProxyType({"a": t}),
        lambda t: MyList([t]),
        lambda t: Batch(t),
        lambda t: FrozenBatch(t, [t]),
        lambda t: torch.nn.Parameter(t),
    ],
)
def test_every_tensor_moves_whatever_it_is_wrapped_in(wrap: Any, device: Any) -> None:
    batch = wrap(torch.ones(2))
    moved = move_data_to_device(batch, device)
    assert type(moved) is type(batch) or isinstance(moved, Tensor)
    seen: list[str] = []
    apply_to_collection(moved, Tensor, lambda t: seen.append(t.device.type))
    assert seen
    assert set(seen) == {"meta"}


def test_a_batch_on_its_device_already_is_not_copied() -> None:
    x = torch.ones(2)
    assert move_data_to_device([x], "cpu")[0] is x


def test_what_is_no_tensor_stays_as_it_is() -> None:
    array, marker = np.ones(2), object()
    assert move_data_to_device([array, "text", 3, None, marker, {1}, Tensor], "meta") == [array, "text", 3, None, marker, {1}, Tensor]


def test_objects_move_through_their_own_method_to() -> None:
    class Graph:
        def to(self, device: torch.device) -> str:
            return f"moved to {device}"

    class InPlace:
        device = ""

        def to(self, device: torch.device) -> None:
            self.device = str(device)

    in_place = InPlace()
    assert move_data_to_device((Graph(), in_place), "meta") == ("moved to meta", in_place)
    assert in_place.device == "meta"


def test_packed_sequences_stay_usable() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move_data_to_device([packed], "meta")[0]
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"


def test_copies_to_the_host_wait_and_copies_to_a_device_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    overlapped = {}

    class Probe(Tensor):
        def to(self, device: torch.device, non_blocking: bool = False) -> Any:  # type: ignore[override]
            overlapped[device.type] = non_blocking
            return self

    for device in ("cpu", "mps", "cuda", "meta"):
        move_data_to_device({"a": [torch.ones(1).as_subclass(Probe)]}, torch.device(device))
    assert overlapped == {"cpu": False, "mps": False, "cuda": True, "meta": True}


# ---- conversions --------------------------------------------------------------------------------------------------------


def test_numbers_and_arrays_become_tensors() -> None:
    result = convert_to_tensors({"a": 1, "b": [2.5, True], "c": np.ones(2, dtype=np.float32), "d": "x"}, torch.device("cpu"))
    assert result["a"].dtype is torch.int64
    assert [t.item() for t in result["b"]] == [2.5, True]
    assert result["c"].tolist() == [1.0, 1.0]
    assert result["d"] == "x"


def test_converted_tensors_are_contiguous() -> None:
    assert convert_to_tensors([torch.ones(2, 3).t()], torch.device("cpu"))[0].is_contiguous()


def test_tensors_of_one_element_become_numbers() -> None:
    assert convert_tensors_to_scalars({"a": torch.tensor([1.5]), "b": [torch.tensor(2), "x", 3]}) == {"a": 1.5, "b": [2, "x", 3]}


@pytest.mark.parametrize(("shape", "count"), [((2,), 2), ((0,), 0)])
def test_tensors_of_other_sizes_do_not_become_numbers(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match=f"has {count} elements; only one-element tensors convert"):
        convert_tensors_to_scalars([torch.ones(shape)])
