"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.registry import Registry

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy


class StrategyRegistry(Registry):
    """Strategy classes by name, so that ``Trainer(strategy="name")`` finds them.

    Example::

        >>> from lightning.fabric.strategies import DDPStrategy
        >>> registry = StrategyRegistry()
        >>> registry.register("ddp_large_buckets", DDPStrategy, description="few, large messages", bucket_cap_mb=100)
        <class 'lightning.fabric.strategies.ddp.DDPStrategy'>
        >>> type(registry.get("ddp_large_buckets")).__name__, registry.available_strategies()
        ('DDPStrategy', ['ddp_large_buckets'])
    """

    kind, article = "strategy", "a"

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
        return self.enter(name, strategy, description, override, init_params)

    def available_strategies(self) -> list[str]:
        """Return the names in the order in which they were registered."""
        return list(self)

    def __str__(self) -> str:
        return f"Registered strategies: {', '.join(self)}"


STRATEGY_REGISTRY = StrategyRegistry()
