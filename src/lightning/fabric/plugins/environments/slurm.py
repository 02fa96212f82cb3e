"""Processes that SLURM's ``srun`` starts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment, parse_number, read_number
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning

HINT = "srun sets it in each task: start the script with `srun python script.py` inside the job."
FALLBACK_PORT = 12910


class SLURMEnvironment(ClusterEnvironment):
    """Reads what SLURM's ``srun`` sets in each task.

    A job whose name is ``bash`` or ``interactive`` is a shell that was opened on the cluster: its variables describe the
    shell, so they are ignored.

    Args:
        auto_requeue: put the job back into the queue when SLURM signals that its time is nearly over, and resume from a
            checkpoint written then.
        requeue_signal: the signal that says so, as in ``#SBATCH --signal=SIGUSR1@90``; SIGUSR1 if not given.

    Raises:
        RuntimeError: if the job was submitted with ``--ntasks`` and without ``--ntasks-per-node``.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        super().__init__()
        self.auto_requeue = auto_requeue
        if requeue_signal is None and sys.platform != "win32":
            requeue_signal = signal.SIGUSR1
        self.requeue_signal = requeue_signal
        _warn_without_srun()
        _refuse_ntasks_alone()

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``, or the first machine of the job. The variable is set afterwards."""
        address = os.environ.get("MASTER_ADDR")
        if address is None:
            nodes = os.environ.get("SLURM_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
            address = os.environ["MASTER_ADDR"] = self.resolve_root_node_address(nodes)
        return address

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, or 15000 plus the last four digits of the job's number, so that jobs on one machine differ.

        The variable is set afterwards.
        """
        if "MASTER_PORT" not in os.environ:
            job = os.environ.get("SLURM_JOB_ID")
            port = FALLBACK_PORT if job is None else 15000 + parse_number("SLURM_JOB_ID", job) % 10000
            os.environ["MASTER_PORT"] = str(port)
        return read_number("MASTER_PORT", HINT)

    def world_size(self) -> int:
        return read_number("SLURM_NTASKS", HINT)

    def global_rank(self) -> int:
        return read_number("SLURM_PROCID", HINT)

    def local_rank(self) -> int:
        return read_number("SLURM_LOCALID", HINT)

    def node_rank(self) -> int:
        return read_number("SLURM_NODEID", HINT)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare with the tasks and machines that the job has.

        Raises:
            ValueError: if they differ from ``num_devices`` and ``num_nodes``, which would leave processes waiting, or out.
        """
        if _is_interactive():
            return
        _compare("devices", num_devices, "SLURM_NTASKS_PER_NODE", "--ntasks-per-node")
        _compare("num_nodes", num_nodes, "SLURM_NNODES", "--nodes")
        tasks = os.environ.get("SLURM_NTASKS")
        if tasks is not None and "SLURM_NTASKS_PER_NODE" not in os.environ and int(tasks) != num_devices * num_nodes:
            raise ValueError(
                f"devices={num_devices} on num_nodes={num_nodes} needs {num_devices * num_nodes} processes, and the SLURM job runs "
                f"{tasks} (SLURM_NTASKS). Submit it with `#SBATCH --nodes={num_nodes}` and `#SBATCH --ntasks-per-node={num_devices}`, "
                "and start the script with `srun`."
            )

    @staticmethod
    def job_name() -> str | None:
        """The name of the job, or None outside of one."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """The number of the job; None outside of one, and in an interactive one."""
        job = os.environ.get("SLURM_JOB_ID", "")
        return int(job) if job.isdecimal() and not _is_interactive() else None

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """Return the first machine of a list as SLURM writes it.

        Example::

            >>> SLURMEnvironment.resolve_root_node_address("gpu[007-012,020],cpu1")
            'gpu007'
            >>> SLURMEnvironment.resolve_root_node_address("rack2node[3,5]-ib")
            'rack2node3-ib'
        """
        first = re.match(r"(?:\[[^\]]*\]|[^,\s\[])*", nodes.strip())
        return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodes)

    @staticmethod
    def detect() -> bool:
        """Whether this is a task of a SLURM job that is not interactive. Warns if ``srun`` is installed and was not used."""
        _warn_without_srun()
        return "SLURM_NTASKS" in os.environ and not _is_interactive()


def _is_interactive() -> bool:
    return SLURMEnvironment.job_name() in ("bash", "interactive")


def _compare(argument: str, value: int, variable: str, option: str) -> None:
    given = os.environ.get(variable)
    if given is not None and parse_number(variable, given) != value:
        raise ValueError(
            f"{argument}={value} was given, and the SLURM job was submitted with {option}={given}. "
            f"Set {argument}={given}, or submit the job with `#SBATCH {option}={value}`."
        )


def _refuse_ntasks_alone() -> None:
    """``--ntasks`` lets SLURM lay tasks out unevenly, and then a machine's processes are not its devices."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if parse_number("SLURM_NTASKS", tasks) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise RuntimeError(
            f"The SLURM job was submitted with --ntasks={tasks}, which does not say how many processes each machine runs. "
            "Submit it with `#SBATCH --ntasks-per-node=N` instead, where N is the number of devices of a machine."
        )


def _warn_without_srun() -> None:
    if "SLURM_NTASKS" in os.environ or shutil.which("srun") is None:
        return
    command = shlex.join(["srun", os.path.basename(sys.executable), *sys.argv])
    shown = command if len(command) <= 80 else command[:76] + " ..."
    rank_zero_warn(
        f"SLURM's `srun` is installed here, and this script was not started with it. If it is meant to run under SLURM: {shown}",
        category=PossibleUserWarning,
    )
