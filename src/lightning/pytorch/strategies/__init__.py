"""The documented import path of the strategies, which fabric owns."""

from lightning.fabric.strategies import SingleDeviceStrategy, Strategy

__all__ = ["SingleDeviceStrategy", "Strategy"]
