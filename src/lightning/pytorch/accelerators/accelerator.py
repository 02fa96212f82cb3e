"""The documented import path of what ``lightning.fabric.accelerators.accelerator`` owns."""

from lightning.fabric.accelerators.accelerator import Accelerator

__all__ = ["Accelerator"]
