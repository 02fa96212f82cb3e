"""The documented import path of ``MixedPrecision``."""

from lightning.fabric.precision import MixedPrecision

__all__ = ["MixedPrecision"]
