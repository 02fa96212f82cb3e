"""The documented import path of ``HalfPrecision``."""

from lightning.fabric.precision import HalfPrecision

__all__ = ["HalfPrecision"]
