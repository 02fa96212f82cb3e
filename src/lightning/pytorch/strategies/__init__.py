"""The documented import path of the strategies, which fabric owns."""

from lightning.fabric.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy

__all__ = ["DDPStrategy", "ParallelStrategy", "SingleDeviceStrategy", "Strategy"]
