"""Processes that we start ourselves, or that the user starts one by one."""

from __future__ import annotations

import errno
import os
import socket

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment, parse_number
from lightning.fabric.utilities.rank_zero import rank_zero_only


class LightningEnvironment(ClusterEnvironment):
    """The default: on one machine nothing needs to be set.

    Either a launcher starts the processes of this machine, or the user does, with ``LOCAL_RANK`` set in each.
    Several machines run the same command with these variables:

    - ``MASTER_PORT``: a port that is free on the machine of rank 0. Required.
    - ``MASTER_ADDR``: the address of that machine. Required on the others.
    - ``NODE_RANK`` (or ``GROUP_RANK``): the number of the machine, from 0. Required but on the first.

    Example::

        >>> LightningEnvironment().main_address
        '127.0.0.1'
    """

    def __init__(self) -> None:
        super().__init__()
        self._main_port: int | None = None
        self._global_rank = 0
        self._world_size = 1

    @property
    def creates_processes_externally(self) -> bool:
        """Whether ``LOCAL_RANK`` is set: the user has started the processes, or a launcher has already."""
        return "LOCAL_RANK" in os.environ

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or a free port, chosen once."""
        if self._main_port is None:
            given = os.environ.get("MASTER_PORT")
            self._main_port = find_free_network_port() if given is None else parse_number("MASTER_PORT", given)
        return self._main_port

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        self._world_size = size

    def global_rank(self) -> int:
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    def local_rank(self) -> int:
        return parse_number("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        name = "NODE_RANK" if "NODE_RANK" in os.environ else "GROUP_RANK"
        return parse_number(name, os.environ.get(name, "0"))

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse what would make the processes wait for each other in vain.

        Raises:
            ValueError: if a rank is beyond the number of devices or machines, or several machines were not told where to meet.
        """
        node, local = self.node_rank(), self.local_rank()
        if not 0 <= node < num_nodes:
            raise ValueError(
                f"This machine has NODE_RANK={node}, and num_nodes={num_nodes} was given: it has to be from 0 to {num_nodes - 1}. "
                "Correct NODE_RANK (or GROUP_RANK) in the environment, or num_nodes."
            )
        if not 0 <= local < num_devices:
            raise ValueError(
                f"This process has LOCAL_RANK={local}, and devices={num_devices} was given: it has to be from 0 to {num_devices - 1}. "
                "Take LOCAL_RANK out of the environment to have the processes started for you, or ask for more devices."
            )
        needed = ["MASTER_PORT"] if num_nodes > 1 or (self.creates_processes_externally and num_devices > 1) else []
        if node > 0:
            needed.append("MASTER_ADDR")
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise ValueError(
                f"devices={num_devices} on num_nodes={num_nodes} needs {' and '.join(missing)} in the environment, so that the processes "
                "meet: MASTER_ADDR is the address of the machine with NODE_RANK=0, MASTER_PORT a port that is free there."
            )

    def teardown(self) -> None:
        os.environ.pop("WORLD_SIZE", None)

    @staticmethod
    def detect() -> bool:
        """Always True: it needs nothing."""
        return True


def find_free_network_port() -> int:
    """Return a port that nothing on this machine listens on at this moment.

    Example::

        >>> 0 < find_free_network_port() < 65536
        True
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def require_free_port(port: int) -> None:
    """Make sure that rank 0 will be able to listen on ``port`` of this machine.

    Raises:
        RuntimeError: if something listens on it already.
        ValueError: if there is no such port.
    """
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT={port} is not a port: it has to be from 1 to 65535. Unset it to have a free one chosen.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server will: a port whose last connection has just been closed is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return  # the server will say what is wrong
            reason = "is used by another process" if error.errno == errno.EADDRINUSE else "may not be used by this user"
            raise RuntimeError(
                f"MASTER_PORT={port} {reason} on this machine, so the processes can't meet there. Set another port in the "
                "environment, or unset MASTER_PORT to have a free one chosen (on one machine); is an earlier run still going?"
            ) from error
