"""Keraunos: the training framework behind ``lightning.pytorch`` and ``lightning.fabric``.

Names are loaded when first used, so importing the package costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning._version import __version__, refuse_mixture

refuse_mixture()

if TYPE_CHECKING:
    from lightning.fabric.fabric import Fabric
    from lightning.fabric.utilities.seed import seed_everything
    from lightning.pytorch.callbacks.callback import Callback
    from lightning.pytorch.core.datamodule import LightningDataModule
    from lightning.pytorch.core.module import LightningModule
    from lightning.pytorch.trainer.trainer import Trainer

_HOMES = {
    "Callback": "lightning.pytorch.callbacks.callback",
    "Fabric": "lightning.fabric.fabric",
    "LightningDataModule": "lightning.pytorch.core.datamodule",
    "LightningModule": "lightning.pytorch.core.module",
    "Trainer": "lightning.pytorch.trainer.trainer",
    "seed_everything": "lightning.fabric.utilities.seed",
}

__all__ = ["Callback", "Fabric", "LightningDataModule", "LightningModule", "Trainer", "__version__", "seed_everything"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("fabric", "pytorch"):
        return importlib.import_module(f"lightning.{name}")
    raise AttributeError(f"module 'lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "fabric", "pytorch"})
