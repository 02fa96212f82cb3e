"""The documented import path of ``XLAPrecision``."""

from lightning.fabric.plugins.precision.xla import XLAPrecision

__all__ = ["XLAPrecision"]
