"""The documented import path of FSDPStrategy."""

from lightning.fabric.strategies.fsdp import FSDPStrategy

__all__ = ["FSDPStrategy"]
