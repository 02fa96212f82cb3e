"""One process, one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning.fabric.precision import Precision
from lightning.fabric.strategies.strategy import Strategy

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO


class SingleDeviceStrategy(Strategy):
    """Run everything on one device.

    Args:
        device: which, such as ``"cpu"`` or ``"cuda:0"``.
        accelerator: the kind of device.
        checkpoint_io: writes and reads checkpoints.
        precision: the numbers that the module computes with.
        precision_plugin: another name of ``precision``.
    """

    strategy_name = "single_device"

    def __init__(
        self,
        device: str | torch.device = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision=precision or precision_plugin)
        self._root_device = torch.device(device)

    @property
    def root_device(self) -> torch.device:
        return self._root_device

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the name of this strategy into a registry."""
        strategy_registry.register(cls.strategy_name, cls, description="one process on one device")
