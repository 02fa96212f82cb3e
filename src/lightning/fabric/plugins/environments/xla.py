"""Processes that ``torch_xla`` starts, one for each TPU chip; on old TPUs, and on the CPU, with a thread for each device."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.accelerators.xla import XLAAccelerator, has_torch_xla
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


class XLAEnvironment(ClusterEnvironment):
    """Asks ``torch_xla`` for ranks. There is no address to meet at: the runtime (PJRT) finds its processes by itself.

    Until the processes are started there is one, of rank 0. Asking the runtime would take the devices from the others.

    Raises:
        ModuleNotFoundError: without ``torch_xla``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not has_torch_xla():
            raise ModuleNotFoundError('XLAEnvironment needs the package torch_xla: `pip install "torch_xla[tpu]"`.')
        super().__init__(*args, **kwargs)

    @property
    def creates_processes_externally(self) -> bool:
        return False

    @property
    def is_started(self) -> bool:
        """Whether this is one of the processes that torch_xla has started."""
        return "PJRT_LOCAL_PROCESS_COUNT" in os.environ

    @property
    def main_address(self) -> str:
        raise NotImplementedError("XLA's processes find each other without an address.")

    @property
    def main_port(self) -> int:
        raise NotImplementedError("XLA's processes find each other without a port.")

    def world_size(self) -> int:
        """The number of XLA devices on all machines; 1 before the processes are started."""
        if not self.is_started:
            return 1
        import torch_xla.runtime

        return int(torch_xla.runtime.world_size())

    def global_rank(self) -> int:
        if not self.is_started:
            return 0
        import torch_xla.runtime

        return int(torch_xla.runtime.global_ordinal())

    def local_rank(self) -> int:
        if not self.is_started:
            return 0
        import torch_xla.runtime

        return int(torch_xla.runtime.local_ordinal())

    def node_rank(self) -> int:
        if not self.is_started:
            return 0
        import torch_xla.runtime

        return int(torch_xla.runtime.host_index())

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check that torch_xla can start so many processes: it uses one device of a machine, or all.

        Raises:
            ValueError: for another number.
        """
        available = XLAAccelerator.auto_device_count()
        if num_devices not in (1, available):
            fewer = "CPU_NUM_DEVICES" if self.is_stand_in() else "TPU_VISIBLE_CHIPS"
            raise ValueError(
                f"devices={num_devices} was given, and torch_xla uses one device of a machine, or all, of which this one has {available}. "
                f"Use devices=1 or devices={available}; which there are is said by the environment variable {fewer}."
            )

    @staticmethod
    def is_stand_in() -> bool:
        """Whether the devices are CPU devices, which are threads of one process."""
        return XLAAccelerator.is_stand_in()

    @staticmethod
    def detect() -> bool:
        """Whether this machine has TPUs."""
        return XLAAccelerator.is_available()
