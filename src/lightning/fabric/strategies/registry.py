"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy


class StrategyRegistry(dict[str, dict[str, Any]]):
    """Strategy classes by name, so that ``Trainer(strategy="name")`` finds them.

    Example::

        >>> from lightning.fabric.strategies import DDPStrategy
        >>> registry = StrategyRegistry()
        >>> registry.register("ddp_large_buckets", DDPStrategy, description="few, large messages", bucket_cap_mb=100)
        <class 'lightning.fabric.strategies.ddp.DDPStrategy'>
        >>> type(registry.get("ddp_large_buckets")).__name__, registry.available_strategies()
        ('DDPStrategy', ['ddp_large_buckets'])
    """

    def register(
        self,
        name: str,
        strategy: Callable[..., Strategy] | None = None,
        description: str | None = None,
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Enter a strategy; without ``strategy`` the result is a decorator for its class.

        Args:
            name: the name for ``Trainer(strategy=name)``.
            strategy: the class, or a function that returns an instance.
            description: a line about it.
            override: whether it may take the place of another of the same name.
            init_params: keywords for ``strategy`` when it is called.

        Raises:
            TypeError: if ``name`` is not a string.
            MisconfigurationException: if the name is taken and ``override`` is False.
        """
        if not isinstance(name, str):
            raise TypeError(f"The name of a strategy must be a string; got {name!r}.")
        if name in self and not override:
            raise MisconfigurationException(
                f"A strategy named {name!r} is registered already. Choose another name, or pass override=True to replace it."
            )

        def enter(value: Callable[..., Strategy]) -> Callable[..., Strategy]:
            self[name] = {
                "strategy_name": name,
                "strategy": value,
                "description": description or "",
                "init_params": init_params,
            }
            return value

        return enter if strategy is None else enter(strategy)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a new instance of the strategy ``name``; ``default`` if there is none of that name.

        Raises:
            KeyError: if there is none and no default was given.
        """
        if name not in self:
            if default is not None:
                return default
            raise KeyError(f"No strategy is registered as {name!r}. Registered: {', '.join(self.available_strategies())}.")
        entry = self[name]
        return entry["strategy"](**entry["init_params"])

    def remove(self, name: str) -> None:
        """Take the strategy ``name`` out.

        Raises:
            KeyError: if there is none of that name.
        """
        self.pop(name)

    def available_strategies(self) -> list[str]:
        """Return the names in the order in which they were registered."""
        return list(self)

    def __str__(self) -> str:
        return f"Registered strategies: {', '.join(self)}"


STRATEGY_REGISTRY = StrategyRegistry()
