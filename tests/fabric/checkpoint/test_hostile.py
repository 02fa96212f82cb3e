"""Files made to do harm: reading them must execute nothing."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint.format import TAG, Opaque, Unresolved, decode
from lightning.fabric.checkpoint.io import TorchCheckpointIO, load

MARK = "executed"


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Iterator[None]:
    """Fails the test if a gadget ran, or if a module was imported because a file said so."""
    yield
    assert not Path(MARK).exists()
    assert not {"antigravity", "this"} & set(sys.modules)


class Gadget:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


class SetState:
    def __setstate__(self, state: Any) -> None:
        Path(MARK).touch()

    def __getstate__(self) -> Any:
        return {"a": 1}


def archive(pickled: bytes) -> bytes:
    """A file in torch's format around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def saved(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


GADGETS = {
    "system": lambda: saved({"x": Gadget(os.system, f"touch {MARK}")}),
    "eval": lambda: saved({"x": Gadget(eval, f"__import__('pathlib').Path({MARK!r}).touch()")}),
    "popen": lambda: saved([Gadget(subprocess.Popen, ["touch", MARK])]),
    "touch": lambda: saved({"hyper_parameters": {"p": Gadget(Path.touch, Path(MARK))}}),
    "in a key": lambda: saved({Gadget(os.system, f"touch {MARK}"): 1}),
    "setstate": lambda: saved({"state_dict": SetState()}),
    "getattr": lambda: saved([Gadget(getattr, Path, "touch")]),
    "import": lambda: saved([Gadget(__import__, "antigravity")]),
    "torch.load": lambda: saved([Gadget(torch.load, "other.ckpt")]),
    "old pickle": lambda: pickle.dumps({"x": Gadget(os.system, f"touch {MARK}")}),
    "inst opcode": lambda: archive(b"(S'touch executed'\nios\nsystem\n."),
    "obj opcode": lambda: archive(b"(cos\nsystem\nS'touch executed'\no."),
    "stack global": lambda: archive(b"\x80\x02\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R."),
    "extension": lambda: archive(b"\x80\x02\x82\x01."),
    "persistent id": lambda: archive(b"\x80\x02X\x01\x00\x00\x00xQ."),
}


@pytest.mark.parametrize("name", GADGETS)
@pytest.mark.parametrize("weights_only", [None, True])
def test_pickle_gadget_is_refused(name: str, weights_only: bool | None) -> None:
    Path("bad.ckpt").write_bytes(GADGETS[name]())
    for read in (load, TorchCheckpointIO().load_checkpoint):
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            read("bad.ckpt", weights_only=weights_only)


def test_gadgets_would_work_on_a_reader_that_unpickles() -> None:
    for name in ("system", "eval", "touch", "setstate"):
        torch.load(io.BytesIO(GADGETS[name]()), weights_only=False)
        deadline = time.monotonic() + 10
        while not Path(MARK).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        Path(MARK).unlink()


def test_opaque_bytes_are_never_unpickled_without_trust() -> None:
    bytes_ = torch.frombuffer(bytearray(GADGETS["touch"]()), dtype=torch.uint8)
    torch.save({"x": {TAG: "opaque", "type": "t", "excerpt": "e", "value": bytes_}}, "bad.ckpt")
    value = load("bad.ckpt")["x"]
    assert isinstance(value, Opaque)
    repr(value)


def class_tag(kind: str, module: str, qualname: str, **fields: Any) -> dict[str, Any]:
    return {TAG: kind, "module": module, "qualname": qualname, "value": fields}


@pytest.mark.parametrize("kind", ["dataclass", "enum", "namedtuple"])
@pytest.mark.parametrize(
    ("module", "qualname"),
    [
        ("os", "system"),
        ("subprocess", "Popen"),
        ("antigravity", "x"),
        ("this", "s"),
        ("builtins", "eval"),
        ("builtins", "type"),
        ("builtins", "object"),
        ("torch.nn", "Linear"),
        ("os", "path.join"),
        ("os", "PathLike.__class__"),
        ("os", "PathLike.__subclasshook__"),
        ("os", "stat_result.__init__.__globals__"),
        ("", ""),
        ("os.path", "."),
    ],
)
def test_class_path_in_a_tag_is_neither_imported_nor_called(kind: str, module: str, qualname: str) -> None:
    content = class_tag(kind, module, qualname, name="x", value=1, args="touch executed", command="touch executed")
    torch.save({"x": content}, "bad.ckpt")
    with pytest.warns(UserWarning, match="could not be rebuilt"):
        assert isinstance(load("bad.ckpt")["x"], Unresolved)


