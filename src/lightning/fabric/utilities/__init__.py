"""Helpers of the device runtime. Names are loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.fabric.utilities.data import AttributeDict, suggested_max_num_workers
    from lightning.fabric.utilities.distributed import is_shared_filesystem
    from lightning.fabric.utilities.enums import LightningEnum
    from lightning.fabric.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn
    from lightning.fabric.utilities.throughput import Throughput, ThroughputMonitor, measure_flops
    from lightning.fabric.utilities.warnings import disable_possible_user_warnings

_HOMES = {
    "AttributeDict": "data",
    "LightningEnum": "enums",
    "Throughput": "throughput",
    "ThroughputMonitor": "throughput",
    "disable_possible_user_warnings": "warnings",
    "is_shared_filesystem": "distributed",
    "measure_flops": "throughput",
    "move_data_to_device": "apply_func",
    "rank_zero_deprecation": "rank_zero",
    "rank_zero_info": "rank_zero",
    "rank_zero_only": "rank_zero",
    "rank_zero_warn": "rank_zero",
    "suggested_max_num_workers": "data",
}

__all__ = [
    "AttributeDict",
    "LightningEnum",
    "Throughput",
    "ThroughputMonitor",
    "disable_possible_user_warnings",
    "is_shared_filesystem",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "suggested_max_num_workers",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
