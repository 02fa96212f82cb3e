"""The documented path of TorchCheckpointIO."""

from lightning.fabric.checkpoint.io import TorchCheckpointIO

__all__ = ["TorchCheckpointIO"]