@pytest.mark.parametrize(
    "tag",
    [
        {TAG: "path"},
        {TAG: "path", "flavour": "PosixPath", "value": ["x"]},
        {TAG: ["list"], "value": 1},
        {TAG: None, "value": 1},
        {TAG: torch.ones(2), "value": 1},
        {TAG: "dict", "value": 3},
        {TAG: "items", "type": "eval", "value": []},
        {TAG: "items", "type": "dict", "value": [[[], 1]]},
        {TAG: "set", "value": [{}]},
        {TAG: "defaultdict", "factory": "eval", "value": {}},
        {TAG: "deque", "maxlen": -1, "value": []},
        {TAG: "range", "value": [0, 1, 0]},
        {TAG: "bytes", "value": 10**12},
        {TAG: "datetime", "fields": [0] * 7, "fold": 0, "value": None},
        {TAG: "timezone", "value": [3, "x"]},
        {TAG: "timedelta", "value": [10**20, 0, 0]},
        {TAG: "fraction", "value": [1, 0]},
        {TAG: "zoneinfo", "value": "../../../etc/passwd"},
        {TAG: "torch.memory_format", "value": "load"},
        {TAG: "torch.Generator", "device": "cpu", "value": torch.ones(3)},
        {TAG: "torch.Generator", "device": "cpu", "value": torch.zeros(5056, dtype=torch.uint8)},
        {TAG: "tensor", "value": [{}, {"a": 1}]},
        {TAG: "numpy.ndarray", "shape": [2], "dtype": "|O", "value": torch.zeros(16, dtype=torch.uint8)},
        {TAG: "numpy.ndarray", "shape": [2], "dtype": [["a", "|O"]], "value": torch.zeros(16, dtype=torch.uint8)},
        {TAG: "numpy.ndarray", "shape": [10**15], "dtype": "<f8", "value": torch.zeros(0, dtype=torch.uint8)},
        {TAG: "numpy.ndarray", "shape": [-1, 7], "dtype": "<f8", "value": torch.zeros(8, dtype=torch.uint8)},
        {TAG: "numpy.dtype", "dtype": "__import__('os')", "value": None},
        {TAG: "enum", "module": "enum", "qualname": "Enum", "value": {}},
        {TAG: "enum", "module": ["enum"], "qualname": {}, "value": {"name": "x", "value": 1}},
        {TAG: "dataclass", "module": "x", "qualname": "y", "value": []},
        {TAG: "namedtuple", "module": "x", "value": {}},
    ],
    ids=str,
)
def test_malformed_tag_is_an_error_or_a_placeholder(tag: dict[str, Any]) -> None:
    try:
        decode({"a": [tag]})
    except ValueError as error:
        assert str(error).startswith("a[0]")  # noqa: PT017 (either outcome is right)
    except UserWarning as warning:
        assert "could not be rebuilt" in str(warning)  # noqa: PT017
    else:
        pytest.fail("a malformed tag was taken for good")


def test_kind_of_a_later_version_comes_back_as_its_data() -> None:
    with pytest.warns(UserWarning, match="later version"):
        assert decode({TAG: "hologram", "value": 3})["value"] == 3


def test_bottomless_structure_is_an_error(tmp_path: Path) -> None:
    deep: Any = {TAG: "path"}
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        decode(deep)
    # torch's safe reader does not recurse, so such a file gets as far as decode
    Path("deep.ckpt").write_bytes(archive(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."))
    with pytest.raises(RuntimeError, match="nested too deeply"):
        load("deep.ckpt")


def test_structure_that_multiplies_itself_is_read_in_no_time() -> None:
    bomb: Any = [{TAG: "path", "flavour": "PurePosixPath", "value": "x"}]
    for _ in range(100):
        bomb = [bomb, bomb]
    assert decode(bomb)[0] is decode(bomb)[0] or decode(bomb) is not bomb


def test_container_that_contains_itself_is_an_error_if_it_would_change() -> None:
    loop: list[Any] = [{TAG: "range", "value": [0, 1, 1]}]
    loop.append(loop)
    with pytest.raises(ValueError, match="contains itself"):
        decode({"a": loop})
