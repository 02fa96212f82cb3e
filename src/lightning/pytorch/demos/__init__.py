"""Small models and data for examples, experiments and tests."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, DemoModel

_HOMES = dict.fromkeys(("BoringDataModule", "BoringModel", "DemoModel"), "lightning.pytorch.demos.boring_classes")

__all__ = ["BoringDataModule", "BoringModel", "DemoModel"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
