"""Starts the other ranks of this machine by running the same command again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning.fabric.launchers import bootstrap
from lightning.fabric.launchers.crew import Crew, end_within, on_uncaught
from lightning.fabric.launchers.failures import (
    RUN_DIRECTORY,
    RUN_RANK,
    PeerFailure,
    clear_failure,
    first_failure,
    mark_progress,
    report_failure,
)
from lightning.fabric.launchers.launcher import Launcher, refuse_interactive, variables_of_rank
from lightning.fabric.launchers.processes import RankProcess, stop
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import require_free_port
from lightning.fabric.utilities.exceptions import MisconfigurationException

R = TypeVar("R")

LOCAL_PROCESSES = "KERAUNOS_LOCAL_PROCESSES"  # how many processes of this machine the launcher has made
UNTIED_PARENT = "KERAUNOS_UNTIED_PARENT"  # the process to die with, where the kernel does not see to it

# The processes outlive one Trainer: all Trainers of a script share them.
_crew: Crew | None = None
_runs = 0
_hooked = False


class ScriptLauncher(Launcher):
    """Runs a function here, and has the other ranks of this machine run the whole script, up to the same function.

    The others run the command of this process with ``MASTER_ADDR``, ``MASTER_PORT``, ``NODE_RANK``, ``LOCAL_RANK`` and
    ``WORLD_SIZE`` set. Where something else has started all processes (torchrun, SLURM, ...), nothing is started.

    When a rank fails, the others are stopped, and this process raises, or ends if it can't: all of it within
    ``shutdown_timeout``, with the first cause in the message, and with an exit code that is not 0. When this process is
    killed, the kernel (Linux) kills the others.

    Args:
        cluster_environment: tells the ranks and where to meet.
        num_processes: on this machine.
        num_nodes: machines.
        shutdown_timeout: seconds from the first failure to the end of all processes.
        straggler_timeout: seconds that the others may still take once this process has ended its script; None: no limit.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int = 1,
        shutdown_timeout: float = 30.0,
        straggler_timeout: float | None = 1800.0,
    ) -> None:
        self.cluster_environment = cluster_environment
        self.num_processes = num_processes
        self.num_nodes = num_nodes
        self.shutdown_timeout = shutdown_timeout
        self.straggler_timeout = straggler_timeout

    @property
    def is_interactive_compatible(self) -> bool:
        """False: the others could not run the cells of a notebook."""
        return False

    def launch(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Run ``function(*args, **kwargs)`` on this rank, after starting the others if nobody has.

        Raises:
            PeerFailure: if another rank has failed first; its message says which, and why.
            MisconfigurationException: if the script can't be run again, or its processes are not as many as asked for.
            ValueError: if the cluster contradicts ``num_processes`` and ``num_nodes``.
            RuntimeError: if the port to meet at is in use.
        """
        self._compare_with_running()
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)
        if not self.cluster_environment.creates_processes_externally and self.num_processes > 1:
            self._start()
        crew = running_crew()
        if crew is not None:
            return crew.run(function, args, kwargs)
        return self._run_here(function, *args, **kwargs)

    def kill(self, signum: int | signal.Signals) -> None:
        """Send a signal to the other ranks of this machine; does nothing on those themselves."""
        crew = running_crew()
        if crew is not None:
            crew.kill(signum)

    def _compare_with_running(self) -> None:
        """A script has one set of processes, which all of its Trainers use."""
        running = os.environ.get(LOCAL_PROCESSES)
        if running is not None and int(running) != self.num_processes:
            raise MisconfigurationException(
                f"devices={self.num_processes}: this script runs in {running} processes, started for an earlier Trainer, and their number "
                f"can't change. Use devices={running} again, or another script."
            )

    def _start(self) -> None:
        """Start the other ranks of this machine."""
        global _crew
        refuse_interactive(f"The script has to run {self.num_processes} times")
        if self.cluster_environment.node_rank() == 0:
            require_free_port(self.cluster_environment.main_port)
        command = command_of_this_process()
        folder = Path(tempfile.mkdtemp(prefix="keraunos-run-"))
        ranks: list[RankProcess] = []
        try:
            for local_rank in range(1, self.num_processes):
                variables = self._variables(local_rank, folder)
                mark = {name: variables[name] for name in (RUN_DIRECTORY, RUN_RANK)}
                ranks.append(RankProcess(int(variables[RUN_RANK]), start_process(command, variables), mark))
        except BaseException:
            stop(ranks, patience=0)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.environ.update(self._variables(0, folder))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _crew = Crew(ranks, folder, self.shutdown_timeout, self.straggler_timeout)
        _crew.watch()

    def _variables(self, local_rank: int, folder: Path) -> dict[str, str]:
        ranks = variables_of_rank(self.cluster_environment, local_rank, self.num_processes, self.num_nodes, folder)
        return {**ranks, LOCAL_PROCESSES: str(self.num_processes)}

    def _run_here(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Run it in a process that somebody else has started: the first rank, torchrun, ..."""
        global _runs, _hooked
        if not _hooked and RUN_DIRECTORY in os.environ:
            _hooked = True
            on_uncaught(self._on_uncaught)
            die_with(int(os.environ.pop(UNTIED_PARENT, "0")))
        _runs += 1
        clear_failure()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                raise
            follows = report_failure(error).is_consequence and not isinstance(error, (KeyboardInterrupt, PeerFailure))
            cause = first_failure() if follows else None
            if cause is not None and not cause.is_consequence:
                raise PeerFailure(cause) from error  # of this machine or, as this process has heard, of another one
            raise
        mark_progress(_runs)
        return result

    def _on_uncaught(self, error: BaseException) -> None:
        report_failure(error)
        end_within(self.shutdown_timeout / 2)


def running_crew() -> Crew | None:
    """The ranks that this process has started; None in the others, and in processes that were forked from it."""
    return _crew if _crew is not None and _crew.owner == os.getpid() else None


def command_of_this_process() -> list[str]:
    """Return the command that runs the same program: the interpreter with its options, and a script, ``-m module`` or ``-c code``.

    Raises:
        MisconfigurationException: if the program has come from standard input.
    """
    command = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    script = sys.argv[0] if sys.argv else ""
    if script == "-c":
        options = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        return [*command, "-c", options[-1], *sys.argv[1:]]
    # A debugger or profiler that runs a script keeps its own spec, or none, and puts the script into sys.argv.
    if spec is not None and spec.name != "__main__" and spec.origin is not None and _is_same_file(spec.origin, script):
        return [*command, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if not script or not os.path.exists(script):
        raise MisconfigurationException(
            f"The other processes have to run the same program, and there is no file of it: sys.argv[0] is {script!r}. "
            "Put the code into a script, or start all processes yourself (with torchrun)."
        )
    return [*command, os.path.abspath(script), *sys.argv[1:]]


def _is_same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def start_process(command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start ``command`` as a process that dies with this one, with ``variables`` beside those of this one."""
    environment = {**os.environ, **variables}
    if getattr(sys.stdout, "write_through", False):
        environment.setdefault("PYTHONUNBUFFERED", "1")
    # The kernel ties a process to the thread that starts it: only the main one lives as long as the program.
    tied = os.name == "posix" and threading.current_thread() is threading.main_thread()
    if tied:
        command = [sys.executable, "-I", "-S", bootstrap.__file__, str(os.getpid()), *command]
    if not tied or sys.platform != "linux":
        environment[UNTIED_PARENT] = str(os.getpid())
    # In this process group, so that the terminal's Ctrl-C reaches it even while this process stands in a collective.
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)


def die_with(parent: int) -> None:
    """Watch ``parent`` (0: nobody) from a thread, and end this process after it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, name="watch-parent", daemon=True).start()
