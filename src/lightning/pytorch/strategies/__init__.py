"""The documented import path of the strategies, which fabric owns."""

from typing import TYPE_CHECKING, Any

from lightning.fabric import strategies as owner

if TYPE_CHECKING:
    from lightning.fabric.strategies import (
        STRATEGY_REGISTRY,
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        ParallelStrategy,
        SingleDeviceStrategy,
        Strategy,
    )

    StrategyRegistry = STRATEGY_REGISTRY

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "Strategy",
    "StrategyRegistry",
]


def __getattr__(name: str) -> Any:
    return getattr(owner, "STRATEGY_REGISTRY" if name == "StrategyRegistry" else name)
