"""The processes that a launcher has started: ask after them, signal them, end them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightning.fabric.launchers.failures import STILL, failures

TICK = 0.05  # seconds between two looks


@dataclass
class RankProcess:
    """One rank's process.

    Args:
        rank: its global rank.
        process: as ``subprocess`` or ``multiprocessing`` has made it.
        mark: variables that it, and what it has started, find in the environment, and nobody else does; None if it leads a
            process group instead.
    """

    rank: int
    process: subprocess.Popen[bytes] | BaseProcess
    mark: dict[str, str] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the number of the signal that killed it."""
        return self.process.exitcode if isinstance(self.process, BaseProcess) else self.process.poll()

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    def signal(self, signum: int) -> None:
        """Send it a signal, if it still runs."""
        if self.is_running:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def sweep(self) -> None:
        """Kill it, and what it has started and left behind."""
        self.signal(signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            if self.mark is None:
                os.killpg(self.pid, signal.SIGKILL)
        for pid in processes_with(self.mark) if self.mark else ():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def processes_with(variables: dict[str, str]) -> list[int]:
    """The processes whose environment holds ``variables``, as they were when their programs began (on Linux; else none)."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def wait(processes: Iterable[RankProcess], seconds: float) -> bool:
    """Wait until all have ended, ``seconds`` at most; returns whether they have."""
    deadline = time.monotonic() + seconds
    while any(process.is_running for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(TICK)
    return True


def wait_for_leaving(processes: Iterable[RankProcess], seconds: float, folder: Path | None = None) -> None:
    """Wait for those that have an error of their own: they are on their way out, and may be saving what they can.

    Args:
        processes: may have ended already.
        seconds: to wait at most.
        folder: the run's directory; None for that of this process's run.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        leaving = {failure.rank for failure in failures(folder) if failure.kind != STILL}
        if not any(process.is_running and process.rank in leaving for process in processes):
            return
        time.sleep(TICK)


def stop(processes: list[RankProcess], patience: float) -> list[int]:
    """End the processes, and what those that failed have left behind.

    Args:
        processes: may have ended already.
        patience: seconds between the request (SIGTERM) and the end (SIGKILL).

    Returns:
        The ranks that were still running.
    """
    running = [process for process in processes if process.is_running]
    for process in running:
        process.signal(signal.SIGTERM)
    wait(running, patience)
    for process in processes:
        # A rank that ended well may have left something that is meant to go on; one that failed has not.
        if process.exit_code != 0:
            process.sweep()
    wait(running, 5.0)
    return [process.rank for process in running]
