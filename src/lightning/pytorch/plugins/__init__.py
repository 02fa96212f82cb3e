"""The documented import path of the plugins, which fabric owns."""

from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.plugins import *  # noqa: F403
from lightning.fabric.plugins import __all__ as _fabric
from lightning.fabric.plugins.layer_sync import LayerSync, TorchSyncBatchNorm

__all__ = ["AsyncCheckpointIO", "LayerSync", "TorchSyncBatchNorm", *_fabric]
