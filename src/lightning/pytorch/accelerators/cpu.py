"""The documented import path of what ``lightning.fabric.accelerators.cpu`` owns."""

from lightning.fabric.accelerators.cpu import CPUAccelerator, get_cpu_stats

__all__ = ["CPUAccelerator", "get_cpu_stats"]
