"""The documented import path of the precisions."""

from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.plugins.precision.xla import XLAPrecision
from lightning.fabric.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.fabric.quantization import BitsandbytesPrecision, TransformerEnginePrecision

__all__ = [
    "BitsandbytesPrecision",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "FSDPPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TransformerEnginePrecision",
    "XLAPrecision",
]
