"""Profilers: where the time of a run goes. Names are loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.profilers.base import PassThroughProfiler
    from lightning.pytorch.profilers.epoch import EpochTimes
    from lightning.pytorch.profilers.profiler import Profiler
    from lightning.pytorch.profilers.simple import SimpleProfiler

_HOMES = {
    "EpochTimes": "lightning.pytorch.profilers.epoch",
    "PassThroughProfiler": "lightning.pytorch.profilers.base",
    "Profiler": "lightning.pytorch.profilers.profiler",
    "SimpleProfiler": "lightning.pytorch.profilers.simple",
}

__all__ = ["EpochTimes", "PassThroughProfiler", "Profiler", "SimpleProfiler"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
