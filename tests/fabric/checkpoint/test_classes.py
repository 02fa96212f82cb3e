"""Enums, dataclasses and named tuples in a checkpoint: rebuilt without running a line of their classes."""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import sys
import types
from collections import namedtuple
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch

from lightning.fabric.checkpoint.classes import CannotBuild, build_enum, find_class
from lightning.fabric.checkpoint.format import TAG, Opaque, Unresolved, decode, encode
from lightning.fabric.utilities.enums import LightningEnum

T = TypeVar("T")
calls: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def through_file(obj: Any, trusted: bool = False) -> Any:
    buffer = io.BytesIO()
    torch.save(encode(obj), buffer)
    buffer.seek(0)
    return decode(torch.load(buffer, weights_only=True), trusted)


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796 (an alias)
    CALL = print


class Mode(str, enum.Enum):
    MIN = "min"


class Level(LightningEnum):
    HIGH = "high"


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Flags(enum.Flag):
    A = 1
    B = 2


class Guess(enum.Enum):
    ONE = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        calls.append(f"missing {value}")
        return cls.ONE


class GuessFlag(enum.Flag):
    ONE = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        calls.append(f"missing {value}")
        return cls.ONE


@dataclasses.dataclass
class Config:
    lr: float
    path: Path = Path("data")
    layers: list[Any] = dataclasses.field(default_factory=list)
    total: int = dataclasses.field(init=False, default=0)
    note: dataclasses.InitVar[str] = "n"

    def __post_init__(self, note: str) -> None:
        calls.append("post_init")
        self.total = 7
        self.extra = note

    @functools.cached_property
    def lazy(self) -> Any:
        return lambda: 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: int = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    y: int = 2


@dataclasses.dataclass
class Box(Generic[T]):
    item: T


@dataclasses.dataclass(frozen=True)
class Child(Frozen):
    z: Any = None


@dataclasses.dataclass
class Picky:
    """Runs code whenever it can."""

    x: Any

    def __init__(self, x: Any) -> None:
        calls.append("init")
        self.__dict__["x"] = x

    def __new__(cls, *args: Any) -> Any:
        calls.append("new")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        calls.append("setattr")

    @property
    def trap(self) -> int:
        return 1

    @trap.setter
    def trap(self, value: int) -> None:
        calls.append("setter")


class Point(NamedTuple):
    x: Any
    y: int = 5


Pair = namedtuple("Pair", "a b")


class StrictPair(Pair):
    def __new__(cls, a: Any, b: Any) -> Any:
        calls.append("new")
        return super().__new__(cls, a, b)


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Colour.CRIMSON,
        Colour.CALL,
        Mode.MIN,
        Level.HIGH,
        Bits.A,
        Bits.A | Bits.B,
        Bits(0),
        Bits(8),
        Flags.A | Flags.B,
        Guess.ONE,
    ],
    ids=repr,
)
def test_enum_member_comes_back_as_itself(value: enum.Enum) -> None:
    result = through_file({"v": [value]})["v"][0]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        Frozen(Path("x")),
        Slotted(Path("x"), 3),
        Slotted({"a": Mode.MIN}),
        Child(1, 2, Frozen(Slotted(None))),
        Box[int](3),
        Point(Path("x")),
        Pair([1], {"b": Mode.MIN}),
    ],
    ids=repr,
)
def test_dataclass_and_named_tuple_come_back_equal(value: Any) -> None:
    result = through_file({"v": value})["v"]
    assert result == value
    assert type(result) is type(value)


def test_dataclass_keeps_computed_attributes_without_running_post_init() -> None:
    config = Config(0.1, Path("x"), [Config(0.2)], note="hello")
    assert config.lazy() == 1
    calls.clear()
    result = through_file(config)
    assert calls == []
    assert (result.lr, result.path, result.total, result.extra) == (0.1, Path("x"), 7, "hello")
    assert result.layers[0] == config.layers[0]
    assert "lazy" not in vars(result)


def test_nothing_of_the_class_runs_when_reading() -> None:
    values = [Picky(1), StrictPair(1, 2)]
    encoded = encode(values)
    encoded[0]["value"]["trap"] = 5
    calls.clear()
    picky, pair = decode(encoded)
    assert calls == []
    assert (vars(picky), tuple(pair), type(pair)) == ({"x": 1, "trap": 5}, (1, 2), StrictPair)


def test_fields_that_the_file_lacks_get_plain_defaults() -> None:
    encoded = encode(Config(0.1))
    encoded["value"] = {"lr": 0.5}
    config = decode(encoded)
    assert (config.lr, config.path, config.layers, config.total) == (0.5, Path("data"), [], 0)
    assert config.layers is not decode(encoded).layers
    encoded["value"] = {}
    with pytest.warns(UserWarning, match="no value for its field 'lr'"):
        assert isinstance(decode(encoded), Unresolved)


