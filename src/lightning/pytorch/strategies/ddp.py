"""The documented import path of DDPStrategy."""

from lightning.fabric.strategies.ddp import DDPStrategy

__all__ = ["DDPStrategy"]
