"""One process, one XLA device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from lightning.fabric.precision import Precision
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.xla_device import XLADeviceStrategy, require_torch_xla
from lightning.fabric.utilities.rank_zero import rank_zero_deprecation

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO

DEBUG_VARIABLE = "PT_XLA_DEBUG"


class SingleDeviceXLAStrategy(XLADeviceStrategy, SingleDeviceStrategy):
    """Run everything on one XLA device, such as a chip of a TPU.

    Args:
        device: its index, or ``"xla:0"``, or a torch.device.
        accelerator: the kind of device.
        checkpoint_io: writes and reads checkpoints.
        precision: the numbers that the module computes with.
        precision_plugin: another name of ``precision``.
        debug: let torch_xla print why it compiles programs and runs them.

    Raises:
        ModuleNotFoundError: without ``torch_xla``.
        ValueError: for a device that is none of XLA's.

    Example::

        Trainer(accelerator="tpu", devices=1)
    """

    strategy_name = "single_xla"

    def __init__(
        self,
        device: torch.device | str | int,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        debug: bool = False,
    ) -> None:
        require_torch_xla(type(self).__name__)
        device = torch.device("xla", device) if isinstance(device, int) else torch.device(device)
        if device.type != "xla":
            raise ValueError(f"device={str(device)!r} was given to {type(self).__name__}, which takes XLA devices: 'xla:0', or an index.")
        device = torch.device("xla", device.index or 0)
        super().__init__(device, accelerator, checkpoint_io, precision, precision_plugin)
        self.debug = debug

    def setup_environment(self) -> None:
        """Make the device the current one."""
        if self.debug:
            os.environ[DEBUG_VARIABLE] = "1"
        import torch_xla

        torch_xla.device(self.root_device.index)
        super().setup_environment()

    def teardown(self) -> None:
        super().teardown()
        if self.debug:
            os.environ.pop(DEBUG_VARIABLE, None)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the name of this strategy into a registry."""
        strategy_registry.register(cls.strategy_name, cls, description=cls.__name__)


class SingleTPUStrategy(SingleDeviceXLAStrategy):
    """The former name of :class:`SingleDeviceXLAStrategy`.

    Args:
        args: those of SingleDeviceXLAStrategy.
        kwargs: the same by name.
    """

    strategy_name = "single_tpu"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        rank_zero_deprecation("The strategy 'single_tpu' (SingleTPUStrategy) is now called 'single_xla' (SingleDeviceXLAStrategy).")
        super().__init__(*args, **kwargs)
