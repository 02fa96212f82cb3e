"""Checkpoint plugins; written in :mod:`lightning.fabric.checkpoint.io`."""

from lightning.fabric.checkpoint.io import CheckpointIO, TorchCheckpointIO

__all__ = ["CheckpointIO", "TorchCheckpointIO"]
