"""The documented import path of ``DoublePrecision``."""

from lightning.fabric.precision import DoublePrecision

__all__ = ["DoublePrecision"]
