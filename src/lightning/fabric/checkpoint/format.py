"""What a checkpoint file may hold.

``torch.load(weights_only=True)`` reads tensors and plain Python data and refuses everything else, because unpickling can
run any code. :func:`encode` turns what it would refuse into tagged plain data when saving, :func:`decode` turns it back
when loading, without running anything that the file names. In three steps of fidelity:

- paths, enums, dataclasses, named tuples, namespaces, dates, numpy values, OmegaConf containers and more come back as
  they were (see :mod:`~lightning.fabric.checkpoint.kinds` and :mod:`~lightning.fabric.checkpoint.classes`);
- if the class of an enum, dataclass or named tuple is not imported, its data comes back as :class:`Unresolved`;
- anything else that can be pickled is kept as bytes and comes back as :class:`Opaque`, or as itself from a trusted file.

A tagged value is a dict with the key ``TAG``, which names the kind. A dict of the user's with such a key is tagged itself.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from lightning.fabric.checkpoint.classes import (
    CannotBuild,
    build_dataclass,
    build_enum,
    build_namedtuple,
    dataclass_state,
    enum_state,
    find_class,
    is_namedtuple_class,
    is_plain_dataclass,
    module_of,
    pickles_itself,
)
from lightning.fabric.checkpoint.kinds import MAX_INT_BITS, STANDARD, TENSOR, Kind, kind_named, listed, special_kind
from lightning.fabric.checkpoint.placeholders import Opaque, Unresolved
from lightning.fabric.utilities.rank_zero import rank_zero_warn

__all__ = ["TAG", "Opaque", "Unresolved", "decode", "encode", "find_placeholders", "find_unstorable"]

TAG = "__keraunos__"
ACCEPTED = (
    "tensors, numbers, strings, lists, tuples, dicts, sets, paths, enums, dataclasses, named tuples, namespaces, dates, numpy values, "
    "OmegaConf containers and whatever pickle can store"
)
# What torch's safe reader takes as it is, and holds nothing that it would refuse.
LEAVES = frozenset(
    (type(None), bool, float, complex, str, bytearray, torch.dtype, torch.device, torch.layout, torch.qscheme, torch.Size,
     torch.UntypedStorage, torch.storage.TypedStorage)
)  # fmt: skip
TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
MAPPINGS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
CLASS_KINDS = ("dataclass", "enum", "namedtuple")
EXCERPT = 200
TOO_DEEP = "The data is nested too deeply for a checkpoint."

# Where in the structure: (the parent's place, the key or index there), or None at the top. Spelled out only for messages.
Place = Any


def spell(place: Place, prefix: str = "") -> str:
    """``hyper_parameters.layers[0]``, as a user would write it."""
    steps: list[str] = []
    while place is not None:
        place, key = place
        steps.append(f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]")
    return (prefix + "".join(reversed(steps))).lstrip(".") or "the value itself"


def only_small_numbers(obj: Any) -> bool:
    """Whether a list holds integers only, all of which torch's safe reader takes: indices of a sampler, a million of them."""
    return set(map(type, obj)) == {int} and max(obj).bit_length() < MAX_INT_BITS > min(obj).bit_length()


