"""The documented import path of ``Precision``."""

from lightning.fabric.precision import Precision

__all__ = ["Precision"]
