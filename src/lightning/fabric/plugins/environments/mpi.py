"""Processes that ``mpirun`` starts."""

from __future__ import annotations

import functools
import importlib.util
import socket
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment, compare_processes
from lightning.fabric.plugins.environments.lightning import find_free_network_port


class MPIEnvironment(ClusterEnvironment):
    """Asks MPI, through ``mpi4py``, for ranks and machines.

    All processes must make one, and ask it for the same things: the first answer takes communication.

    Raises:
        ModuleNotFoundError: without ``mpi4py``.
    """

    def __init__(self) -> None:
        super().__init__()
        if importlib.util.find_spec("mpi4py") is None:
            raise ModuleNotFoundError("MPIEnvironment needs the package mpi4py: `pip install mpi4py`.")
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        """The host name of rank 0's machine."""
        return self._meeting[0]

    @property
    def main_port(self) -> int:
        """A port that rank 0 has found free on its machine."""
        return self._meeting[1]

    def world_size(self) -> int:
        return int(self._world.Get_size())

    def global_rank(self) -> int:
        return int(self._world.Get_rank())

    def local_rank(self) -> int:
        """The number of processes of this machine with a smaller rank."""
        return self._hosts[: self.global_rank()].count(socket.gethostname())

    def node_rank(self) -> int:
        """The place of this machine, in the order of the smallest rank that each runs."""
        return list(dict.fromkeys(self._hosts)).index(socket.gethostname())

    @functools.cached_property
    def _hosts(self) -> list[str]:
        """The host name of each rank."""
        hosts: list[str] = self._world.allgather(socket.gethostname())
        return hosts

    @functools.cached_property
    def _meeting(self) -> tuple[str, int]:
        here = (socket.gethostname(), find_free_network_port()) if self.global_rank() == 0 else None
        meeting: Any = self._world.bcast(here, root=0)
        return meeting[0], meeting[1]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare with the number of processes that ``mpirun`` has started.

        Raises:
            ValueError: if it is not ``num_devices * num_nodes``.
        """
        advice = "Let devices be the processes of a machine, and num_nodes the number of machines."
        compare_processes("mpirun", self.world_size(), num_devices, num_nodes, advice)

    @staticmethod
    def detect() -> bool:
        """Whether ``mpi4py`` is there, and MPI runs more than one process."""
        if importlib.util.find_spec("mpi4py") is None:
            return False
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError):  # mpi4py is installed, and no MPI library
            return False
        return bool(MPI.COMM_WORLD.Get_size() > 1)
