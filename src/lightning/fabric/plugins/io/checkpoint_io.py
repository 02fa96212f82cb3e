"""The documented path of CheckpointIO."""

from lightning.fabric.checkpoint.io import CheckpointIO

__all__ = ["CheckpointIO"]
