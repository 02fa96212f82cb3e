"""What LightningModule and LightningDataModule have in common."""

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

__all__ = ["HyperparametersMixin"]
