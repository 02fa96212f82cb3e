"""Every value that a default save writes, a default load gives back."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import decimal
import fractions
import io
import math
import pathlib
import types
import uuid
import zoneinfo
from typing import Any

import numpy as np
import pytest
import torch

from lightning.fabric.checkpoint.format import TAG, Opaque, decode, encode, find_placeholders, find_unstorable


def through_file(obj: Any, trusted: bool = False) -> Any:
    """What torch's safe reader gives back of ``obj``."""
    buffer = io.BytesIO()
    torch.save(encode(obj), buffer)
    buffer.seek(0)
    return decode(torch.load(buffer, weights_only=True), trusted)


PLAIN = {
    "tensor": torch.ones(2),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "numbers": [1, -5, 2**70, 1.5, math.inf, True, None, 1 + 2j],
    "strings": ["", "é\U0001f600", b"\x00\xff", bytearray(b"x")],
    "containers": ({1, 2}, (), (1, (2,)), collections.Counter("aab")),
    "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2]), torch.strided],
    "keys": {1: "a", (1, "b"): 2, 2.5: 3, None: 4},
    "state": torch.nn.BatchNorm1d(2).state_dict(),
}


def test_encode_leaves_plain_data_as_the_same_object() -> None:
    assert encode(PLAIN) is PLAIN
    assert decode(PLAIN) is PLAIN


def test_plain_data_is_read_by_the_safe_reader() -> None:
    result = through_file(PLAIN)
    assert result["numbers"] == PLAIN["numbers"]
    assert result["keys"] == PLAIN["keys"]
    assert result["containers"] == PLAIN["containers"]
    assert result["state"]._metadata == PLAIN["state"]._metadata  # type: ignore[attr-defined]


class Text(str):
    pass