class Walker:
    """Rebuilds the containers around values that change; whatever holds no such value stays the same object."""

    leaves = LEAVES

    def __init__(self) -> None:
        # id -> (the object, kept alive so that the id stays its own; the result). Shared objects stay shared.
        self.done: dict[int, tuple[Any, Any]] = {}
        self.within: set[int] = set()
        self.cycles: set[int] = set()

    def value(self, obj: Any, place: Place) -> Any:
        raise NotImplementedError

    def walk(self, obj: Any, place: Place, convert: Callable[[Any, Place], Any]) -> Any:
        """``convert(obj, place)``, once per object; an object inside itself is left as it is, and must then not change."""
        key = id(obj)
        if key in self.done:
            return self.done[key][1]
        if key in self.within:
            self.cycles.add(key)
            return obj
        self.within.add(key)
        result = convert(obj, place)
        self.within.discard(key)
        if key in self.cycles and result is not obj:
            self.refuse_cycle(obj, place)
        self.done[key] = (obj, result)
        return result

    def refuse_cycle(self, obj: Any, place: Place) -> None:
        raise ValueError(
            f"{spell(place)} of type {full_name(type(obj))} contains itself, and a value that has to be converted: break the cycle."
        )

    def sequence(self, obj: Any, place: Place) -> Any:
        """A list or tuple."""
        if set(map(type, obj)) <= self.leaves:
            return obj
        parts = [part if type(part) in self.leaves else self.value(part, (place, i)) for i, part in enumerate(obj)]
        if all(new is old for new, old in zip(parts, obj)):
            return obj
        return parts if type(obj) is list else tuple(parts)

    def mapping(self, obj: Any, place: Place) -> Any:
        """The values of a dict, OrderedDict or Counter, and what an OrderedDict carries as attributes (a state_dict's versions)."""
        changes = {}
        for key, part in obj.items():
            if type(part) not in self.leaves and (new := self.value(part, (place, key))) is not part:
                changes[key] = new
        attributes = vars(obj) if type(obj) is not dict else None
        new_attributes = self.mapping(attributes, place) if attributes else attributes
        if not changes and new_attributes is attributes:
            return obj
        result = type(obj)({key: changes.get(key, part) for key, part in obj.items()})
        if new_attributes:
            vars(result).update(new_attributes)
        return result


class Encoder(Walker):
    """Turns values into plain data; with ``problems`` given, notes what can't be stored instead of raising."""

    def __init__(self, problems: list[tuple[str, type, str]] | None = None, prefix: str = "") -> None:
        super().__init__()
        self.problems = problems
        self.prefix = prefix
        self.allowed = set(torch.serialization.get_safe_globals())  # what the user has declared safe stays as it is

    def value(self, obj: Any, place: Place) -> Any:
        cls = type(obj)
        if cls in LEAVES or (cls is int and obj.bit_length() < MAX_INT_BITS) or (cls is bytes and obj):
            return obj
        return self.walk(obj, place, self.convert)

    def convert(self, obj: Any, place: Place) -> Any:
        cls = type(obj)
        if cls in (list, tuple):
            return obj if only_small_numbers(obj) else self.sequence(obj, place)
        if cls in (dict, OrderedDict, Counter):
            return self.keyed(obj, place)
        if cls is set:
            return self.elements(obj, place)
        if isinstance(obj, torch.Tensor) and (cls in TENSORS or cls in self.allowed):
            attributes = vars(obj)
            changed = bool(attributes) and cls in TENSORS and self.mapping(attributes, place) is not attributes
            return self.tagged(TENSOR, obj, place) if changed else obj
        if cls in self.allowed:
            return obj
        kind = STANDARD.get(cls) or special_kind(obj, cls)
        if kind is not None:
            return self.tagged(kind, obj, place)
        if issubclass(cls, enum.Enum):
            return self.by_class("enum", obj, enum_state(obj), place)
        if issubclass(cls, tuple) and is_namedtuple_class(cls) and not getattr(obj, "__dict__", None):
            return self.by_class("namedtuple", obj, dict(zip(obj._fields, obj)), place)
        if dataclasses.is_dataclass(cls) and is_plain_dataclass(cls) and not pickles_itself(cls) and not isinstance(obj, torch.nn.Module):
            return self.by_class("dataclass", obj, dataclass_state(obj), place)
        if cls is Opaque:
            return {TAG: "opaque", "type": obj.type_name, "excerpt": obj.excerpt, "value": obj.data}
        if cls is Unresolved and obj.raw is not None:
            return obj.raw
        return self.pickled(obj, place)

    def keyed(self, obj: Any, place: Place) -> Any:
        keys = [key if type(key) in LEAVES else self.value(key, (place, key)) for key in obj]
        values = self.mapping(obj, place)
        if any(new is not old for new, old in zip(keys, obj)):
            return {TAG: "items", "type": type(obj).__name__, "value": [list(item) for item in zip(keys, values.values())]}
        return {TAG: "dict", "value": values} if type(obj) is dict and TAG in obj else values

    def elements(self, obj: set[Any], place: Place) -> Any:
        parts = [part if type(part) in LEAVES else self.value(part, (place, part)) for part in obj]
        return obj if all(new is old for new, old in zip(parts, obj)) else {TAG: "set", "value": parts}

    def tagged(self, kind: Kind, obj: Any, place: Place) -> Any:
        try:
            details, content = kind.write(obj)
        except CannotBuild as reason:
            return self.pickled(obj, place, str(reason))
        return {TAG: kind.name, **details, "value": self.value(content, place)}

    def by_class(self, kind: str, obj: Any, state: dict[str, Any], place: Place) -> Any:
        cls = type(obj)
        return {TAG: kind, "module": module_of(cls), "qualname": cls.__qualname__, "value": self.mapping(state, place)}

    def refuse_cycle(self, obj: Any, place: Place) -> None:
        if self.problems is None:
            super().refuse_cycle(obj, place)
        else:
            self.problems.append((spell(place, self.prefix), type(obj), "it contains itself, and a value that has to be converted"))

    def pickled(self, obj: Any, place: Place, reason: str = "") -> Any:
        try:
            data = None if self.problems is not None else to_bytes(obj)
            if data is None:
                Probe(Nowhere(), protocol=2).dump(obj)
        except Exception as error:  # whatever the object's own __reduce__ raises
            reason = reason or f"{type(error).__name__}: {error}"
            if self.problems is None:
                raise TypeError(
                    f"{spell(place, self.prefix)} of type {full_name(type(obj))} can't be stored in a checkpoint ({reason}). "
                    f"A checkpoint holds {ACCEPTED}: replace the value, or leave it out (hyperparameters: "
                    "save_hyperparameters(ignore=...))."
                ) from error
            self.problems.append((spell(place, self.prefix), type(obj), reason))
            return obj
        return {TAG: "opaque", "type": full_name(type(obj)), "excerpt": excerpt_of(obj), "value": data}


