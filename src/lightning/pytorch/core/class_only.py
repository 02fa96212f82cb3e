"""A class method that refuses to be called on an instance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    class_only = classmethod  # to a type checker it is nothing else
else:

    class class_only:
        """Like :class:`classmethod`, but ``instance.method()`` raises: its result would be dropped without a word.

        Example::

            >>> class Model:
            ...     @class_only
            ...     def load(cls):
            ...         return cls()
            >>> type(Model.load()).__name__
            'Model'
            >>> Model().load()
            Traceback (most recent call last):
            ...
            TypeError: `Model.load` makes a new object and cannot be called on an instance: call it on the class and keep what it returns.
        """

        def __init__(self, method: Callable[..., Any]) -> None:
            self.method = method
            functools.update_wrapper(self, method)

        def __get__(self, instance: Any, cls: type) -> Callable[..., Any]:
            # Looking the name up on an instance stays allowed (scripting and inspect do it); only the call is refused.
            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise TypeError(
                    f"`{cls.__name__}.{self.method.__name__}` makes a new object and cannot be called on an instance: "
                    "call it on the class and keep what it returns."
                )

            if instance is None:
                return MethodType(self.method, cls)
            functools.update_wrapper(refuse, self.method)
            return refuse
