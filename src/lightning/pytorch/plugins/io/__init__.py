"""The documented import path of the checkpoint plugins, which fabric owns."""

from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.plugins.io import *  # noqa: F403
from lightning.fabric.plugins.io import __all__ as _fabric

__all__ = ["AsyncCheckpointIO", *_fabric]