class Decoder(Walker):
    """Turns tagged plain data back into values."""

    leaves = LEAVES | TENSORS | {int, bytes, set}

    def __init__(self, trusted: bool, map_location: Any) -> None:
        super().__init__()
        self.trusted = trusted
        self.map_location = map_location
        self.unresolved: list[Unresolved] = []

    def value(self, obj: Any, place: Place) -> Any:
        cls = type(obj)
        if cls is dict or cls is list or cls is tuple or cls is OrderedDict or cls is Counter:
            return self.walk(obj, place, self.convert)
        return obj

    def convert(self, obj: Any, place: Place) -> Any:
        if type(obj) in (list, tuple):
            return self.sequence(obj, place)
        if type(obj) is not dict or TAG not in obj:
            return self.mapping(obj, place)
        name = obj[TAG]
        if name == "opaque" and self.trusted and not obj["value"].is_meta:
            return from_bytes(obj["value"], self.map_location)
        try:
            return self.untagged(name, obj, place)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            if isinstance(error, RecursionError):
                raise
            raise ValueError(f"{spell(place)} is damaged: not a proper {name!r} ({type(error).__name__}: {error})") from error

    def untagged(self, name: Any, obj: dict[str, Any], place: Place) -> Any:
        if name == "dict":
            return self.mapping(obj["value"], place)
        if name == "items":
            return MAPPINGS[obj["type"]](dict(self.value(obj["value"], place)))
        if name == "set":
            return set(listed(self.value(obj["value"], place)))
        if name == "opaque":
            return Opaque(str(obj["type"]), str(obj["excerpt"]), obj["value"])
        content = self.mapping(obj["value"], place) if name in CLASS_KINDS else self.value(obj["value"], place)
        try:
            if name in CLASS_KINDS:
                build = {"dataclass": build_dataclass, "enum": build_enum, "namedtuple": build_namedtuple}[name]
                return build(find_class(obj["module"], obj["qualname"], may_import=self.trusted), content)
            kind = kind_named(name)
            if kind is None:
                raise CannotBuild("a later version of Keraunos wrote it: update before loading")
            if isinstance(content, Unresolved):
                raise CannotBuild(content.reason)
            return kind.read({key: value for key, value in obj.items() if key not in (TAG, "value")}, content)
        except CannotBuild as reason:
            type_name = f"{obj['module']}.{obj['qualname']}" if name in CLASS_KINDS else str(name)
            data = content if type(content) is dict else {"value": content}
            self.unresolved.append(Unresolved(str(name), type_name, data, str(reason), raw=obj))
            return self.unresolved[-1]


