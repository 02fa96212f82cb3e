"""The module and the datamodule that users derive theirs from."""

from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.module import LightningModule

__all__ = ["LightningDataModule", "LightningModule"]
