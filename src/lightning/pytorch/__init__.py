"""The Trainer and what it runs."""

import logging

from lightning._version import __version__
from lightning.fabric.utilities import rank_zero as _rank_zero
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.trainer.trainer import Trainer

__all__ = ["Callback", "LightningDataModule", "LightningModule", "Trainer", "__version__", "seed_everything"]

_logger = logging.getLogger("lightning.pytorch")
_logger.setLevel(_logger.level or logging.INFO)
if not _logger.handlers and not logging.getLogger().handlers:
    # Messages for users are seen without any set-up; an application that configures logging decides itself.
    _logger.addHandler(logging.StreamHandler())
    _logger.propagate = False
# What the device runtime says while a Trainer runs it is silenced, or sent elsewhere, together with what the Trainer says.
_rank_zero.log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
