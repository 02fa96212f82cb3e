"""The documented import path of the strategies, which fabric owns."""

from lightning.fabric.strategies import (
    STRATEGY_REGISTRY as StrategyRegistry,
)
from lightning.fabric.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    SingleTPUStrategy,
    Strategy,
    XLAFSDPStrategy,
    XLAStrategy,
)

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "SingleTPUStrategy",
    "Strategy",
    "StrategyRegistry",
    "XLAFSDPStrategy",
    "XLAStrategy",
]
