"""The device runtime: accelerators, precision, strategies, checkpoint files, loggers. It knows nothing of the Trainer."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.seed import seed_everything

if TYPE_CHECKING:
    from lightning.fabric.fabric import Fabric
    from lightning.fabric.wrappers import is_wrapped

_HOMES = {"Fabric": "lightning.fabric.fabric", "is_wrapped": "lightning.fabric.wrappers"}

__all__ = ["Fabric", "is_wrapped", "seed_everything"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
