"""Enums, dataclasses and named tuples in a checkpoint: taken apart when saving, put together when loading.

A file names such a class by module and qualified name. The rules that keep a hostile file harmless:

- a class counts only if its module is imported already; nothing is imported because a file says so;
- what the name leads to must be a class of the kind that the file claims;
- objects are made without running any method of the class: no ``__init__``, ``__post_init__``, ``__new__``,
  ``__setstate__``, ``_missing_``, property or ``__setattr__``, and none of a class that has a ``__del__``. What remains is
  ``__hash__`` and ``__eq__`` of an object that is the key of a dict or an element of a set.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import sys
from types import MemberDescriptorType, ModuleType
from typing import Any

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: set for classes that Python code defines
PICKLE_METHODS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
SAFE_FACTORIES: tuple[Any, ...] = (list, dict, set, frozenset, tuple, str, int, float, bool, bytes)


class CannotBuild(Exception):
    """Why a value of the file can't be rebuilt."""


def mro_of(cls: type) -> tuple[type, ...]:
    return type.__getattribute__(cls, "__mro__")  # type: ignore[no-any-return]


def namespace_of(cls: type) -> Any:
    return type.__getattribute__(cls, "__dict__")


def class_attribute(cls: type, name: str) -> Any:
    """The attribute as it stands in the class or one of its bases, without running descriptors or metaclass code."""
    for base in mro_of(cls):
        if name in namespace_of(base):
            return namespace_of(base)[name]
    return None


def module_of(cls: type) -> str:
    # A spawned worker runs the user's script under another name than the main process does.
    return "__main__" if cls.__module__ == "__mp_main__" else cls.__module__


def find_class(module: str, qualname: str, may_import: bool = False) -> type:
    """The class of that name in an imported module.

    Raises:
        CannotBuild: if the module is not imported or holds no such class.
    """
    if type(module) is not str or type(qualname) is not str:
        raise CannotBuild("its class has no proper name")
    if may_import and module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CannotBuild(f"importing {module} failed ({error})") from error
    found = sys.modules.get(module)
    # type() instead of isinstance and object.__getattribute__ instead of a dot: lazy modules and proxies run code otherwise.
    if found is None or not issubclass(type(found), ModuleType):
        raise CannotBuild(f"import {module} before loading")
    scope = object.__getattribute__(found, "__dict__")
    value: Any = None
    for part in qualname.split("."):
        value = scope.get(part)
        if not issubclass(type(value), type):
            raise CannotBuild(f"the module {module} has no class {qualname} at its top level")
        scope = namespace_of(value)
    return value  # type: ignore[no-any-return]


# --- enums ----------------------------------------------------------------------------------------------------------


def enum_state(member: enum.Enum) -> dict[str, Any]:
    """The name of a member, or the value of a combination of flags."""
    value = member._value_ if type(member._value_) in (str, int, float, bool) else None
    named = member._name_ in type(member).__members__
    return {"name": member._name_ if named else None, "value": value}


def build_enum(cls: type, state: dict[str, Any]) -> enum.Enum:
    if not issubclass(type(cls), enum.EnumMeta):
        raise CannotBuild("the class of that name is not an Enum")
    members: dict[str, enum.Enum] = type.__getattribute__(cls, "_member_map_")
    name, value = state["name"], state["value"]
    if type(name) is str:
        if name not in members:
            raise CannotBuild(f"the Enum has no member {name!r} (any more)")
        return members[name]
    flag = enum.IntFlag if enum.IntFlag in mro_of(cls) else enum.Flag
    # A combination of flags is made by Enum's own code, unless the class has its own rules for unknown values or new members.
    own_rules = class_attribute(cls, "_missing_") is not class_attribute(flag, "_missing_") or class_attribute(
        cls, "_member_type_"
    ) not in (object, int)
    if type(value) is not int or flag not in mro_of(cls) or own_rules:
        raise CannotBuild("the Enum can't hold such a value")
    try:
        member: enum.Enum = enum.EnumMeta.__call__(cls, value)
    except ValueError as error:
        raise CannotBuild(str(error)) from None
    return member


