"""The Trainer."""

from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.trainer.trainer import Trainer

__all__ = ["Trainer", "seed_everything"]