VALUES = [
    pathlib.Path("a/b"),
    pathlib.PurePosixPath("/a/b"),
    pathlib.PureWindowsPath("C:\\a"),
    b"",
    2**3000,
    -(2**3000),
    frozenset({1}),
    collections.deque([1, 2], maxlen=3),
    collections.defaultdict(list, {"a": [1]}),
    collections.defaultdict(None, {"a": 1}),
    range(1, 10, 2),
    slice(None, 5),
    slice("a", 1.5, pathlib.Path("x")),
    ...,
    decimal.Decimal("1.10"),
    fractions.Fraction(1, 3),
    uuid.UUID(int=5),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6, fold=1),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Zurich")),
    datetime.date(2026, 1, 2),
    datetime.time(1, 2, 3, 4),
    datetime.timedelta(days=-1, microseconds=5),
    datetime.timezone(datetime.timedelta(hours=1), "CET"),
    argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    types.SimpleNamespace(a=1),
    torch.channels_last,
    np.float64(1.5),
    np.float32(math.nan),
    np.int8(3),
    np.bool_(True),
    np.str_("text"),
    np.datetime64("2026-01-02", "s"),
    np.dtype("float32"),
    np.dtype([("a", "i4"), ("b", "f8", (2,))]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{str(value)[:20]}")
def test_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    result = through_file({"value": value})["value"]
    assert type(result) is type(value)
    assert result == value or (math.isnan(value) and math.isnan(result))
    if isinstance(value, (datetime.datetime, datetime.time)):
        assert (result.fold, result.tzinfo) == (value.fold, value.tzinfo)
    if isinstance(value, collections.deque):
        assert result.maxlen == value.maxlen
    if isinstance(value, collections.defaultdict):
        assert result.default_factory is value.default_factory


ARRAYS = [
    np.arange(6, dtype="float32").reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.arange(10)[::2],
    np.array(5),
    np.zeros((0, 3)),
    np.array(["ab", "c"]),
    np.array([b"ab", b"c"]),
    np.array([1, 2], dtype=">i4"),
    np.array([1, 2], dtype="uint64"),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array(["2026-01-02"], dtype="datetime64[D]"),
    np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    np.array([1, "a", pathlib.Path("x"), None], dtype=object),
    np.frombuffer(b"\x01\x02", dtype="uint8"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{array.shape}")
def test_array_comes_back_with_dtype_and_shape(array: np.ndarray[Any, Any]) -> None:
    result = through_file(array)
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    assert (result == array).all()


def test_numpy_random_state_continues() -> None:
    state = np.random.RandomState(3).get_state()
    restored = np.random.RandomState()
    restored.set_state(through_file(state))
    assert restored.rand() == np.random.RandomState(3).rand()


def test_generator_continues_where_it_was() -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    restored = through_file({"g": generator})["g"]
    assert torch.equal(torch.rand(3, generator=restored), torch.rand(3, generator=generator))


def test_encode_never_changes_its_input() -> None:
    checkpoint = {"a": [pathlib.Path("x"), {"b": (datetime.timedelta(1),)}], pathlib.Path("k"): {pathlib.Path("s")}, "same": [1]}
    before = copy.deepcopy(checkpoint)
    encoded = encode(checkpoint)
    assert checkpoint == before
    assert encoded != before
    tagged = copy.deepcopy(encoded)
    decode(encoded)
    assert encoded == tagged


def test_encode_keeps_the_parts_that_hold_nothing_special() -> None:
    weights = {"w": torch.ones(1)}
    assert encode({"weights": weights, "path": pathlib.Path("x")})["weights"] is weights


@pytest.mark.parametrize(
    "value",
    [
        {TAG: "path", "flavour": "PosixPath", "value": "x"},
        {TAG: 1},
        {TAG: {TAG: {TAG: None}}},
        [{TAG: pathlib.Path("x")}],
        {TAG: 1, pathlib.Path("x"): 2},
        collections.OrderedDict({TAG: "path"}),
        argparse.Namespace(**{TAG: "enum", "value": 3}),
        collections.defaultdict(int, {TAG: "dict"}),
    ],
    ids=str,
)
def test_user_data_with_the_tag_key_comes_back_unchanged(value: Any) -> None:
    result = through_file(value)
    assert result == value
    assert type(result) is type(value)


def test_keys_and_set_elements_of_any_kind_come_back() -> None:
    value = {pathlib.Path("a"): 1, (pathlib.Path("b"), 2): {pathlib.Path("c"), 3}, "plain": collections.OrderedDict({range(2): 1})}
    result = through_file(value)
    assert result == value
    assert type(result["plain"]) is collections.OrderedDict


def test_attributes_of_a_state_dict_survive_a_change_inside() -> None:
    state = torch.nn.Linear(1, 1).state_dict()
    state["_extra_state"] = pathlib.Path("x")  # type: ignore[assignment]
    result = through_file(state)
    assert result._metadata == state._metadata  # type: ignore[attr-defined]
    assert result["_extra_state"] == pathlib.Path("x")


def test_shared_objects_stay_shared() -> None:
    namespace = argparse.Namespace(items=[1])
    tensor = torch.ones(2)
    result = through_file({"a": namespace, "b": [namespace], "t": tensor, "path": pathlib.Path("x"), "u": tensor})
    assert result["a"] is result["b"][0]
    assert result["t"].data_ptr() == result["u"].data_ptr()


def test_cycle_of_plain_data_is_stored_and_one_with_a_path_is_refused() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert encode(loop) is loop
    loop.append(pathlib.Path("x"))
    with pytest.raises(ValueError, match=r"a\.b of type builtins.list contains itself"):
        encode({"a": {"b": loop}})
    assert [path for path, _, _ in find_unstorable(loop, "top")] == ["top"]


def test_tensor_attributes_that_torch_refuses_come_back() -> None:
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    parameter.origin = pathlib.Path("x")  # type: ignore[attr-defined]
    result = through_file([parameter])[0]
    assert type(result) is torch.nn.Parameter
    assert (result.origin, result.requires_grad) == (pathlib.Path("x"), False)


def test_path_of_the_other_operating_system_keeps_its_parts() -> None:
    written = {TAG: "path", "flavour": "WindowsPath", "value": "data\\train"}
    assert decode(written) == pathlib.Path("data/train")


# --- what only pickle can store -------------------------------------------------------------------------------------


def test_module_comes_back_opaque_unless_trusted() -> None:
    model = torch.nn.Linear(2, 1)
    opaque = through_file({"net": model})["net"]
    assert isinstance(opaque, Opaque)
    assert "torch.nn.modules.linear.Linear" in repr(opaque)
    assert "weights_only=False" in repr(opaque)
    restored = through_file({"net": model}, trusted=True)["net"]
    assert torch.equal(restored.weight, model.weight)


@pytest.mark.parametrize("value", [math.sqrt, torch.nn.ReLU, Text("x"), dict], ids=str)
def test_functions_classes_and_subclasses_of_builtins_are_opaque(value: Any) -> None:
    assert isinstance(through_file(value), Opaque)
    assert through_file(value, trusted=True) == value


def test_opaque_survives_being_saved_again_without_trust() -> None:
    again = through_file(through_file({"f": math.sqrt}))
    assert through_file(again, trusted=True)["f"] is math.sqrt


def test_long_or_failing_repr_does_not_get_in_the_way() -> None:
    assert len(through_file(LongRepr()).excerpt) <= 200
    assert "BadRepr" in through_file(BadRepr()).excerpt


class LongRepr:
    def __repr__(self) -> str:
        return "x" * 10_000


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_class_that_the_user_declared_safe_is_left_to_torch() -> None:
    with torch.serialization.safe_globals([LongRepr]):
        value = LongRepr()
        assert encode([value])[0] is value


def test_unpicklable_value_is_refused_with_its_path_and_type() -> None:
    with pytest.raises(TypeError, match=r"hyper_parameters\.criterion of type builtins\.function can't be stored") as info:
        encode({"hyper_parameters": {"criterion": lambda x: x}})
    assert "ignore" in str(info.value)
    with pytest.raises(TypeError, match=r"a\[1\]\['b c'\]\.x of type"):
        encode({"a": [0, {"b c": argparse.Namespace(x=(i for i in ()))}]})


def test_defaultdict_with_a_factory_of_its_own_is_refused_with_the_reason() -> None:
    with pytest.raises(TypeError, match="a defaultdict may have one of these factories: list, dict"):
        encode(collections.defaultdict(lambda: 1))


def test_find_unstorable_lists_every_problem_and_nothing_else() -> None:
    value = {
        "ok": math.sqrt,
        "model": torch.nn.Linear(1, 1),
        "bad": lambda x: x,
        "more": [1, {"gen": (i for i in ())}],
        "p": pathlib.Path(),
    }
    problems = find_unstorable(value, "hyper_parameters")
    assert [(path, kind.__name__) for path, kind, _ in problems] == [
        ("hyper_parameters.bad", "function"),
        ("hyper_parameters.more[1].gen", "generator"),
    ]
    assert all(reason for _, _, reason in problems)
    assert find_unstorable(PLAIN) == []


def test_find_placeholders_names_the_path() -> None:
    loaded = through_file({"hp": {"net": [math.sqrt]}, "ok": 1})
    assert [path for path, _ in find_placeholders(loaded)] == ["hp.net[0]"]
    assert [path for path, _ in find_placeholders(loaded["hp"], "hyper_parameters")] == ["hyper_parameters.net[0]"]


def test_bottomless_structure_is_refused() -> None:
    deep: Any = pathlib.Path("x")
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        encode(deep)
    assert find_unstorable(deep, "hparams")[0][0] == "hparams"


def test_long_list_of_numbers_is_left_alone_unless_one_is_too_large() -> None:
    numbers = list(range(100_000))
    assert encode(numbers) is numbers
    assert through_file([*numbers, -(2**3000)])[-1] == -(2**3000)
