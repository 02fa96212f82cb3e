"""The documented import path of ``BitsandbytesPrecision``."""

from lightning.fabric.quantization.bitsandbytes import BitsandbytesPrecision

__all__ = ["BitsandbytesPrecision"]
