"""The documented import path of synchronised layers, which fabric owns."""

from lightning.fabric.plugins.layer_sync import LayerSync, TorchSyncBatchNorm

__all__ = ["LayerSync", "TorchSyncBatchNorm"]
