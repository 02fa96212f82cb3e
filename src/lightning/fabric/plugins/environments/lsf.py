"""Processes that ``jsrun`` starts in a job of IBM's LSF."""

from __future__ import annotations

import os
import socket

from lightning.fabric.plugins.environments.cluster_environment import (
    ClusterEnvironment,
    MissingVariableError,
    compare_processes,
    read_number,
    read_variable,
)

HINT = "`jsrun` sets it: start the script with `jsrun` inside an LSF job."


class LSFEnvironment(ClusterEnvironment):
    """Reads what LSF and ``jsrun`` set.

    The machines are those of the file that ``LSB_DJOB_RANKFILE`` names, without its first line, which is the machine that
    the job was submitted to; the first of them is the main one. ``MASTER_ADDR`` and ``MASTER_PORT`` are set when the object is made.

    Raises:
        ValueError: if LSF has set no ``LSB_DJOB_RANKFILE`` or no ``LSB_JOBID``, or the file lists no machine.
        KeyError: if this machine is not in the file.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hosts = _read_hosts()
        self._node_rank = _own_place(self._hosts)
        self._main_address = next(iter(self._hosts))
        self._main_port = _choose_port()
        os.environ["MASTER_ADDR"] = self._main_address
        os.environ["MASTER_PORT"] = str(self._main_port)

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._main_address

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or 10000 plus the last three digits of the job's number."""
        return self._main_port

    def world_size(self) -> int:
        return read_number("JSM_NAMESPACE_SIZE", HINT)

    def global_rank(self) -> int:
        return read_number("JSM_NAMESPACE_RANK", HINT)

    def local_rank(self) -> int:
        return read_number("JSM_NAMESPACE_LOCAL_RANK", HINT)

    def node_rank(self) -> int:
        return self._node_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare with the number of processes that ``jsrun`` has started.

        Raises:
            ValueError: if it is not ``num_devices * num_nodes``.
        """
        advice = "Let devices be the processes of a machine, and num_nodes the number of machines."
        compare_processes("jsrun", self.world_size(), num_devices, num_nodes, advice)

    @staticmethod
    def detect() -> bool:
        """Whether ``jsrun`` has started this process in an LSF job."""
        return {"LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE"} <= os.environ.keys()


def _read_hosts() -> dict[str, int]:
    """The machines that compute, in order, with their numbers."""
    path = read_variable("LSB_DJOB_RANKFILE", HINT)
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    if len(lines) < 2:
        raise ValueError(
            f"The file {path} (LSB_DJOB_RANKFILE) lists {len(lines)} machines; it takes the one that the job was submitted to, and after "
            "it those that compute."
        )
    return {host: place for place, host in enumerate(dict.fromkeys(lines[1:]))}


def _own_place(hosts: dict[str, int]) -> int:
    name = socket.gethostname()
    for candidate in (name, name.partition(".")[0]):
        if candidate in hosts:
            return hosts[candidate]
    raise MissingVariableError(
        f"This machine, {name!r}, is not among those of LSB_DJOB_RANKFILE: {', '.join(hosts)}. Start the script with `jsrun`, which "
        "runs it on them."
    )


def _choose_port() -> int:
    if "MASTER_PORT" in os.environ:
        return read_number("MASTER_PORT", HINT)
    return 10000 + read_number("LSB_JOBID", HINT) % 1000
