"""Classes by name, so that a user can ask for them, and register their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException


class Registry(dict[str, dict[str, Any]]):
    """Classes of one kind by name; an entry holds the class, a description, and the keywords for it."""

    kind: ClassVar[str]  # such as "strategy"
    article: ClassVar[str] = "a"

    def enter(
        self, name: str, value: Callable[..., Any] | None, description: str | None, override: bool, init_params: dict[str, Any]
    ) -> Any:
        """Enter a class, or return a decorator for one.

        Args:
            name: by which it will be asked for.
            value: the class, or a function that returns an instance.
            description: a line about it.
            override: whether it may take the place of another of the same name.
            init_params: keywords for it.

        Raises:
            TypeError: if ``name`` is not a string.
            MisconfigurationException: if the name is taken and ``override`` is False.
        """
        a_kind = f"{self.article} {self.kind}"
        if not isinstance(name, str):
            raise TypeError(f"The name of {a_kind} must be a string; got {name!r}.")
        if name in self and not override:
            raise MisconfigurationException(
                f"{a_kind.capitalize()} named {name!r} is registered already. Choose another name, or pass override=True to replace it."
            )

        def enter(value: Callable[..., Any]) -> Callable[..., Any]:
            self[name] = {
                f"{self.kind}_name": name,
                self.kind: value,
                "description": description or "",
                "init_params": init_params,
            }
            return value

        return enter if value is None else enter(value)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a new instance of what is registered as ``name``; ``default`` if there is nothing of that name.

        Raises:
            KeyError: if there is nothing, and no default was given.
        """
        if name not in self:
            if default is not None:
                return default
            raise KeyError(f"No {self.kind} is registered as {name!r}. Registered: {', '.join(sorted(self))}.")
        entry = self[name]
        return entry[self.kind](**entry["init_params"])

    def remove(self, name: str) -> None:
        """Take ``name`` out.

        Raises:
            KeyError: if there is nothing of that name.
        """
        self.pop(name)
