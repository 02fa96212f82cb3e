"""The documented import path of ``TransformerEnginePrecision``."""

from lightning.fabric.quantization.transformer_engine import TransformerEnginePrecision

__all__ = ["TransformerEnginePrecision"]
