"""Which rank failed first, and why: each rank writes its error into a directory that all ranks of a machine share.

When one rank fails, the others fail after it, with errors that say only that somebody is gone. Whoever reports to the
user asks :func:`first_failure` instead of showing what it happens to see.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

RUN_DIRECTORY = "KERAUNOS_RUN_DIRECTORY"  # the environment variable that names the directory
RUN_RANK = "KERAUNOS_RANK"  # the global rank of a process, known before anything else is

EXIT = "exit"  # the kind of a failure that left no error: the process was gone
STILL = "still"  # the kind of a failure that the watchdog has noticed: the process is there, and does nothing

# Errors that a rank gets because another one is gone: types by their names, and messages of gloo, NCCL and the store.
CONSEQUENCE_KINDS = {"PeerFailure", "KeyboardInterrupt", "ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError"}
CONSEQUENCE_KINDS |= {"DistBackendError", "DistNetworkError", "DistStoreError"}
CONSEQUENCE_MESSAGE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket timeout|timed out waiting|operation timed out"
    r"|timeout caused pair closure|no such pair|failed to pass monitoredBarrier|NCCL error|NCCL communicator was aborted",
    re.IGNORECASE,
)


_heard: list[Failure] = []  # failures of other ranks, for processes that share no directory


@dataclass(frozen=True)
class Failure:
    """Why one rank failed.

    Args:
        rank: its global rank.
        time: when, in seconds since the epoch.
        kind: the name of the error's class; ``"exit"`` if the process ended without an error of its own, ``"still"`` if it
            stands still.
        message: the error's text.
        traceback: as Python prints it, or where the process stands; empty if it ended without an error.
        exit_code: of the process, where it was that which told; negative: the number of the signal that killed it.
    """

    rank: int
    time: float
    kind: str
    message: str
    traceback: str = ""
    exit_code: int | None = None

    @property
    def is_consequence(self) -> bool:
        """Whether the error only tells that another rank is gone."""
        return self.kind in CONSEQUENCE_KINDS or (self.kind == "RuntimeError" and bool(CONSEQUENCE_MESSAGE.search(self.message)))

    def __str__(self) -> str:
        if self.kind in (EXIT, STILL):
            return f"rank {self.rank} {self.message}"
        first_line = self.message.strip().partition("\n")[0]
        return f"rank {self.rank} raised {self.kind}" + (f": {first_line}" if first_line else "")


class PeerFailure(RuntimeError):
    """Another rank has failed, so this one can't go on.

    Args:
        failure: the first cause; looked up in the run's directory if not given.
        stopped: the ranks that were still running and have been stopped.

    Attributes:
        rank: the rank that failed first, or None if it is not known.
        failure: what is known about it.
    """

    # Raised at any place of a program by :class:`~lightning.fabric.launchers.crew.Crew`, which waits for this.
    made = 0

    def __init__(self, failure: Failure | None = None, stopped: Iterable[int] = ()) -> None:
        PeerFailure.made += 1
        self.failure = failure if failure is not None else first_failure()
        self.rank = self.failure.rank if self.failure else None
        super().__init__(explain(self.failure, stopped))


def explain(failure: Failure | None, stopped: Iterable[int] = ()) -> str:
    """Return the message for the user: who failed first and why, who was stopped, and the traceback."""
    if failure is None:
        return "Another rank has failed, and left no error."
    text = f"The run failed: {failure}."
    others = sorted(set(stopped) - {failure.rank})
    if others:
        text += f"\nStopped while still running: rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}."
    if failure.traceback:
        what = "which stands here" if failure.kind == STILL else "the first to fail"
        text += f"\n\nOn rank {failure.rank}, {what}:\n{failure.traceback.rstrip()}"
    return text


def directory() -> Path | None:
    """The directory that the ranks of this machine share, or None if no launcher of ours made one."""
    path = os.environ.get(RUN_DIRECTORY)
    return Path(path) if path else None


def current_rank() -> int:
    """The global rank of this process: as our launcher has set it, or another; 0 if nothing says."""
    return int(os.environ.get(RUN_RANK) or os.environ.get("RANK") or 0)


def report_failure(error: BaseException) -> Failure:
    """Tell the other processes of this machine why this rank fails, as soon as it is known. It never raises.

    Only the first error of a rank counts. Under torchrun it also goes into the file that torchrun reads, so that its
    summary names the cause.

    Args:
        error: what was raised.

    Returns:
        What was noted.
    """
    if os.environ.get("TORCHELASTIC_ERROR_FILE") and isinstance(error, Exception):
        with suppress(Exception):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
    failure = describe(error, current_rank())
    _write(failure)
    return failure


def describe(error: BaseException, rank: int) -> Failure:
    """What is to be said of an error that ``rank`` has raised just now."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return Failure(rank, time.time(), EXIT, _describe_exit(code), "", code)
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failure(rank, time.time(), type(error).__name__, str(error), text)


