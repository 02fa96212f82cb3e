"""How modules, optimizers and data are laid out over devices and processes."""

from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy

__all__ = ["SingleDeviceStrategy", "Strategy"]
