"""What stands in a loaded checkpoint for a value that could not be rebuilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Opaque:
    """A value that only unpickling could bring back, left as bytes because the file was not declared as trusted.

    Attributes:
        type_name: the full name of the value's class.
        excerpt: the beginning of the value's ``repr`` at the time of saving.
        data: the pickled bytes, as a tensor of dtype uint8. Nothing here ever unpickles them.
    """

    __slots__ = ("data", "excerpt", "type_name")

    def __init__(self, type_name: str, excerpt: str, data: Any) -> None:
        self.type_name = type_name
        self.excerpt = excerpt
        self.data = data

    def __repr__(self) -> str:
        return (
            f"<Opaque {self.type_name}: {self.excerpt!r}. Not unpickled, since that can run code: "
            "load the checkpoint with weights_only=False if you trust its source>"
        )


class Unresolved(Mapping[str, Any]):
    """The data of a dataclass, enum or named tuple whose class is not there; reads like a dict of its fields.

    Attributes:
        kind: what the value was: ``"dataclass"``, ``"enum"``, ``"namedtuple"``, ...
        type_name: the full name of the value's class.
        reason: why the value could not be rebuilt, and what to do.

    Example::

        >>> config = Unresolved("dataclass", "train.Config", {"lr": 0.1}, "import train before loading")
        >>> config["lr"], config.type_name
        (0.1, 'train.Config')
    """

    __slots__ = ("data", "kind", "raw", "reason", "type_name")

    def __init__(self, kind: str, type_name: str, data: dict[str, Any], reason: str, raw: Any = None) -> None:
        self.kind = kind
        self.type_name = type_name
        self.data = data
        self.reason = reason
        self.raw = raw  # as it stood in the file, so that saving it again loses nothing

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"<Unresolved {self.kind} {self.type_name} {self.data!r}: {self.reason}>"
