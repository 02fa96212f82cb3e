"""How modules, optimizers and data are laid out over devices and processes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
    from lightning.fabric.strategies.fsdp import FSDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
    from lightning.fabric.strategies.parallel import ParallelStrategy
    from lightning.fabric.strategies.registry import StrategyRegistry
    from lightning.fabric.strategies.single_xla import SingleDeviceXLAStrategy, SingleTPUStrategy
    from lightning.fabric.strategies.xla import XLAStrategy
    from lightning.fabric.strategies.xla_fsdp import XLAFSDPStrategy

    STRATEGY_REGISTRY: StrategyRegistry

# Where the others are, imported when they are first asked for: a run on one device needs none of them.
LATER = {
    "DDPStrategy": "lightning.fabric.strategies.ddp",
    "DeepSpeedStrategy": "lightning.fabric.strategies.deepspeed",
    "FSDPStrategy": "lightning.fabric.strategies.fsdp",
    "ModelParallelStrategy": "lightning.fabric.strategies.model_parallel",
    "ParallelStrategy": "lightning.fabric.strategies.parallel",
    "SingleDeviceXLAStrategy": "lightning.fabric.strategies.single_xla",
    "SingleTPUStrategy": "lightning.fabric.strategies.single_xla",
    "XLAFSDPStrategy": "lightning.fabric.strategies.xla_fsdp",
    "XLAStrategy": "lightning.fabric.strategies.xla",
}

__all__ = [
    "STRATEGY_REGISTRY",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "SingleTPUStrategy",
    "Strategy",
    "XLAFSDPStrategy",
    "XLAStrategy",
]


def __getattr__(name: str) -> Any:
    if name == "STRATEGY_REGISTRY":
        return _registry()
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _registry() -> Any:
    """The registry, with the names of all strategies of ours."""
    from lightning.fabric.strategies.registry import STRATEGY_REGISTRY

    for kind in (SingleDeviceStrategy, *(getattr(import_module(module), name) for name, module in LATER.items())):
        kind.register_strategies(STRATEGY_REGISTRY)
    globals()["STRATEGY_REGISTRY"] = STRATEGY_REGISTRY
    return STRATEGY_REGISTRY
