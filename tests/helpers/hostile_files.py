"""Files made to do harm. Building them runs nothing of it; each tries to write to, or to remove, a file of the folder ``OUTSIDE``.

A file is bytes, for a way in that takes a checkpoint. Most are archives as ``torch.save`` writes them; their pickles are written by hand
where Python would not write such a thing.
"""

from __future__ import annotations

import collections
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import torch

OUTSIDE = f"/tmp/keraunos-hostile-{os.getpid()}"  # no test writes there, and no other process has the same
MARK = f"{OUTSIDE}/executed"
PRECIOUS = f"{OUTSIDE}/precious"

Hostile = Callable[[], bytes]


class Gadget:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def checkpoint(**entries: Any) -> dict[str, Any]:
    """What a trainer would accept, but for ``entries``."""
    weights = collections.OrderedDict([("layer.weight", torch.ones(1, 1)), ("layer.bias", torch.ones(1))])
    return {
        "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.0", "state_dict": weights, "loops": {}, "callbacks": {},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}], "lr_schedulers": [], **entries,
    }  # fmt: skip


def saved(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def inside(place: str, value: Any) -> Hostile:
    """A checkpoint that is as it should be, but for one value."""
    where: dict[str, Callable[[], Any]] = {
        "top": lambda: value,
        "weights": lambda: checkpoint(state_dict={"layer.weight": value, "layer.bias": torch.ones(1)}),
        "hyperparameters": lambda: checkpoint(hyper_parameters={"width": value}),
        "hyperparameters of the data": lambda: checkpoint(datamodule_hyper_parameters=value),
        "callbacks": lambda: checkpoint(callbacks={"ModelCheckpoint": {"best_model_path": value}}),
        "loops": lambda: checkpoint(loops={"fit_loop": value}),
        "optimizers": lambda: checkpoint(optimizer_states=[value]),
        "schedulers": lambda: checkpoint(lr_schedulers=[value]),
        "version": lambda: {**checkpoint(), "pytorch-lightning_version": value},
        "position": lambda: checkpoint(keraunos={"version": "0", "format": 1, "data": value, "rng": value}),
        "an attribute of a tensor": lambda: checkpoint(x=with_attribute(value)),
    }
    return lambda: saved(where[place]())


def with_attribute(value: Any) -> torch.Tensor:
    tensor = torch.nn.Parameter(torch.ones(1))
    tensor.note = value  # type: ignore[attr-defined]
    return tensor


# ---- archives and pickles written by hand ------------------------------------------------------------------------------


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """An archive with this pickle, and other records (``data_0`` stands for ``data/0``)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little", **records}.items():
            file.writestr(f"archive/{name.replace('_', '/')}", content)
    return buffer.getvalue()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """The operations that call something; arguments are operations too."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def program(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


TOUCH = f"touch {MARK}"
SYSTEM = b"cposix\nsystem\n"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
MUCH = 10**11  # bytes


def doubling(opening: bytes, closing: bytes, between: bytes = b"", key: bytes | None = None, depth: int = 60) -> bytes:
    """A dict with a value that holds twice what holds twice ...: small, and endless for who goes through all of it.

    Args:
        opening: operations before the two parts of each level.
        closing: operations after them.
        between: operations between them.
        key: operations that make the key; None for one that is the value itself.
        depth: how often it doubles.
    """
    levels = b"K\x01q\x00"
    for level in range(depth):
        each = b"h" + bytes([level])
        levels += opening + each + between + each + closing + b"q" + bytes([level + 1])
    last = b"h" + bytes([depth])
    return program(b"}(", text("levels"), b"](" + levels + b"e", (last + b"N") if key is None else (key + last), b"u")


def overlapping() -> bytes:
    """An archive whose table names the same record many times."""
    data = bytearray(archive(program(b"}")))
    end = data.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    table = bytes(data[start:end]) * 2000
    head = data[:start] + table
    return bytes(head + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 8000, 8000, len(table), start, 0))


def declared_size(size: int) -> bytes:
    """An archive whose table says that a record is large."""
    data = bytearray(saved(checkpoint()))
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    data[place + 24 : place + 28] = struct.pack("<I", size)
    return bytes(data)


def climbing() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in (f"../..{MARK}", MARK, f"archive/../../..{MARK}"):
            file.writestr(name, "x")
        file.writestr("archive/data.pkl", program(call("posix", "system", text(TOUCH))))
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def unfolding() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(checkpoint()))) as good, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in good.namelist():
            bomb.writestr(name, good.read(name) if not name.endswith("data/0") else bytes(200_000_000))
    return buffer.getvalue()


def two_ends() -> bytes:
    """An archive within the comment of another: which one a reader sees depends on where it looks."""
    good, bad = saved(checkpoint()), archive(program(call("posix", "system", text(TOUCH))))
    end = good.rindex(b"PK\x05\x06")
    return good[: end + 20] + struct.pack("<H", len(bad)) + bad