def encode(obj: Any) -> Any:
    """``obj`` with every value that ``torch.load(weights_only=True)`` would refuse in the form of plain data.

    Args:
        obj: a checkpoint, or any value in it. It is never changed; parts without such values are returned as they are.

    Raises:
        TypeError: if a value can't be stored at all; the message names the path to it.
        ValueError: if a container with such values contains itself.

    Example::

        >>> from pathlib import PurePosixPath
        >>> encode({"lr": 0.1, "data": PurePosixPath("x/y")})
        {'lr': 0.1, 'data': {'__keraunos__': 'path', 'flavour': 'PurePosixPath', 'value': 'x/y'}}
    """
    try:
        return Encoder().value(obj, None)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def decode(obj: Any, trusted: bool = False, map_location: Any = None) -> Any:
    """What :func:`encode` was given, from what it returned.

    Args:
        obj: the plain data. It is never changed.
        trusted: unpickle opaque values and import the modules of unknown classes. Both can run any code.
        map_location: where the tensors of opaque values go, as for :func:`torch.load`.

    Raises:
        ValueError: if the data is damaged; the message names the path to it.

    Example::

        >>> decode(encode({"window": range(3)}))
        {'window': range(0, 3)}
    """
    decoder = Decoder(trusted, map_location)
    try:
        result = decoder.value(obj, None)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if decoder.unresolved:
        listed = "; ".join(sorted({f"{value.type_name}: {value.reason}" for value in decoder.unresolved}))
        rank_zero_warn(f"Some values of the checkpoint could not be rebuilt, and only their data is there ({listed}).")
    return result


def find_unstorable(obj: Any, path: str = "") -> list[tuple[str, type, str]]:
    """Every value in ``obj`` that :func:`encode` would refuse: the path to it, its type, and the reason.

    Args:
        obj: anything, hyperparameters for example. Nothing is copied, tensors are not looked into.
        path: what to call ``obj`` itself.

    Example::

        >>> [(where, kind.__name__) for where, kind, _ in find_unstorable({"act": lambda x: x}, "hyper_parameters")]
        [('hyper_parameters.act', 'function')]
    """
    problems: list[tuple[str, type, str]] = []
    try:
        Encoder(problems, path).value(obj, None)
    except RecursionError:
        problems.append((path or spell(None), type(obj), TOO_DEEP))
    return problems


def find_placeholders(obj: Any, path: str = "") -> list[tuple[str, Opaque | Unresolved]]:
    """Every :class:`Opaque` and :class:`Unresolved` in the dicts, lists and tuples of ``obj``, with the path to it.

    Example::

        >>> find_placeholders({"net": Opaque("Net", "Net()", None)})[0][0]
        'net'
    """
    found: list[tuple[str, Opaque | Unresolved]] = []
    seen: set[int] = set()

    def look(value: Any, place: Place) -> None:
        if isinstance(value, (Opaque, Unresolved)):
            found.append((spell(place, path), value))
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                look(part, (place, key))

    look(obj, None)
    return found


# --- bytes ----------------------------------------------------------------------------------------------------------


class Nowhere(io.RawIOBase):
    """A file that forgets what is written to it."""

    def write(self, data: Any) -> int:
        return len(data)


class Probe(pickle.Pickler):
    """Pickles to find out whether it works; tensors are left out, since they always do."""

    def persistent_id(self, obj: Any) -> Any:
        return "tensor" if isinstance(obj, (torch.Tensor, torch.UntypedStorage, torch.storage.TypedStorage)) else None


def to_bytes(obj: Any) -> torch.Tensor:
    """The pickle of ``obj`` in a tensor, which a checkpoint stores without another copy."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def from_bytes(data: torch.Tensor, map_location: Any) -> Any:
    """Unpickle: runs whatever the bytes say. For trusted files only."""
    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location=map_location, weights_only=False)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def excerpt_of(obj: Any) -> str:
    if isinstance(obj, (types.FunctionType, type)):
        return f"{obj.__module__}.{obj.__qualname__}"
    try:
        text = repr(obj)
    except Exception:  # a user's __repr__ must not keep a checkpoint from being saved
        text = object.__repr__(obj)
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…"
