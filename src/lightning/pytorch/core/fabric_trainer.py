"""What a LightningModule finds as its trainer while a hand-written loop runs it."""

from __future__ import annotations

from typing import Any


class FabricTrainer:
    """Stands for the trainer: what a Trainer and a Fabric both have is the Fabric's, such as ranks, strategy and loggers.

    Args:
        fabric: which has set up the module.
    """

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self._fabric), name):
            return getattr(self._fabric, name)
        raise AttributeError(
            f"`self.trainer.{name}` was asked for in a module that Fabric runs: there is no Trainer, and Fabric has no {name!r}. "
            "`self.fabric` is set where that is so."
        )
