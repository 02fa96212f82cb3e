"""The documented import path of precision and checkpoint plugins."""

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO, XLACheckpointIO
from lightning.fabric.plugins.precision import *  # noqa: F403
from lightning.fabric.plugins.precision import __all__ as _precision

__all__ = ["CheckpointIO", "TorchCheckpointIO", "XLACheckpointIO", *_precision]
