"""The documented import path of what ``lightning.fabric.accelerators.mps`` owns."""

from lightning.fabric.accelerators.mps import MPSAccelerator, get_device_stats

__all__ = ["MPSAccelerator", "get_device_stats"]
