"""Runs a function on all XLA devices of this machine, and brings back what it returns."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lightning.fabric.launchers.bootstrap import tie_to_parent
from lightning.fabric.launchers.failures import (
    RUN_DIRECTORY,
    RUN_RANK,
    describe,
    explain,
    failures,
    first_failure,
    mark_progress,
    note_failure,
    report_failure,
)
from lightning.fabric.launchers.launcher import refuse_interactive
from lightning.fabric.launchers.multiprocessing import (
    CALL,
    RESULT,
    SETTLE,
    Call,
    MultiprocessingLauncher,
    as_exception,
    save_call,
    save_result,
)
from lightning.fabric.launchers.processes import RankProcess, stop, wait
from lightning.fabric.plugins.environments.xla import XLAEnvironment
from lightning.fabric.plugins.io.xla import on_cpu
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

COPYING = threading.Lock()
_call: Call | None = None  # in a fork: what its devices run


class XLALauncher(MultiprocessingLauncher):
    """Runs a function on each XLA device of this machine, and returns what it returns on the first.

    torch_xla starts the processes: one for each chip of a TPU. On TPUs of the versions 2 and 3, and where CPU devices stand in,
    each device is a thread of such a process. It does so in a process of its own, which is watched, and ended with all of them
    when a device fails.

    Args:
        cluster_environment: knows the ranks, once the processes run.
        num_processes: the devices of this machine: one, or all.
        start_method: ``"fork"`` copies this process as it stands: anything goes, also in a notebook, as long as no XLA device has been
            used. ``"spawn"`` starts fresh interpreters, which get function and arguments as copies, so these must be picklable, and the
            script needs ``if __name__ == "__main__":``.
        num_nodes: machines.
        variables: for the environment of the processes.
        shutdown_timeout: seconds from the first failure to the end of all processes.

    Raises:
        ValueError: if this system has no such ``start_method``.
    """

    def __init__(
        self,
        cluster_environment: XLAEnvironment,
        num_processes: int,
        start_method: Literal["spawn", "fork"] = "fork",
        num_nodes: int = 1,
        variables: Mapping[str, str] | None = None,
        shutdown_timeout: float = 30.0,
    ) -> None:
        super().__init__(cluster_environment, num_processes, start_method, num_nodes, shutdown_timeout)
        self.variables = dict(variables or {})

    def _check(self) -> None:
        """Refuse what can't work, before any process starts."""
        if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
            raise MisconfigurationException(
                "torchrun has started this process, and torch_xla starts one for each device by itself. Run the script without torchrun."
            )
        if not self.is_interactive_compatible:
            refuse_interactive("Fresh interpreters have to import this program")
        if self.num_processes > 1 and runtime_is_in_use():
            raise RuntimeError(
                "This process has already used an XLA device, which the processes to be started then can't. Look for `torch_xla.device()`, "
                "`.to('xla')` or a Trainer with devices=1 before this line; in a notebook restart the kernel first."
            )
        self.cluster_environment.validate_settings(self.num_processes, self.num_nodes)

    def _start(self, call: Call, folder: Path) -> None:
        forks = self.start_method == "fork"
        if not forks:
            save_call(call, folder / CALL)
        variables = {**self.variables, RUN_DIRECTORY: str(folder), RUN_RANK: "0"}
        if XLAEnvironment.is_stand_in():
            variables.update(MEETING_ON_CPU)
        context = multiprocessing.get_context(self.start_method)
        arguments = (folder, variables, os.getpid(), self.start_method, self.num_processes, call if forks else None)
        process = context.Process(target=start_devices, args=arguments)  # type: ignore[attr-defined]
        process.start()
        self._ranks.append(RankProcess(0, process))

    def _failure(self, folder: Path) -> ProcessRaisedException | ProcessExitedException:
        wait(self._ranks, SETTLE)
        self._note_exits(folder, set())
        failure = first_failure(folder)
        assert failure is not None
        stop(self._ranks, self._patience)
        return as_exception(failure, explain(failure), failure.rank, self._ranks[0].pid)


def runtime_is_in_use() -> bool:
    """Whether this process has made use of an XLA device."""
    if "torch_xla" not in sys.modules:
        return False
    import torch_xla

    return bool(torch_xla._XLAC._xla_runtime_is_initialized())


# ---- in the process that is watched -----------------------------------------------------------------------------------


def start_devices(folder: Path, variables: dict[str, str], parent: int, start_method: str, devices: int, call: Call | None) -> None:
    """Let torch_xla start its processes, and wait for them.

    Args:
        folder: the run's directory.
        variables: for the environment.
        parent: the process to die with.
        start_method: how processes are started.
        devices: of this machine that take part.
        call: what they run; None if it is to be read from ``folder``.
    """
    global _call
    if os.name == "posix":
        os.setpgid(0, 0)  # so that all that it will start can be found
        tie_to_parent(parent)
    os.environ.update(variables)
    mark_progress(0)
    _call = call
    try:
        import torch_xla

        torch_xla.launch(run_device, args=(folder, os.getpid()), start_method=start_method, debug_single_process=devices == 1)
    except BrokenProcessPool as error:
        if not failures(folder):
            report_failure(RuntimeError(f"a process that torch_xla has started was killed, or ended by itself: {error}"))
        sys.exit(1)
    except BaseException as error:
        if not failures(folder):  # else the device has said more itself
            report_failure(error)
        sys.exit(1)
    mark_progress(1)


