"""Checkpoint plugins; written in :mod:`lightning.fabric.checkpoint.io`."""

from lightning.fabric.checkpoint.io import CheckpointIO, TorchCheckpointIO
from lightning.fabric.plugins.io.xla import XLACheckpointIO

__all__ = ["CheckpointIO", "TorchCheckpointIO", "XLACheckpointIO"]
