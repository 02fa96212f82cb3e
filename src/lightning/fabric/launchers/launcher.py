"""What starts the processes of a run."""

from __future__ import annotations

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.launchers.failures import RUN_DIRECTORY, RUN_RANK
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

R = TypeVar("R")


class Launcher(ABC):
    """Runs a function in all processes of a run, after starting those that are missing."""

    runs_copies = False  # whether it runs the function in new processes only, on copies of its arguments

    @property
    @abstractmethod
    def is_interactive_compatible(self) -> bool:
        """Whether it works in a notebook or an interactive interpreter."""

    @abstractmethod
    def launch(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Run ``function(*args, **kwargs)`` in every process, and return the result of this one, or of rank 0.

        Args:
            function: what each rank does.
            args: its positional arguments.
            kwargs: its named ones.

        Raises:
            Exception: what ``function`` raises here; or, if another rank has failed first, an error that names it.
        """

    def kill(self, signum: int | signal.Signals) -> None:
        """Send a signal to the processes that this launcher has started and that are still running."""


def is_interactive() -> bool:
    """Whether this is a notebook or an interactive interpreter, whose code has no file that could run again."""
    return hasattr(sys, "ps1")


def refuse_interactive(what: str) -> None:
    """Refuse to start processes that would have to find this program in a file.

    Raises:
        MisconfigurationException: in a notebook or an interactive interpreter.
    """
    if is_interactive():
        raise MisconfigurationException(
            f"{what}, which can't be done from a notebook or an interactive interpreter. Use strategy='ddp_notebook' here, or put the "
            "code into a script and run that."
        )


def variables_of_rank(environment: ClusterEnvironment, local_rank: int, num_processes: int, num_nodes: int, folder: Path) -> dict[str, str]:
    """Return what a rank finds in its environment.

    Args:
        environment: knows this machine's number and where to meet.
        local_rank: of the rank.
        num_processes: on each machine; they share the cores, unless ``OMP_NUM_THREADS`` is set.
        num_nodes: machines.
        folder: where the ranks of this machine report failures.
    """
    node = environment.node_rank()
    return {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(node),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(num_nodes * num_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // num_processes)),
        RUN_DIRECTORY: str(folder),
        RUN_RANK: str(node * num_processes + local_rank),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