def test_named_tuple_that_has_changed_is_matched_by_field_name() -> None:
    encoded = encode(Point(1, 2))
    encoded["value"] = {"x": 3}
    assert decode(encoded) == Point(3, 5)
    encoded["value"] = {"x": 3, "gone": 1}
    with pytest.warns(UserWarning, match="no field 'gone'"):
        assert decode(encoded)["gone"] == 1


def test_class_of_a_module_that_is_not_imported_comes_back_as_its_data() -> None:
    module = types.ModuleType("a_users_script")
    module.Config = dataclasses.make_dataclass("Config", [("lr", float)])
    module.Config.__module__ = "a_users_script"
    encoded = encode({"config": module.Config(0.5)})
    with pytest.warns(UserWarning, match="import a_users_script before loading"):
        result = decode(encoded)["config"]
    assert isinstance(result, Unresolved)
    assert (result["lr"], dict(result), result.type_name) == (0.5, {"lr": 0.5}, "a_users_script.Config")
    assert "a_users_script" not in sys.modules
    # saving what could not be rebuilt loses nothing
    sys.modules["a_users_script"] = module
    try:
        assert decode(encode([result]))[0] == module.Config(0.5)
    finally:
        del sys.modules["a_users_script"]


def test_one_warning_names_every_missing_class() -> None:
    encoded = [{TAG: "enum", "module": f"absent_{i}", "qualname": "E", "value": {"name": "A", "value": 1}} for i in (1, 2, 1)]
    with pytest.warns(UserWarning, match="absent") as record:
        decode(encoded)
    assert len(record) == 1
    assert "absent_1" in str(record[0].message)
    assert "absent_2" in str(record[0].message)


def test_trusted_file_may_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_trust.py").write_text("import enum\nclass E(enum.Enum):\n    A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    encoded = {TAG: "enum", "module": "module_of_trust", "qualname": "E", "value": {"name": "A", "value": 1}}
    with pytest.warns(UserWarning, match="import module_of_trust"):
        decode(encoded)
    assert "module_of_trust" not in sys.modules
    try:
        assert decode(encoded, trusted=True).value == 1
    finally:
        sys.modules.pop("module_of_trust", None)


def test_local_class_is_stored_and_comes_back_as_its_data() -> None:
    @dataclasses.dataclass
    class Local:
        x: int = 1

    with pytest.warns(UserWarning, match="Local"):
        assert through_file(Local(3))["x"] == 3


def test_class_with_pickle_rules_of_its_own_is_left_to_pickle() -> None:
    assert isinstance(through_file(Stateful(1)), Opaque)
    assert through_file(Stateful(1), trusted=True).x == 2


@dataclasses.dataclass
class Stateful:
    x: int

    def __getstate__(self) -> dict[str, Any]:
        return {"x": self.x + 1}


@dataclasses.dataclass
class Deleting:
    x: int

    def __del__(self) -> None:
        calls.append("del")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("dataclass", "Deleting", {"x": 1}),
        ("dataclass", "Colour", {"x": 1}),
        ("dataclass", "Point", {"x": 1}),
        ("dataclass", "functools.partial", {"func": 1}),
        ("enum", "Config", {"name": "A", "value": 1}),
        ("enum", "Guess", {"name": None, "value": 5}),
        ("enum", "GuessFlag", {"name": None, "value": 6}),
        ("enum", "Colour", {"name": "mro", "value": 1}),
        ("enum", "Colour", {"name": None, "value": 1}),
        ("namedtuple", "Config", {"lr": 1}),
        ("namedtuple", "through_file", {"obj": 1}),
        ("dataclass", "calls", {}),
        ("dataclass", "Config", {"__class__": 1, "lr": 1}),
        ("dataclass", "Slotted", {"x": 1, "unknown": 1}),
        ("dataclass", "Config.lazy", {}),
    ],
)
def test_name_that_leads_to_something_else_builds_nothing(kind: str, name: str, value: dict[str, Any]) -> None:
    encoded = {TAG: kind, "module": __name__, "qualname": name, "value": value}
    with pytest.warns(UserWarning, match="could not be rebuilt"):
        assert isinstance(decode(encoded), Unresolved)
    assert calls == []


def test_lazy_module_is_not_woken_up() -> None:
    class Lazy(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            calls.append(name)
            return super().__getattribute__(name)

    sys.modules["lazy_for_test"] = Lazy("lazy_for_test")
    try:
        with pytest.raises(CannotBuild):
            find_class("lazy_for_test", "Anything")
        assert calls == []
    finally:
        del sys.modules["lazy_for_test"]


def test_spawned_main_module_is_stored_as_the_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Colour, "__module__", "__mp_main__")
    assert encode(Colour.RED)["module"] == "__main__"


def test_enum_is_built_from_its_members_only() -> None:
    assert build_enum(Colour, {"name": "CRIMSON", "value": 1}) is Colour.RED
    with pytest.raises(CannotBuild, match="no member 'BLUE'"):
        build_enum(Colour, {"name": "BLUE", "value": 1})
