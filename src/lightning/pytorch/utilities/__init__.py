"""Helpers around modules, data and metrics. Names are loaded when first used."""

import importlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.fabric.utilities.data import suggested_max_num_workers
    from lightning.fabric.utilities.distributed import is_shared_filesystem
    from lightning.fabric.utilities.enums import LightningEnum
    from lightning.fabric.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn
    from lightning.fabric.utilities.throughput import measure_flops
    from lightning.fabric.utilities.warnings import disable_possible_user_warnings
    from lightning.pytorch.utilities.combined_loader import CombinedLoader
    from lightning.pytorch.utilities.enums import GradClipAlgorithmType
    from lightning.pytorch.utilities.grads import grad_norm
    from lightning.pytorch.utilities.parameter_tying import find_shared_parameters, set_shared_parameters
    from lightning.pytorch.utilities.parsing import AttributeDict, is_picklable

_FABRIC = "lightning.fabric.utilities"
_HOMES = {
    "AttributeDict": f"{__name__}.parsing",
    "CombinedLoader": f"{__name__}.combined_loader",
    "GradClipAlgorithmType": f"{__name__}.enums",
    "LightningEnum": f"{_FABRIC}.enums",
    "disable_possible_user_warnings": f"{_FABRIC}.warnings",
    "find_shared_parameters": f"{__name__}.parameter_tying",
    "grad_norm": f"{__name__}.grads",
    "is_picklable": f"{__name__}.parsing",
    "is_shared_filesystem": f"{_FABRIC}.distributed",
    "measure_flops": f"{_FABRIC}.throughput",
    "move_data_to_device": f"{_FABRIC}.apply_func",
    "rank_zero_deprecation": f"{_FABRIC}.rank_zero",
    "rank_zero_info": f"{_FABRIC}.rank_zero",
    "rank_zero_only": f"{_FABRIC}.rank_zero",
    "rank_zero_warn": f"{_FABRIC}.rank_zero",
    "set_shared_parameters": f"{__name__}.parameter_tying",
    "suggested_max_num_workers": f"{_FABRIC}.data",
}

FLOAT16_EPSILON = torch.finfo(torch.float16).eps
FLOAT32_EPSILON = torch.finfo(torch.float32).eps
FLOAT64_EPSILON = torch.finfo(torch.float64).eps

__all__ = [
    "AttributeDict",
    "CombinedLoader",
    "GradClipAlgorithmType",
    "LightningEnum",
    "disable_possible_user_warnings",
    "find_shared_parameters",
    "grad_norm",
    "is_picklable",
    "is_shared_filesystem",
    "measure_flops",
    "move_data_to_device",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "set_shared_parameters",
    "suggested_max_num_workers",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
