"""The documented import path of ``DeepSpeedPrecision``."""

from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision

__all__ = ["DeepSpeedPrecision"]
