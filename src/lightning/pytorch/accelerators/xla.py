"""The documented import path of what ``lightning.fabric.accelerators.xla`` owns."""

from lightning.fabric.accelerators.xla import XLAAccelerator

__all__ = ["XLAAccelerator"]
