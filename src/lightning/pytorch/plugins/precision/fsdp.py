"""The documented import path of FSDPPrecision."""

from lightning.fabric.plugins.precision.fsdp import FSDPPrecision

__all__ = ["FSDPPrecision"]
