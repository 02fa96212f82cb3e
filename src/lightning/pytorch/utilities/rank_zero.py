"""Functions, messages and warnings on global rank 0 only: the names of :mod:`lightning.fabric.utilities.rank_zero`."""

from lightning.fabric.utilities.rank_zero import (
    LightningDeprecationWarning,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)

__all__ = [
    "LightningDeprecationWarning",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