def note_failure(failure: Failure) -> None:
    """Take note of the failure of another rank, perhaps one of another machine, as this process has heard of it.

    The other processes of this machine find it beside those that ranks have reported themselves.
    """
    _heard.append(failure)
    _write(failure)


def hand_to_torchrun(failure: Failure) -> None:
    """Write the failure of this rank into the file that torchrun reads for its summary, if it has started this process."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(Exception):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            try:  # its handler takes the traceback from what is being handled
                raise RuntimeError(f"{failure}\n{failure.traceback}")
            except RuntimeError as error:
                get_error_handler().record_exception(error)


def report_exit(rank: int, exit_code: int, folder: Path | None = None) -> None:
    """Note that the process of ``rank`` is gone; what the rank has reported itself stays.

    Args:
        rank: its global rank.
        exit_code: of the process; negative: the number of the signal that killed it.
        folder: the run's directory; that of this process's run if None, as below.
    """
    _write(Failure(rank, time.time(), EXIT, _describe_exit(exit_code), "", exit_code), folder)


def clear_failure() -> None:
    """Take back what this rank has reported: it has caught the error, and goes on."""
    _heard.clear()
    folder = directory()
    if folder is not None:
        _file(folder, current_rank()).unlink(missing_ok=True)


def failures(folder: Path | None = None) -> list[Failure]:
    """What each rank of this machine has reported, in the order in which they failed."""
    folder = folder or directory()
    found = []
    for path in folder.glob("failure-*.json") if folder is not None else ():
        with suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda failure: failure.time)


def first_failure(folder: Path | None = None) -> Failure | None:
    """Return why the run fails: the earliest failure that is not just the consequence of another. None without any."""
    found = failures(folder) or _heard
    return next((failure for failure in found if not failure.is_consequence), found[0] if found else None)


def was_interrupted() -> bool:
    """Whether all that has happened is that the user wants to stop."""
    found = failures()
    return bool(found) and all(
        failure.kind == "KeyboardInterrupt" or failure.exit_code in (-signal.SIGINT, 128 + signal.SIGINT) for failure in found
    )


def mark_progress(runs: int) -> None:
    """Tell the others that this rank has finished ``runs`` functions; 0 once it has begun."""
    folder = directory()
    if folder is not None:
        with suppress(OSError):
            (folder / f"finished-{current_rank()}").write_text(str(runs), encoding="utf-8")


def progress_of(rank: int, folder: Path | None = None) -> int:
    """How many functions ``rank`` has finished; -1 if it has not begun."""
    folder = folder or directory()
    if folder is None:
        return -1
    try:
        return int((folder / f"finished-{rank}").read_text(encoding="utf-8") or 0)
    except OSError:
        return -1


def _describe_exit(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (the kernel does so when memory runs out: see `dmesg`)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    if code == 0:
        return "left with exit code 0 before the run was over"
    return f"ended with exit code {code} (what it has printed may say why)"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"failure-{rank}.json"


def _write(failure: Failure, folder: Path | None = None) -> None:
    folder = folder or directory()
    if folder is None:
        return
    try:
        with open(_file(folder, failure.rank), "x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(failure)))
    except FileExistsError:
        pass  # what a rank reports first is the cause of what follows
    except OSError as problem:
        with suppress(Exception):
            print(f"The error of rank {failure.rank} could not be shared ({problem}):\n{failure.traceback}", file=sys.stderr)
