"""What processes tell each other while their main threads compute, or stand in a collective.

Each process has a thread with a connection of its own to the store in which the processes have met. Nothing here takes a
collective, or anything of the main thread; a step pays nothing for it.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from lightning.fabric import stacks
from lightning.fabric.launchers.crew import say, show_stack
from lightning.fabric.launchers.failures import EXIT, Failure, PeerFailure, describe, explain, first_failure, note_failure
from lightning.fabric.launchers.script import running_crew

log = logging.getLogger(__name__)

POLL = 1.0  # seconds between two looks at what others say
CROWD = 1000  # processes from which on each talks the more rarely, the more there are: the store hears no more of them together
LOST_POLL = 5.0  # the same, while the store does not answer: torch prints a line each time
ALARM = "alarm"  # the key under which the first failure stands
FIND_CAUSE = 2.0  # seconds in which a process that only sees others vanish learns why
SETTLE = 1.0  # seconds in which the main thread may notice by itself that another process has failed
GRACE = 30.0  # seconds in which the main thread may end by itself after another process has failed
OPERATION = timedelta(seconds=10)  # how long the store may take to answer

Task = Callable[[], float | None]

_runs = 0  # channels opened by this process: the same number in all of them, since all take the same runs


class SideChannel:
    """A thread that talks to those of the other processes, through the store of the process group.

    A failure of one process is told to all, also to those of other machines, which no launcher ties to this one: they
    raise :class:`~lightning.fabric.launchers.PeerFailure`, or are ended where no Python runs.

    Args:
        rank: of this process.
        world_size: the number of processes.
        store: where they have met; a copy with a connection of its own is made of it.
        grace: seconds in which the main thread may end by itself after another process has failed.
    """

    def __init__(self, rank: int, world_size: int, store: Any, grace: float = GRACE) -> None:
        self.rank = rank
        self.world_size = world_size
        self.grace = grace
        self.owner = threading.get_ident()  # the thread that runs the program
        self.alarm: Failure | None = None  # why the run fails, once it is known here
        self.ends_together = False  # all processes have agreed to end the run, so an error that does it is no news to them
        self.lost: float | None = None  # since when the store does not answer
        self._pulse: stacks.Pulse | None = None  # of the main thread, since then
        self._store = store
        self._copy: Any = None
        self._prefix = ""
        self._tasks: dict[Task, float] = {}  # what to do, and when next
        self._outbox: list[tuple[str, Any, bool]] = []
        self._sent = threading.Event()
        self._wake = threading.Event()
        self._closing = False
        self._raised = False  # an error was raised in the main thread from here
        self._failing = False  # the main thread ends the run
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @classmethod
    def to_all(cls) -> SideChannel:
        """A channel of the processes of the default group, open."""
        from torch.distributed.distributed_c10d import _get_default_store

        channel = cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), _get_default_store())
        channel.open()
        return channel

    # ---- for the main thread ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the thread; all processes must do so, in the same order among their runs."""
        global _runs
        _runs += 1
        self._prefix = f"keraunos/{_runs}"
        self._copy = self._store.clone()
        self._copy.set_timeout(OPERATION)
        self.every(self._look_for_alarm, POLL)
        self._thread = threading.Thread(target=self._run, name="side-channel", daemon=True)
        self._thread.start()
        # A thread that is inside of the store when Python ends would take the process down with it.
        atexit.register(self.close)

    def close(self) -> None:
        """Say the last things, and end the thread."""
        atexit.unregister(self.close)
        with self._lock:
            self._closing = True
            if self._raised:  # this process ends, or goes on, for a reason of its own
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.owner), None)
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(FIND_CAUSE)

    @property
    def is_open(self) -> bool:
        """Whether the program still runs what the channel was opened for."""
        return not self._closing

    def send(self, key: str, value: Any, first: bool = False, wait: float = 0.0) -> None:
        """Have the thread write a value, for all to read.

        Args:
            key: its name.
            value: plain data.
            first: let a value stay that is there already.
            wait: seconds to wait until it is written.
        """
        self._sent.clear()
        self._outbox.append((key, value, first))
        self._wake.set()
        if wait:
            self._sent.wait(wait)

    def fail(self, error: BaseException) -> None:
        """This process fails: tell the others why, or learn from them why it does. It never raises, nor waits for long."""
        self._failing = True
        if self._thread is None or self.alarm is not None or self.ends_together:
            return
        failure = error.failure if isinstance(error, PeerFailure) else describe(error, self.rank)
        interrupted = isinstance(error, KeyboardInterrupt)
        deadline = time.monotonic() + FIND_CAUSE
        while not interrupted and (failure is None or failure.is_consequence) and time.monotonic() < deadline:
            failure = self.alarm or first_failure() or failure
            self.every(self._look_for_alarm, 0)
            time.sleep(0.05)
        if failure is not None and (interrupted or not failure.is_consequence) and self.alarm is None:
            self.send(ALARM, asdict(failure), first=True, wait=FIND_CAUSE)

    # ---- for the tasks of the thread ------------------------------------------------------------------------------------

    def every(self, task: Task, seconds: float = POLL) -> None:
        """Have ``task`` called by the thread; it returns in how many seconds to call it again, or None for never.

        Args:
            task: must be quick, since all share the thread.
            seconds: until the first call.
        """
        self._tasks[task] = time.monotonic() + seconds
        self._wake.set()

    def paced(self, seconds: float) -> float:
        """How long to wait where ``seconds`` would do for a few processes, so that the store of rank 0 is not asked too much."""
        return seconds * max(1.0, self.world_size / CROWD)

    def put(self, key: str, value: Any) -> None:
        """Write a value, for all to read."""
        self._copy.set(self._name(key), json.dumps(value))

    def put_first(self, key: str, value: Any) -> Any:
        """Write a value unless there is one; return what then stands there."""
        return json.loads(self._copy.compare_set(self._name(key), "", json.dumps(value)))

    def get(self, key: str) -> Any:
        """The value that was written, or None."""
        name = self._name(key)
        return json.loads(self._copy.get(name)) if self._copy.check([name]) else None

    def get_all(self, keys: list[str]) -> list[Any]:
        """The values of many keys, None where there is none yet; two requests where there are all."""
        names = [self._name(key) for key in keys]
        if self._copy.has_extended_api() and self._copy.check(names):
            return [json.loads(value) for value in self._copy.multi_get(names)]
        return [self.get(key) for key in keys]

    def add(self, key: str, number: int) -> int:
        """Add to a number that all share, 0 at first; return what it then is."""
        return int(self._copy.add(self._name(key), number))

    def end(self, failure: Failure, report: str | None = None, at_once: bool = False) -> None:
        """End this process because of ``failure``: through an error in its main thread if that hears of it in time.

        Args:
            failure: of any rank.
            report: to be printed if the main thread does not end; None for the failure.
            at_once: don't wait for the main thread.
        """
        note_failure(failure)
        self.alarm = failure
        crew = running_crew()
        if at_once and crew is None:
            leave(1)
        began = time.monotonic()
        # The crew ends this process too, and has others to end before.
        while time.monotonic() - began < self.grace + (5 if crew is not None else 0) or self._failing:
            if self._closing:
                return
            if time.monotonic() - began > SETTLE:
                self._raise_in_main_thread()
            time.sleep(0.05)
        say(report or explain(failure))
        say(f"Rank {self.rank} did not react to this for {self.grace:g} s, so it is ended here:")
        show_stack()
        leave(1)

    def _raise_in_main_thread(self) -> None:
        with self._lock:
            if not self._closing and not self._failing and not self._raised:
                self._raised = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.owner), ctypes.py_object(PeerFailure))

    # ---- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            due = min(self._tasks.values(), default=time.monotonic() + POLL)
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            last = self._closing
            self._attempt(self._post)
            if last:
                return
            now = time.monotonic()
            for task in [task for task, due in self._tasks.items() if due <= now]:
                again = self._attempt(task)
                if again is None:
                    self._tasks.pop(task, None)
                else:
                    self._tasks[task] = time.monotonic() + again

    def _attempt(self, task: Task) -> float | None:
        try:
            again = task()
        except RuntimeError as error:  # of the store, all of whose errors are RuntimeErrors
            if not self._closing:
                self._note_loss(error)
            return min(LOST_POLL, self.grace / 2)
        except Exception:
            log.debug("A task of the side channel failed.", exc_info=True)
            return POLL
        return again

    def _note_loss(self, error: Exception) -> None:
        """The store does not answer: the process that holds it is gone, or far away."""
        if self._pulse is None:
            self._pulse = stacks.Pulse(self.owner)
        alive = self._pulse.look() and not self._pulse.spins  # one that waits for its device computes, in one place
        late = re.search("time(d )?out", str(error), re.IGNORECASE) is not None
        if self.lost is None or alive or late:
            # As long as the main thread gets on, nobody has to be there: rank 0 may have come to its end earlier.
            self.lost = time.monotonic()
        elif time.monotonic() - self.lost > self.grace:
            text = "is gone: nothing answers any more where the processes have met"
            self.end(Failure(0, time.time(), EXIT, text))

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _post(self) -> None:
        while self._outbox:
            key, value, first = self._outbox[0]
            if first:
                self.put_first(key, value)
            else:
                self.put(key, value)
            self.lost = None
            self._outbox.pop(0)
        self._sent.set()

    def _look_for_alarm(self) -> float | None:
        found = self.get(ALARM)
        self.lost = None
        if found is None:
            return self.paced(POLL)
        self.end(Failure(**found))
        return None


def leave(code: int) -> None:
    """End this process now, whatever its main thread does."""

    def flush() -> None:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            logging.shutdown()

    thread = threading.Thread(target=flush, daemon=True)  # the main thread may hold their locks for ever
    thread.start()
    thread.join(2)
    os._exit(code)
