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
    was_asked_for = True  # by name or as an object; "auto" chooses it for one device

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

    def setup_environment(self) -> None:
        """Make the device ready.

        Raises:
            ValueError: if nobody asked for this strategy, and a cluster has started several processes, each of which would train alone.
        """
        if not self.was_asked_for:
            _check_alone()
        super().setup_environment()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the name of this strategy into a registry."""
        strategy_registry.register(cls.strategy_name, cls, description="one process on one device")


def _check_alone() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # a run of several processes was before, such as one that trained what is tested now
    from lightning.fabric.plugins.environments import LightningEnvironment, detect_environment

    environment = detect_environment()
    if isinstance(environment, LightningEnvironment) or not environment.creates_processes_externally:
        return
    try:
        environment.validate_settings(1, 1)
    except ValueError as error:
        raise ValueError(
            f"{error} As it is, each process would train by itself, and write over the others' files; if that is meant, pass "
            "strategy='single_device'."
        ) from None
