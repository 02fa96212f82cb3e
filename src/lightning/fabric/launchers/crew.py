"""The other ranks of this machine, which run the same command, and the thread that ends the run when one of them fails."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from lightning.fabric.launchers.failures import (
    PeerFailure,
    clear_failure,
    current_rank,
    explain,
    failures,
    first_failure,
    mark_progress,
    progress_of,
    report_exit,
    report_failure,
    was_interrupted,
)
from lightning.fabric.launchers.processes import TICK, RankProcess, stop, wait, wait_for_leaving

R = TypeVar("R")

FATAL = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)

POLL = 0.1  # seconds between two looks of the watching thread
SETTLE = 1.0  # seconds in which other ranks may end by themselves, and say why, before they are stopped
LEAVE = 5.0  # seconds that the others get when one rank has left with exit code 0, because they may be about to
NOTICE = 30.0  # seconds after which a wait for others is mentioned


class Crew:
    """Runs functions on this rank while it watches the others.

    Args:
        ranks: the processes of the other ranks of this machine.
        folder: the run's directory, removed at the end.
        shutdown_timeout: seconds after a failure in which everything ends.
        straggler_timeout: seconds that the others may still take when this process is done; None for no limit.
    """

    def __init__(self, ranks: list[RankProcess], folder: Path, shutdown_timeout: float, straggler_timeout: float | None) -> None:
        self.ranks = ranks
        self.folder = folder
        self.shutdown_timeout = shutdown_timeout
        self.straggler_timeout = straggler_timeout
        self.owner = os.getpid()  # a process that forks from this one must leave the others alone
        self._thread = threading.get_ident()
        self._runs = 0  # functions begun
        self._inside = False  # one of them is running
        self._raised_at: float | None = None  # when the last of them raised here
        self._told = False  # the program on this rank has been told of the failure
        self._uncaught = False  # an error ends this process
        self._failed = False  # another rank has failed, or was stopped
        self._over = False  # this process ends
        self._left: dict[int, float] = {}  # ranks with exit code 0 that had not finished, and when that was seen
        self._stopped: set[int] = set()  # ranks that we have ended, so their end tells nothing

    def watch(self) -> None:
        """Begin to watch, until this process ends."""
        atexit.register(self._finish)
        on_uncaught(self._on_uncaught)
        threading.Thread(target=self._watch, name="watch-ranks", daemon=True).start()

    def run(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> R:
        """Run ``function`` on this rank.

        Raises:
            PeerFailure: if another rank has failed first.
        """
        if self._failed:
            raise PeerFailure
        clear_failure()
        self._raised_at, self._told = None, False
        self._runs += 1
        self._inside = True
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                raise  # not a failure: the others wait or leave as well
            cause = self._cause_of(error)
            self._raised_at, self._told = time.monotonic(), True
            if cause is not None:
                self._failed = True
                raise cause from error
            raise
        finally:
            self._inside = False
        mark_progress(self._runs)
        return result

    def kill(self, signum: int) -> None:
        """Send a signal to the others that are still running."""
        if signum in FATAL:
            self._stopped.update(rank.rank for rank in self.ranks if rank.is_running)
        for rank in self.ranks:
            rank.signal(signum)

    def _cause_of(self, error: BaseException) -> PeerFailure | None:
        """The failure of another rank, if that is why this one raises ``error``."""
        if isinstance(error, PeerFailure) or not report_failure(error).is_consequence or isinstance(error, KeyboardInterrupt):
            return None
        # Somebody is gone: wait until it is known who, and why.
        deadline = time.monotonic() + 2 * SETTLE
        while time.monotonic() < deadline:
            self._note_exits(patience=0)
            first = first_failure()
            if first is not None and not first.is_consequence:
                return PeerFailure(first)
            time.sleep(TICK)
        return None

    def _note_exits(self, patience: float | None = None) -> bool:
        """Whether a rank has failed; those that did without a word get a report.

        Args:
            patience: seconds that this rank gets to leave after another one has left with exit code 0.
        """
        patience = min(LEAVE, self.shutdown_timeout / 4) if patience is None else patience
        failed = False
        for rank in self.ranks:
            if rank.rank in self._stopped:
                continue
            code = rank.exit_code
            if code == 0 and self._inside and progress_of(rank.rank) < self._runs:
                if time.monotonic() - self._left.setdefault(rank.rank, time.monotonic()) >= patience:
                    report_exit(rank.rank, 0)
                    failed = True
            elif code:
                report_exit(rank.rank, code)
                failed = True
        return failed

    def _is_alone(self) -> bool:
        """Whether a function has raised on this rank and not on others, which then wait for it in vain."""
        if self._raised_at is None or time.monotonic() - self._raised_at < self.shutdown_timeout:
            return False
        reported = {failure.rank for failure in failures()}
        return any(rank.is_running and rank.rank not in reported for rank in self.ranks)

    def _watch(self) -> None:
        while not self._over:
            time.sleep(POLL)
            if self._over or os.getpid() != self.owner:
                return
            if self._note_exits():
                self._end_run()
                return
            if self._is_alone():
                self._failed = True
                self._stop()
                return

    def _end_run(self) -> None:
        """Another rank has failed: end the others, and this process."""
        deadline = time.monotonic() + self.shutdown_timeout
        self._failed = True
        wait(self.ranks, SETTLE)
        made = PeerFailure.made
        # A rank that has an error of its own, or the user's Ctrl-C, is on its way out, perhaps saving what it can.
        knows = self._told or self._over or was_interrupted() or current_rank() in {failure.rank for failure in failures()}
        if not knows:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(PeerFailure))
        stopped = self._stop()
        while time.monotonic() < deadline:
            if self._over or ((self._told or PeerFailure.made > made) and not self._inside):
                return  # the program knows: it ends, or goes on as its author wants it to
            time.sleep(TICK)
        say(explain(first_failure(), stopped))
        say(f"Rank {current_rank()} did not react to this for {self.shutdown_timeout:g} s, so it is ended here:")
        show_stack()
        self._exit_now()

    def _stop(self) -> list[int]:
        self._note_exits()
        wait_for_leaving(self.ranks, self.shutdown_timeout / 2)
        stopped = stop(self.ranks, patience=min(5.0, self.shutdown_timeout / 4))
        self._stopped.update(stopped)
        return stopped

    def _exit_now(self) -> None:
        """End this process with the exit code of the first failure, whatever else it still wants to do."""
        first = first_failure()
        code = first.exit_code if first is not None and first.exit_code else 1
        shutil.rmtree(self.folder, ignore_errors=True)
        logging.shutdown()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code if code > 0 else 128 - code)

    def _on_uncaught(self, error: BaseException) -> None:
        report_failure(error)
        cause = self._cause_of(error)
        self._uncaught = self._told = True
        if cause is not None:  # an error outside of what `run` surrounds, as after `fabric.launch()`
            say(str(cause))

    def _finish(self) -> None:
        """This process ends: let the others end too, and make them."""
        if os.getpid() != self.owner:
            return
        self._over = True
        stopped: list[int] = []
        if self._failed or self._uncaught:
            end_within(self.shutdown_timeout)
            wait(self.ranks, SETTLE)
            stopped = self._stop()
        else:
            stopped = self._wait_for_stragglers()
        failed = self._note_exits() or self._failed
        if failed and not self._told and not was_interrupted():
            say(explain(first_failure(), stopped))
        elif stopped:
            say(f"Still running when rank {current_rank()} ended, and stopped: ranks {stopped}.")
        if (failed or stopped) and not self._uncaught:
            self._exit_now()  # the only way to an exit code from here
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_for_stragglers(self) -> list[int]:
        """Wait until the others have ended; return those that had to be stopped."""
        begin, noticed = time.monotonic(), False
        while any(rank.is_running for rank in self.ranks):
            waited = time.monotonic() - begin
            if self._note_exits():
                wait(self.ranks, SETTLE)
                return self._stop()
            if self._is_alone() or (self.straggler_timeout is not None and waited > self.straggler_timeout):
                return self._stop()
            if waited > NOTICE and not noticed:
                noticed = True
                limit = "" if self.straggler_timeout is None else f", for {self.straggler_timeout:g} s at most"
                say(f"Rank {current_rank()} is done and waits for ranks {[rank.rank for rank in self.ranks if rank.is_running]}{limit}.")
            time.sleep(TICK)
        return []


def say(text: str) -> None:
    """Print on standard error, whatever has become of it."""
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr, flush=True)


def show_stack() -> None:
    """Print where each thread of this process stands."""
    with contextlib.suppress(Exception):  # a standard error that is not a file
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)


def end_within(seconds: float) -> None:
    """End this process in ``seconds`` if it is still there, even where no Python runs any more; prints its stack then."""
    with contextlib.suppress(Exception):  # a standard error that is not a file
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


def on_uncaught(react: Callable[[BaseException], None]) -> None:
    """Have ``react`` called with the error that ends this process, before it is printed."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        react(error)
        previous(kind, error, trace)

    sys.excepthook = hook
