"""Runs a function in new processes, and brings back what it returns."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lightning.fabric.launchers.bootstrap import tie_to_parent
from lightning.fabric.launchers.failures import (
    RUN_RANK,
    Failure,
    explain,
    failures,
    first_failure,
    mark_progress,
    progress_of,
    report_exit,
    report_failure,
)
from lightning.fabric.launchers.launcher import Launcher, refuse_interactive, variables_of_rank
from lightning.fabric.launchers.processes import TICK, RankProcess, stop, wait, wait_for_leaving
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import require_free_port
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn

R = TypeVar("R")
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

POLL = 0.2  # seconds between two looks at what the ranks report
SETTLE = 1.0  # seconds in which other ranks may end by themselves, and say why, before they are stopped
TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that got SIGTERM and has ended in good order
CALL, RESULT = "call.pt", "result.pt"
UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


class MultiprocessingLauncher(Launcher):
    """Runs a function in new processes, one for each rank, and returns what it returns on rank 0.

    Args:
        cluster_environment: tells where to meet.
        num_processes: on this machine.
        start_method: ``"spawn"`` starts fresh interpreters, which get function and arguments as copies, so these must be
            picklable, and the script needs ``if __name__ == "__main__":``. ``"fork"`` copies this process as it stands:
            anything goes, also in a notebook, as long as CUDA has not been used; each rank computes with one thread on the
            CPU, since the threads that this process may have started are not copied. ``"forkserver"`` is like spawn, faster.
        num_nodes: machines.
        shutdown_timeout: seconds from the first failure to the end of all processes, and from the end of the function to
            that of its process.
        straggler_timeout: seconds that the other ranks may still take once one has finished; None: no limit.

    Raises:
        ValueError: if this system has no such ``start_method``.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        start_method: Literal["spawn", "fork", "forkserver"] = "spawn",
        num_nodes: int = 1,
        shutdown_timeout: float = 30.0,
        straggler_timeout: float | None = 1800.0,
    ) -> None:
        available = multiprocessing.get_all_start_methods()
        if start_method not in available:
            raise ValueError(f"start_method={start_method!r} is not available on this system, which has {', '.join(map(repr, available))}.")
        self.cluster_environment = cluster_environment
        self.num_processes = num_processes
        self.start_method = start_method
        self.num_nodes = num_nodes
        self.shutdown_timeout = shutdown_timeout
        self.straggler_timeout = straggler_timeout
        self._ranks: list[RankProcess] = []

    runs_copies = True

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether it forks: then the ranks have all that the notebook has defined."""
        return self.start_method == "fork"

    def launch(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Run ``function(*args, **kwargs)`` on each rank, and return what it returns on rank 0, with its tensors on the CPU.

        Raises:
            ProcessRaisedException: (of ``torch.multiprocessing``) if a rank raises, with the traceback of the first.
            ProcessExitedException: (of ``torch.multiprocessing``) if a rank was killed, or left.
            RuntimeError: if CUDA is in use and the processes are to be forked, or the port to meet at is in use.
            MisconfigurationException: if something else has started the processes already, or this is a notebook and the
                processes are not forked.
            SystemExit: with exit code 143 if this process got SIGTERM, once the ranks, to which that was passed on, have ended by it.
        PicklingError: (of ``pickle``) if the function or its arguments can't be sent to a fresh interpreter.
            ValueError: if the cluster contradicts ``num_processes`` and ``num_nodes``.
        """
        self._check()
        folder = Path(tempfile.mkdtemp(prefix="keraunos-run-"))
        terminated = PassedOn(self)
        terminated.install()
        try:
            self._start((function, args, kwargs), folder)
            self._supervise(folder)
            result: R = torch.load(folder / RESULT, map_location="cpu", weights_only=False)
            return result
        except KeyboardInterrupt:
            self._let_stop()
            raise
        except ProcessExitedException as error:
            if terminated.heard and error.exit_code in (TERMINATED, -signal.SIGTERM):
                raise SystemExit(TERMINATED) from error
            raise
        finally:
            terminated.restore()
            stop(self._ranks, self._patience)
            self._ranks = []
            shutil.rmtree(folder, ignore_errors=True)

    def kill(self, signum: int | signal.Signals) -> None:
        """Send a signal to all ranks that are still running."""
        for rank in self._ranks:
            rank.signal(signum)

    def _let_stop(self) -> None:
        """Ctrl-C has reached this process alone: pass it on, and let the ranks stop where they want to. A second one ends the waiting."""
        self.kill(signal.SIGINT)
        ended: float | None = None
        while any(rank.is_running for rank in self._ranks):
            if ended is None and not all(rank.is_running for rank in self._ranks):
                ended = time.monotonic()  # the others may wait in vain for one that is gone
            if ended is not None and time.monotonic() - ended > self.shutdown_timeout:
                return
            time.sleep(TICK)

    @property
    def _patience(self) -> float:
        return min(5.0, self.shutdown_timeout / 4)

    def _check(self) -> None:
        """Refuse what can't work, before any process starts."""
        environment = self.cluster_environment
        if environment.creates_processes_externally:
            raise MisconfigurationException(
                f"{self.num_processes} new processes were asked for, and {type(environment).__name__} says that they have been started "
                "already (by torchrun, srun, mpirun, or by hand with LOCAL_RANK set). Use strategy='ddp', which takes those."
            )
        if not self.is_interactive_compatible:
            refuse_interactive("Fresh interpreters have to import this program")
        if self.start_method == "fork" and torch.cuda.is_initialized():
            raise RuntimeError(
                "This process has already used CUDA, and a fork of it could not. Look for `.cuda()`, `.to('cuda')`, `torch.cuda...` before "
                "this line; in a notebook restart the kernel first. Or use strategy='ddp_spawn' in a script."
            )
        environment.validate_settings(self.num_processes, self.num_nodes)
        if environment.node_rank() == 0:
            require_free_port(environment.main_port)

    def _start(self, call: Call, folder: Path) -> None:
        forks = self.start_method == "fork"
        if not forks:
            save_call(call, folder / CALL)
        context = multiprocessing.get_context(self.start_method)
        parent = 0 if self.start_method == "forkserver" else os.getpid()
        for local_rank in range(self.num_processes):
            variables = variables_of_rank(self.cluster_environment, local_rank, self.num_processes, self.num_nodes, folder)
            arguments = (folder, variables, parent, call if forks else None)
            process = context.Process(target=run_rank, args=arguments)  # type: ignore[attr-defined]
            process.start()
            self._ranks.append(RankProcess(int(variables[RUN_RANK]), process))

    def _supervise(self, folder: Path) -> None:
        """Return when all ranks have finished; raise when one fails."""
        finished: dict[int, float] = {}  # ranks, and when it was seen
        lingered: set[int] = set()
        while True:
            running = [rank.process.sentinel for rank in self._ranks if rank.is_running]  # type: ignore[union-attr]
            multiprocessing.connection.wait(running, POLL)
            self._note_exits(folder, lingered)
            if failures(folder):
                raise self._failure(folder)
            if not running:
                return
            now = time.monotonic()
            for rank in self._ranks:
                if progress_of(rank.rank, folder) > 0:
                    finished.setdefault(rank.rank, now)
            lingered.update(self._stop_lingering(finished, now))
            self._refuse_stragglers(finished, now)

    def _note_exits(self, folder: Path, lingered: set[int]) -> None:
        for rank in self._ranks:
            code = rank.exit_code
            if code is not None and rank.rank not in lingered and (code or progress_of(rank.rank, folder) < 1):
                report_exit(rank.rank, code, folder)

    def _failure(self, folder: Path) -> ProcessRaisedException | ProcessExitedException:
        wait(self._ranks, SETTLE)
        self._note_exits(folder, set())
        wait_for_leaving(self._ranks, self.shutdown_timeout - 2 * self._patience, folder)
        failure = first_failure(folder)
        assert failure is not None
        stopped = stop(self._ranks, self._patience)
        if failure.kind == "KeyboardInterrupt":  # whoever has sent it to the rank alone
            raise KeyboardInterrupt
        message = explain(failure, stopped)
        begun = progress_of(failure.rank, folder) >= 0
        if not begun:
            message += "\nIt had not begun: does the script start its work under `if __name__ == '__main__':`?"
        place = failure.rank - self._ranks[0].rank
        return as_exception(failure, message, place, self._ranks[place].pid)

    def _stop_lingering(self, finished: dict[int, float], now: float) -> list[int]:
        """End ranks that have done their work and whose interpreters do not end; return which."""
        lingering = [rank for rank in self._ranks if rank.is_running and now - finished.get(rank.rank, now) > self.shutdown_timeout]
        if lingering:
            stop(lingering, self._patience)
            rank_zero_warn(
                f"Ranks {[rank.rank for rank in lingering]} did not end within {self.shutdown_timeout:g} s after their work was done, and "
                "were stopped. Is a thread of theirs still running?"
            )
        return [rank.rank for rank in lingering]

    def _refuse_stragglers(self, finished: dict[int, float], now: float) -> None:
        if self.straggler_timeout is None or not finished or now - min(finished.values()) < self.straggler_timeout:
            return
        stragglers = [rank.rank for rank in self._ranks if rank.rank not in finished]
        if stragglers:
            raise TimeoutError(
                f"Ranks {stragglers} were still running {self.straggler_timeout:g} s after rank {min(finished, key=finished.__getitem__)} "
                "had finished, and were stopped."
            )


