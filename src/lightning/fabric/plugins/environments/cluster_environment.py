"""What a strategy asks of the place where its processes run: who they are, and where they meet."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod


class ClusterEnvironment(ABC):
    """Tells a process its ranks, and where all processes of the run meet.

    Subclass it for a cluster that none of the others knows, and pass an instance in ``plugins=[...]``.

    Example::

        >>> class MyCluster(ClusterEnvironment):
        ...     creates_processes_externally = True
        ...     main_address = "10.0.0.1"
        ...     main_port = 29500
        ...     def world_size(self): return 8
        ...     def global_rank(self): return 5
        ...     def local_rank(self): return 1
        ...     def node_rank(self): return 1
        >>> MyCluster().global_rank()
        5
    """

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether something else starts the processes; False if a launcher of ours has to."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """The host name or address of the machine that runs global rank 0."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """The port on which global rank 0 listens for the others; the same in all processes."""

    @abstractmethod
    def world_size(self) -> int:
        """The number of processes on all machines."""

    @abstractmethod
    def global_rank(self) -> int:
        """The number of this process among all, from 0."""

    @abstractmethod
    def local_rank(self) -> int:
        """The number of this process among those of its machine, from 0."""

    @abstractmethod
    def node_rank(self) -> int:
        """The number of this machine, from 0."""

    def set_world_size(self, size: int) -> None:
        """Take over the number of processes; nothing happens where the cluster has decided it."""

    def set_global_rank(self, rank: int) -> None:
        """Take over the rank of this process; nothing happens where the cluster has decided it."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare what the user asked for with what the cluster gives.

        Args:
            num_devices: processes on each machine.
            num_nodes: machines.

        Raises:
            ValueError: if they contradict each other.
        """

    def teardown(self) -> None:
        """Undo what the run has left behind in this process."""

    @staticmethod
    def detect() -> bool:
        """Whether this process runs in such an environment."""
        return False


class MissingVariableError(KeyError, ValueError):
    """A variable that the cluster sets in each process is not there."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would put the whole sentence in quotes.
        return str(self.args[0])


def read_variable(name: str, hint: str) -> str:
    """Return an environment variable.

    Args:
        name: of the variable.
        hint: what to do if it is missing: a sentence.

    Raises:
        MissingVariableError: if it is not set. It is a KeyError and a ValueError.
    """
    value = os.environ.get(name)
    if value is None:
        raise MissingVariableError(f"The environment variable {name} is not set. {hint}")
    return value


def read_number(name: str, hint: str) -> int:
    """Return an environment variable that holds a whole number.

    Raises:
        MissingVariableError: if it is not set.
        ValueError: if it is not a number.
    """
    return parse_number(name, read_variable(name, hint))


def parse_number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"The environment variable {name}={value!r} has to be a whole number.") from None


def compare_processes(starter: str, started: int, num_devices: int, num_nodes: int, advice: str) -> None:
    """Compare the number of processes that somebody has started with what the user asked for.

    Args:
        starter: who has started them.
        started: how many.
        num_devices: processes on each machine.
        num_nodes: machines.
        advice: what to change: a sentence.

    Raises:
        ValueError: if they differ, which would leave processes waiting, or out.
    """
    if num_devices * num_nodes != started:
        raise ValueError(
            f"{starter} has started {started} processes, while devices={num_devices} and num_nodes={num_nodes} make "
            f"{num_devices * num_nodes}. {advice}"
        )
