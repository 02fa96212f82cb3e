"""Precisions that store weights in 8 or 4 bits, or multiply in 8, through libraries made for that."""

from lightning.fabric.quantization.bitsandbytes import BitsandbytesPrecision
from lightning.fabric.quantization.transformer_engine import TransformerEnginePrecision

__all__ = ["BitsandbytesPrecision", "TransformerEnginePrecision"]