class PassedOn:
    """A handler of SIGTERM that passes it on to the ranks, so that they can end in good order before this process does.

    Args:
        launcher: whose ranks they are.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.heard = self._installed = False

    def install(self) -> None:
        """Take over the signal, unless somebody else has; only the main thread may."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._installed = True
            signal.signal(signal.SIGTERM, self)

    def restore(self) -> None:
        """Give it back."""
        if self._installed and signal.getsignal(signal.SIGTERM) is self:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on."""
        self.heard = True
        self.launcher.kill(number)


def as_exception(failure: Failure, message: str, place: int, pid: int) -> ProcessRaisedException | ProcessExitedException:
    """Return the error that ``torch.multiprocessing`` would raise, with our message."""
    code = failure.exit_code
    if code is None:
        return ProcessRaisedException(message, error_index=place, error_pid=pid)
    name = signal.Signals(-code).name if -code in set(signal.Signals) else None
    return ProcessExitedException(message, error_index=place, error_pid=pid, exit_code=code, signal_name=name)


def save_call(call: Call, path: Path) -> None:
    """Write a function and its arguments for fresh interpreters.

    A file, because ``multiprocessing`` passes tensors as file descriptors, of which a process may have few.

    Raises:
        PicklingError: if there is something that can't be written.
    """
    try:
        torch.save(call, path)
    except UNPICKLABLE as error:
        raise pickle.PicklingError(
            f"{getattr(call[0], '__qualname__', call[0])} and its arguments have to be sent to new processes, and pickle can't: {error}. "
            "Define functions and classes at the top level of a module, rather than inside functions or as lambdas; or use strategy='ddp' "
            "or 'ddp_fork', which send nothing."
        ) from error


def save_result(result: Any, path: Path) -> None:
    """Write what rank 0 returns.

    Raises:
        PicklingError: if it can't be written.
    """
    try:
        torch.save(result, path)
    except UNPICKLABLE as error:
        raise pickle.PicklingError(
            f"Rank 0 has returned a {type(result).__name__}, which pickle can't send to the main process: {error}. Return data only."
        ) from error


def run_rank(folder: Path, variables: dict[str, str], parent: int, call: Call | None) -> None:
    """What a new process does: become a rank, run the function, report how that went.

    Args:
        folder: the run's directory.
        variables: for the environment of this rank.
        parent: the process to die with; 0 for the one that has forked this one, whichever it is.
        call: what to run; None if it is to be read from ``folder``.
    """
    if os.name == "posix":
        os.setpgid(0, 0)  # so that all that it will start can be found
        tie_to_parent(parent or os.getppid())
    os.environ.update(variables)
    rank_zero_only.rank = int(variables[RUN_RANK])  # type: ignore[attr-defined]
    # A fork has none of the threads of its parent's pool, and waits for them for ever if it may use more than one.
    torch.set_num_threads(1 if call is not None else int(variables["OMP_NUM_THREADS"]))
    if isinstance(signal.getsignal(signal.SIGTERM), PassedOn):  # inherited by a fork
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mark_progress(0)
    try:
        function, args, kwargs = call if call is not None else torch.load(folder / CALL, weights_only=False)
        result = function(*args, **kwargs)
        if variables["LOCAL_RANK"] == "0":
            save_result(result, folder / RESULT)
    except BaseException as error:
        # The main process shows the error of the rank that fails first, so the others keep quiet.
        code = report_failure(error).exit_code
        sys.exit(1 if code is None else code)
    mark_progress(1)
