"""Processes that ``torch_xla`` starts, one for each TPU core."""

from __future__ import annotations

from typing import Any

from lightning.fabric.accelerators.xla import XLAAccelerator, has_torch_xla
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


class XLAEnvironment(ClusterEnvironment):
    """Asks ``torch_xla`` for ranks. There is no address to meet at: the runtime (PJRT) finds its processes by itself.

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
    def main_address(self) -> str:
        raise NotImplementedError("XLA's processes find each other without an address.")

    @property
    def main_port(self) -> int:
        raise NotImplementedError("XLA's processes find each other without a port.")

    def world_size(self) -> int:
        """The number of XLA devices on all machines; 1 before the processes are started."""
        import torch_xla.runtime

        return int(torch_xla.runtime.world_size())

    def global_rank(self) -> int:
        import torch_xla.runtime

        return int(torch_xla.runtime.global_ordinal())

    def local_rank(self) -> int:
        import torch_xla.runtime

        return int(torch_xla.runtime.local_ordinal())

    def node_rank(self) -> int:
        import torch_xla.runtime

        return int(torch_xla.runtime.host_index())

    @staticmethod
    def detect() -> bool:
        """Whether this machine has TPUs."""
        return XLAAccelerator.is_available()
