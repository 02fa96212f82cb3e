"""Loggers: where a Trainer's metrics and hyperparameters go. Each is loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers.csv_logs import CSVLogger
    from lightning.pytorch.loggers.logger import Logger
    from lightning.pytorch.loggers.tensorboard import TensorBoardLogger

_HOMES = {
    "CSVLogger": "csv_logs",
    "Logger": "logger",
    "TensorBoardLogger": "tensorboard",
}

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
