"""The documented path of AsyncCheckpointIO."""

from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO

__all__ = ["AsyncCheckpointIO"]