def tape() -> bytes:
    """The oldest format of all: an archive of tar, here with a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, PRECIOUS
        tar.addfile(link)
        for name in ("pickle", f"../../..{MARK}"):
            content = program(call("posix", "system", text(TOUCH)))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def legacy(pickled: bytes) -> bytes:
    """The format before torch 1.6: pickles one after another."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in parts) + pickled + pickle.dumps(["0"], 2)


def compiled() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


REFUSED: dict[str, Hostile] = {
    # what a pickle calls
    "os.system": inside("top", Gadget(os.system, TOUCH)),
    "eval": inside("weights", Gadget(eval, f"open({MARK!r}, 'w')")),
    "exec": inside("optimizers", Gadget(exec, f"open({MARK!r}, 'w')")),
    "compile": inside("schedulers", Gadget(compile, "1", "x", "eval")),
    "open": inside("callbacks", Gadget(open, MARK, "w")),
    "subprocess": inside("callbacks", Gadget(subprocess.Popen, ["touch", MARK])),
    "a method": inside("hyperparameters", Gadget(pathlib.Path.touch, pathlib.Path(MARK))),
    "an import": inside("loops", Gadget(__import__, "antigravity")),
    "importlib": inside("position", Gadget(importlib.import_module, "this")),
    "functools.partial": inside("hyperparameters of the data", Gadget(functools.partial, os.system, TOUCH)),
    "attrgetter": inside("version", Gadget(operator.attrgetter, "system")),
    "methodcaller": inside("top", Gadget(operator.methodcaller, "touch")),
    "removing": inside("an attribute of a tensor", Gadget(os.remove, PRECIOUS)),
    "removing a folder": inside("optimizers", Gadget(shutil.rmtree, OUTSIDE)),
    "torch.load within": inside("weights", Gadget(torch.load, MARK)),
    "torch.hub": inside("weights", Gadget(torch.hub.load, OUTSIDE, "x")),
    "bytes to be loaded": inside("weights", Gadget(torch.storage._load_from_bytes, saved(Gadget(os.system, TOUCH)))),
    "an import of numpy": lambda: archive(program(call("numpy.testing._private.utils", "runstring", text(f"open({MARK!r},'w')"), b"}"))),
    "a call through a tensor's type": lambda: archive(
        program(call("torch._tensor", "_rebuild_from_type_v2", b"cposix\nsystem\n", b"ctorch\nTensor\n", b"(" + text(TOUCH) + b"t", b"}"))
    ),
    "a call of a called thing": lambda: archive(
        program(call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system")))
    ),
    "a hook of a tensor": lambda: saved(
        checkpoint(x=Gadget(torch._utils._rebuild_parameter, torch.ones(1), True, {0: Gadget(os.system, TOUCH)}))
    ),
    # how a pickle names it
    "protocol 0": lambda: archive(pickle.dumps(Gadget(os.system, TOUCH), 0)),
    "protocol 4": lambda: archive(pickle.dumps(Gadget(os.system, TOUCH), 4)),
    "protocol 5": lambda: archive(pickle.dumps(Gadget(os.system, TOUCH), 5)),
    "an instance": lambda: archive(b"(S'" + TOUCH.encode() + b"'\niposix\nsystem\n."),
    "an object": lambda: archive(b"(cposix\nsystem\nS'" + TOUCH.encode() + b"'\no."),
    "an extension": lambda: archive(b"\x80\x02\x82\x01."),
    "a strange persistent id": lambda: archive(program(b"(" + text("module") + SYSTEM + text(TOUCH) * 3 + b"tQ")),
    "a storage of a strange type": lambda: archive(program(b"(" + text("storage") + SYSTEM + text("0") + text("cpu") + b"K\x01tQ")),
    "a storage that climbs": lambda: archive(program(STORAGE.replace(text("0"), text("../../../../etc/passwd")))),
    # other containers
    "a bare pickle": lambda: pickle.dumps(checkpoint(x=Gadget(os.system, TOUCH))),
    "a bare pickle of protocol 0": lambda: pickle.dumps(checkpoint(epoch=Gadget(os.system, TOUCH), state_dict={}), 0),
    "the format of old": lambda: legacy(program(call("posix", "system", text(TOUCH)))),
    "the format of old, a module": lambda: legacy(program(b"(" + text("module") + SYSTEM + text(TOUCH) * 2 + b"tQ")),
    "the oldest format": tape,
    "a compiled program": compiled,
    "names that climb": climbing,
    "an archive in a comment": two_ends,
    "text": lambda: b"import os\nos.system('" + TOUCH.encode() + b"')\n",
    "nothing": lambda: b"",
    "zeros": lambda: bytes(5000),
    # sizes
    "zip bomb": unfolding,
    "zip bomb in the pickle": lambda: archive(program(b"X" + struct.pack("<I", 2 * 10**8) + b"x" * (2 * 10**8)), zipfile.ZIP_DEFLATED),
    "a large declared size": lambda: declared_size(0xFFFFFF00),
    "overlapping records": overlapping,
    "cut off": lambda: saved(checkpoint())[:-300],
    "a large array of bytes": lambda: archive(program(call("__builtin__", "bytearray", number(MUCH)))),
    "a large tensor": lambda: archive(program(call("torch", "Tensor", number(MUCH)))),
    "a large storage": lambda: archive(program(call("torch.storage", "UntypedStorage", number(MUCH)))),
    "a large storage of old": lambda: legacy(program(STORAGE.replace(b"K\x01tQ", number(MUCH) + b"NtQ"))),
    "a view beyond the storage": lambda: archive(
        program(call("torch._utils", "_rebuild_tensor_v2", STORAGE, b"K\x00", b"(" + number(MUCH) + b"t", b"(K\x01t", b"\x89", b"}")),
        data_0=bytes(4),
    ),
    "a text longer than the file": lambda: archive(program(b"X" + struct.pack("<I", 0xFFFFFFFF) + b"x")),
    "a deep list": lambda: archive(program(b"]" * 100_000 + b"a" * 99_999)),
    "doubling lists": lambda: archive(doubling(b"](", b"e", key=text("hyper_parameters"))),
    "doubling tuples": lambda: archive(doubling(b"", b"\x86", key=text("state_dict"))),
    "doubling dicts": lambda: archive(doubling(b"}(K\x00", b"u", b"K\x01", key=text("optimizer_states"))),
    "a doubling key": lambda: archive(doubling(b"", b"\x86")),
    "a doubling key of old": lambda: legacy(doubling(b"", b"\x86")),
    "a key that doubles less often": lambda: archive(doubling(b"", b"\x86", depth=25)),
    "a place far away in the memory": lambda: archive(program(b"}r" + struct.pack("<I", 0xFFFFFFF0))),
}

PLAIN = "__keraunos__"  # the tag of what torch's reader does not know


def tagged(kind: str, value: Any = None, **details: Any) -> Hostile:
    return inside("hyperparameters", {PLAIN: kind, **details, "value": value})


# Nothing of these is executed either; they may be refused, or be loaded as the data that they are.
HARMLESS: dict[str, Hostile] = {
    "class path": inside("hyperparameters", {"class_path": "os.system", "init_args": {"command": TOUCH}}),
    "instantiator": lambda: saved(checkpoint(hyper_parameters={"_instantiator": "os.system", "_class_path": "os.system", "width": 1})),
    "target": inside("hyperparameters", {"_target_": "os.system", "command": TOUCH}),
    "resolver": inside("hyperparameters", "${oc.env:HOME}"),
    "enum of a function": tagged("enum", {"name": "x", "value": 1}, module="os", qualname="system"),
    "dataclass of a process": tagged("dataclass", {"args": TOUCH}, module="subprocess", qualname="Popen"),
    "dataclass to be imported": tagged("dataclass", {}, module="antigravity", qualname="x"),
    "namedtuple of a module": tagged("namedtuple", {}, module="builtins", qualname="tuple"),
    "opaque": tagged("opaque", torch.frombuffer(bytearray(saved(Gadget(os.system, TOUCH))), dtype=torch.uint8), type="x", excerpt="x"),
    "zone": tagged("zoneinfo", "../../../../../etc/passwd"),
    "many in a set": tagged("frozenset", {PLAIN: "range", "value": [0, 10**12, 1]}),
    "many in a queue": tagged("deque", {PLAIN: "range", "value": [0, 10**12, 1]}, maxlen=None),
    "many bytes": tagged("bytes", {PLAIN: "range", "value": [0, 10**12, 1]}),
    "a large fraction": tagged("fraction", ["1e1000000000"]),
    "a large decimal": tagged("decimal", "1e1000000000"),
    "a large array": tagged("numpy.ndarray", torch.empty(0, dtype=torch.uint8), shape=[10**12], dtype="|u1"),
    "a strange dtype": tagged("numpy.dtype", None, dtype="|O8,(100000,100000)f8"),
    "a strange tag": tagged("os.system", TOUCH),
    "a tag without its parts": inside("hyperparameters", {PLAIN: "dataclass"}),
    "a stand-in for a file elsewhere": lambda: saved(checkpoint(state_dict={"layer.weight": stand_in(), "layer.bias": torch.ones(1)})),
    "a wide view of one number": lambda: saved(checkpoint(state_dict={"layer.weight": torch.ones(1).expand(10**10, 1000)})),
    "a large tensor without memory": lambda: saved(checkpoint(state_dict={"layer.weight": torch.empty(10**12, device="meta")})),
    "the state of a strange callback": inside("callbacks", OUTSIDE),
    "files of others in the books": lambda: saved(
        checkpoint(
            callbacks={
                "ModelCheckpoint": {"best_k_models": {PRECIOUS: torch.ones(())}, "last_model_path": PRECIOUS, "best_model_path": PRECIOUS}
            }
        )
    ),
}


def stand_in() -> torch.Tensor:
    tensor = torch.empty(1, 1, device="meta")
    tensor.stored_as, tensor.stored_in = "x", OUTSIDE  # type: ignore[attr-defined]
    return tensor


CORPUS = {**REFUSED, **HARMLESS}
