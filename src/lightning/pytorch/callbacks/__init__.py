"""Callbacks: code that runs at the trainer's events without being part of the model. Loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.callbacks.checkpoint import Checkpoint

if TYPE_CHECKING:
    from lightning.pytorch.callbacks.early_stopping import EarlyStopping
    from lightning.pytorch.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
    from lightning.pytorch.callbacks.lambda_function import LambdaCallback
    from lightning.pytorch.callbacks.lr_monitor import LearningRateMonitor
    from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint
    from lightning.pytorch.callbacks.model_summary import ModelSummary
    from lightning.pytorch.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
    from lightning.pytorch.callbacks.prediction_writer import BasePredictionWriter
    from lightning.pytorch.callbacks.progress import ProgressBar, RichProgressBar, TQDMProgressBar
    from lightning.pytorch.callbacks.rich_model_summary import RichModelSummary
    from lightning.pytorch.callbacks.throughput_monitor import ThroughputMonitor
    from lightning.pytorch.callbacks.timer import Timer

_HOMES = {
    "BasePredictionWriter": "prediction_writer",
    "EarlyStopping": "early_stopping",
    "GradientAccumulationScheduler": "gradient_accumulation_scheduler",
    "LambdaCallback": "lambda_function",
    "LearningRateMonitor": "lr_monitor",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "ProgressBar": "progress",
    "RichModelSummary": "rich_model_summary",
    "RichProgressBar": "progress",
    "TQDMProgressBar": "progress",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
}

__all__ = [
    "BasePredictionWriter",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightning.pytorch.callbacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
