"""The documented import path of XLAStrategy."""

from lightning.fabric.strategies.xla import XLAStrategy

__all__ = ["XLAStrategy"]