# ---- in the process, or thread, of a device ---------------------------------------------------------------------------


def run_device(rank: int, folder: Path, parent: int) -> None:
    """Run the function on one device, and report how that went.

    Args:
        rank: of the device among those of all machines.
        folder: the run's directory.
        parent: the process to die with.
    """
    import torch_xla.runtime

    if os.name == "posix" and os.getpid() != parent:
        tie_to_parent(parent)
    torch_xla.runtime._WORLD_SIZE = None  # a fork would go by the answer that its parent once got
    shares_process = torch_xla.runtime.addressable_device_count() > 1
    if _call is not None:
        with COPYING:  # a fork has none of the threads of its parent's pools, and waits for them for ever
            torch.set_num_threads(1)
    name_rank(rank, shares_process)
    if shares_process:
        share_process(on_cpu=XLAEnvironment.is_stand_in())
    try:
        function, args, kwargs = own_call(folder, shares_process)
        result = function(*args, **kwargs)
        if torch_xla.runtime.local_ordinal() == 0:
            torch_xla.sync()
            save_result(on_cpu(result), folder / RESULT)
    except BaseException as error:
        # The main process shows the error of the device that fails first, and ends the others, which may wait for this one.
        os.environ[RUN_DIRECTORY] = str(folder)
        note_failure(describe(error, rank))
        raise


def own_call(folder: Path, shares_process: bool) -> Call:
    """What a device runs; where devices share a process, a copy of its own."""
    if _call is None:
        read: Call = torch.load(folder / CALL, weights_only=False)
        return read
    if not shares_process:
        return _call
    with COPYING:
        try:
            return copy.deepcopy(_call)
        except TypeError as error:
            raise pickle.PicklingError(
                f"Several XLA devices share a process here, and each needs a copy of {getattr(_call[0], '__qualname__', _call[0])} and its "
                f"arguments, which can't be copied: {error}."
            ) from error


def name_rank(rank: int, shares_process: bool) -> None:
    """Tell what reports and warns in this process which rank it is."""
    if not shares_process:
        os.environ[RUN_RANK] = str(rank)
        rank_zero_only.rank = rank  # type: ignore[attr-defined]
        return
    os.environ.pop(RUN_DIRECTORY, None)  # a report in the name of the process could be of any of its devices
    if not isinstance(rank_zero_only.rank, ThreadRank):  # type: ignore[attr-defined]
        rank_zero_only.rank = ThreadRank()  # type: ignore[attr-defined]
    rank_zero_only.rank.value.set(rank)  # type: ignore[attr-defined]


class ThreadRank:
    """A rank that is different in each thread, and in those that it starts in its context; 0 where no device was given to a thread."""

    def __init__(self) -> None:
        self.value: ContextVar[int] = ContextVar("rank", default=0)

    def __int__(self) -> int:
        return self.value.get()

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    def __hash__(self) -> int:
        return hash(int(self))

    def __bool__(self) -> bool:
        return int(self) != 0

    def __repr__(self) -> str:
        return repr(int(self))


# ---- devices that share a process -------------------------------------------------------------------------------------

# For XLA's CPU devices a collective is a meeting of threads that run the same compiled program. An execution that owns its
# inputs' memory would keep the thread that has begun it from letting the next one begin.
MEETING_ON_CPU = {"XLA_ENABLE_PARAM_ALIASING": "0"}
SENDING = threading.Lock()


def share_process(on_cpu: bool) -> None:
    """Make `torch_xla.sync` fit for several devices in one process.

    Args:
        on_cpu: whether they are CPU devices. These compile one after another, so that they share what the first has compiled.
    """
    import torch_xla
    import torch_xla.core.xla_model as xm

    with COPYING:
        if getattr(torch_xla.sync, "shares_process", False):
            return
        send = torch_xla.sync

        def sync(*args: Any, **kwargs: Any) -> Any:
            device = torch_xla.device()
            # With nothing to send, torch_xla waits for device 0, which may wait for this one. So there is always something.
            something = torch.ones((), device=device)
            if not on_cpu:
                return send(*args, **kwargs)
            # What runs on this device may wait for another, which must not wait for this thread's turn then.
            xm.wait_device_ops(xm.xla_real_devices([device]))
            with SENDING:
                result = send(*args, **kwargs)
            del something
            return result

        sync.shares_process = True  # type: ignore[attr-defined]
        torch_xla.sync = sync