# --- named tuples ---------------------------------------------------------------------------------------------------


def is_namedtuple_class(cls: type) -> bool:
    fields = class_attribute(cls, "_fields")
    return tuple in mro_of(cls) and type(fields) is tuple and all(type(name) is str for name in fields) and _has_no_finalizer(cls)


def build_namedtuple(cls: type, values: dict[str, Any]) -> Any:
    if not is_namedtuple_class(cls):
        raise CannotBuild("the class of that name is not a named tuple")
    fields: tuple[str, ...] = class_attribute(cls, "_fields")
    defaults = class_attribute(cls, "_field_defaults")
    complete = {**(defaults if type(defaults) is dict else {}), **values}
    if extra := [name for name in values if name not in fields]:
        raise CannotBuild(f"the class has no field {extra[0]!r} (any more)")
    if lacking := [name for name in fields if name not in complete]:
        raise CannotBuild(f"the file has no value for its field {lacking[0]!r}")
    return tuple.__new__(cls, [complete[name] for name in fields])


# --- dataclasses ----------------------------------------------------------------------------------------------------


def is_plain_dataclass(cls: type) -> bool:
    """Whether instances are nothing but their attributes: a dataclass whose bases are all written in Python."""
    return (
        class_attribute(cls, "__dataclass_fields__") is not None
        and all(base is object or base.__flags__ & HEAP_TYPE for base in mro_of(cls))
        and _has_no_finalizer(cls)
    )


def pickles_itself(cls: type) -> bool:
    """Whether the class has rules of its own for pickling, which taking its attributes would break."""
    for base in mro_of(cls):
        for name in PICKLE_METHODS:
            method = namespace_of(base).get(name)
            # frozen dataclasses with slots get __getstate__ and __setstate__ from the standard library
            if base is not object and method is not None and getattr(method, "__module__", "") != "dataclasses":
                return True
    return False


def dataclass_state(obj: Any) -> dict[str, Any]:
    """Every attribute of the instance: fields, what ``__post_init__`` has added, and slots; not what is computed on demand."""
    cls = type(obj)
    state: dict[str, Any] = {}
    for base in reversed(mro_of(cls)):
        for name, member in namespace_of(base).items():
            if isinstance(member, MemberDescriptorType) and name != "__weakref__":
                try:
                    state[name] = member.__get__(obj, cls)
                except AttributeError:  # a slot that was never filled
                    continue
    attributes: dict[str, Any] = getattr(obj, "__dict__", {})
    for name in attributes:
        if not name.startswith("__") and not isinstance(class_attribute(cls, name), functools.cached_property):
            state[name] = attributes[name]
    return state


def build_dataclass(cls: type, state: dict[str, Any]) -> Any:
    """Make an instance and put its attributes into place; fields that the file lacks get their plain defaults."""
    if not is_plain_dataclass(cls) or issubclass(type(cls), enum.EnumMeta):
        raise CannotBuild("the class of that name is not a dataclass that can be built from its fields alone")
    state = dict(state)
    for field in dataclasses.fields(cls):
        if field.name in state:
            continue
        if field.default is not dataclasses.MISSING:
            state[field.name] = field.default
            continue
        factory: Any = field.default_factory
        if not any(factory is safe for safe in SAFE_FACTORIES):
            raise CannotBuild(f"the file has no value for its field {field.name!r}")
        state[field.name] = factory()
    try:
        obj: Any = object.__new__(cls)
        for name, value in state.items():
            _place(obj, cls, name, value)
    except (TypeError, AttributeError) as error:
        raise CannotBuild(str(error)) from None
    return obj


def _place(obj: Any, cls: type, name: str, value: Any) -> None:
    if type(name) is not str or name.startswith("__"):
        raise CannotBuild(f"{name!r} is not the name of a field")
    slot = class_attribute(cls, name)
    if type(slot) is MemberDescriptorType:
        slot.__set__(obj, value)
    else:
        object.__getattribute__(obj, "__dict__")[name] = value


def _has_no_finalizer(cls: type) -> bool:
    return class_attribute(cls, "__del__") is None
