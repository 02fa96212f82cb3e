"""Notices that a run of several processes stands still, names the process that does, and ends the run."""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from lightning.fabric import stacks
from lightning.fabric.launchers.crew import say
from lightning.fabric.launchers.failures import STILL, Failure, hand_to_torchrun, note_failure
from lightning.fabric.side_channel import POLL, SideChannel

DEFAULT_LIMIT = timedelta(minutes=30)

LOOK = 5.0  # seconds between two looks, where the limit is not shorter
ANSWER = 3.0  # seconds, beyond a look, in which a process answers with its stack
SHOWN = 8  # processes of each kind that a report lists
HALT, REPORT = "halt", "report"
# For the stack of a process whose interpreter is held: a signal that nothing else uses, where the system has such.
DUMP: int | None = signal.SIGRTMAX - 7 if sys.platform == "linux" else None


@dataclass
class Status:
    """What a process says of itself.

    Args:
        progress: changes when it gets on.
        position: where in the run it is, as numbers to compare; None outside of loops.
        where: the same for people.
        waits: whether its main thread stands in a collective.
        state: ``"runs"``, ``"debugged"`` or ``"done"``.
        beat: changes as long as its interpreter runs.
        machine: what only processes of one machine have in common.
        host: the name of the machine.
        pid: the process.
        began: when it did, in the system's units.
        dump: the file into which the system writes its stack when asked; empty if it can't.
    """

    progress: int = 0
    position: list[Any] | None = None
    where: str = ""
    waits: bool = False
    state: str = "runs"
    beat: int = 0
    machine: str = field(default_factory=stacks.machine)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    began: str = field(default_factory=lambda: stacks.started(os.getpid()))
    dump: str = ""


@dataclass
class Watched:
    """What a watching process knows of another.

    Args:
        rank: of the other one.
        status: the newest that it has published; None if it has not begun.
        still: seconds without progress.
        silent: seconds without a sign of its interpreter.
        patience: how many of those are usual.
    """

    rank: int
    status: Status | None = None
    still: float = 0.0
    silent: float = 0.0
    patience: float = float("inf")

    def update(self, status: Status | None, elapsed: float) -> None:
        """Take note of the newest status, ``elapsed`` seconds after the last one."""
        old = self.status
        self.still = 0.0 if status is not None and (old is None or status.progress != old.progress) else self.still + elapsed
        self.silent = 0.0 if status is not None and (old is None or status.beat != old.beat) else self.silent + elapsed
        self.status = status

    @property
    def is_running(self) -> bool:
        """Whether something is expected of it."""
        return self.status is None or self.status.state != "done"

    @property
    def is_silent(self) -> bool:
        """Whether its interpreter is held: what it has said last is out of date."""
        return self.status is not None and self.silent > self.patience

    @property
    def waits(self) -> bool:
        """Whether it only waits for others. Its interpreter runs meanwhile."""
        return self.status is not None and self.status.waits and not self.is_silent

    @property
    def place(self) -> tuple[int, list[Any]]:
        """For comparison: who is behind comes first."""
        position = self.status.position if self.status is not None else None
        return (0, []) if position is None else (1, position)

    def __str__(self) -> str:
        if self.status is None:
            return f"rank {self.rank}"
        where = f", at {self.status.where}" if self.status.where else ""
        return f"rank {self.rank} (process {self.status.pid} of {self.status.host}{where})"


def standing_still(watched: list[Watched], limit: float) -> list[Watched]:
    """The processes that hold up the run: none as long as those that stand still may wait for one that gets on.

    Args:
        watched: all processes.
        limit: seconds without progress.
    """
    running = [each for each in watched if each.is_running]
    active = [each for each in running if each.still < limit]
    suspects = [
        each for each in running if each.still >= limit and not (active and (each.waits or any(a.place <= each.place for a in active)))
    ]
    if not suspects:
        return []
    stuck = [each for each in suspects if not each.waits] or suspects
    behind = min(each.place for each in stuck)
    return [each for each in stuck if each.place == behind]


class Watchdog:
    """Watches over the processes of a run, from a thread of each.

    The loops say where they are by what they count anyway, so that a step pays nothing. A process stands still if for
    ``limit`` its position has not changed. Outside of loops, and while a checkpoint is read or written, any sign of life
    counts: another stack, bytes that were read or written, a core at work. Processes that may wait for one that gets on are
    left alone, and so are all while one of them is looked at with a debugger.

    If one stands still, its rank and stack are printed, and the run is ended, in all processes, with an exit code that is not 0.

    Args:
        channel: to the other processes; open.
        limit: how long a process may take from one position to the next.
        position: where the run is: a number or a tuple of numbers (the fields of a named one are shown) that grows from batch
            to batch, or None outside of loops. It is called every few seconds, from another thread than the main one.
        on_device: whether processes may wait for each other on a device, which their stacks don't tell.

    Example::

        watchdog = Watchdog(SideChannel.to_all(), timedelta(minutes=30), position=lambda: loop.batches)
        watchdog.start()
        ...
        watchdog.stop()
    """

    def __init__(self, channel: SideChannel, limit: timedelta, position: Callable[[], Any], on_device: bool = False) -> None:
        self.channel = channel
        self.limit = limit.total_seconds()
        self.position = position
        self.on_device = on_device
        self.every = min(channel.paced(LOOK), max(self.limit / 10, 0.1))
        self.status = Status()
        self.pulse = stacks.Pulse(channel.owner)
        self.watched = [Watched(rank, patience=2 * self.every) for rank in range(channel.world_size)]
        self.looked = time.monotonic()
        self.halted = False
        self._memory: int | None = None  # holds what the system writes of the stack
        self._neighbours = 0  # processes of this machine
        self._timed = False

    def start(self) -> None:
        """Begin to watch; all processes must do so."""
        self._prepare_dump()
        self.channel.every(self._begin, 0)
        self.channel.every(self._look, self.every)
        self.channel.every(self._look_for_halt, POLL)

    def stop(self) -> None:
        """Nothing is expected of this process any more; to be called before the channel is closed."""
        self.status.state = "done"
        self.channel.send(self._key(), asdict(self.status))
        if self._timed:
            faulthandler.cancel_dump_traceback_later()
        if self._memory is not None and DUMP is not None:
            faulthandler.unregister(DUMP)
            os.close(self._memory)
            self._memory = None

    # ---- this process ---------------------------------------------------------------------------------------------------

    def _key(self, rank: int | None = None) -> str:
        return f"watch/{self.channel.rank if rank is None else rank}"

    def _begin(self) -> None:
        self.channel.add(f"machine/{stacks.machine()}", 1)
        self.channel.put(self._key(), asdict(self.status))

    def _look(self) -> float | None:
        if self.status.state == "done" or self.halted:
            return None
        self._take_pulse()
        self.channel.put(self._key(), asdict(self.status))
        if self.channel.rank < 2:
            self._watch()
        if self._neighbours < 2:
            self._neighbours = self.channel.add(f"machine/{stacks.machine()}", 0) if DUMP is not None and stacks.machine() else 1
        if self._neighbours < 2 and self.channel.is_open:
            # If no Python ran here any more, nobody else could get the stack, or end this process.
            with suppress(Exception):  # a standard error that is not a file
                faulthandler.dump_traceback_later(self.limit + 4 * self.every + 3, exit=True, file=sys.__stderr__ or sys.stderr)
                self._timed = True
        return self.every

    def _take_pulse(self) -> None:
        status, pulse = self.status, self.pulse
        alive = pulse.look()
        position = self.position()
        numbers = None if position is None else list(position) if isinstance(position, (tuple, list)) else [position]
        if numbers != status.position or (alive and (numbers is None or pulse.stores)):
            status.progress += 1
        status.position, status.where = numbers, describe_position(position)
        status.waits = pulse.waits or (self.on_device and pulse.spins)
        status.beat += 1
        status.state = "debugged" if pulse.debugged else "runs"

    # ---- all processes ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Look at all processes: rank 0 does, and rank 1 in case that rank 0 can't."""
        now = time.monotonic()
        # Capped: if more time has passed, this process was stopped, and so may all have been.
        elapsed, self.looked = min(now - self.looked, 2 * self.every), now
        for each, found in zip(self.watched, self.channel.get_all([self._key(each.rank) for each in self.watched])):
            each.update(None if found is None else Status(**found), elapsed)
        if any(each.status is not None and each.status.state == "debugged" for each in self.watched):
            for each in self.watched:
                each.still = each.silent = 0.0
            return
        guilty = standing_still(self.watched, self.limit + (3 * self.every if self.channel.rank else 0))
        if not guilty or not self.channel.is_open:
            return
        silent = [each.rank for each in self.watched if each.is_running and each.is_silent]
        order = {"by": self.channel.rank, "guilty": [each.rank for each in guilty], "silent": silent}
        if self.channel.put_first(HALT, order)["by"] == self.channel.rank:
            self._halt(guilty, silent)

    def _halt(self, guilty: list[Watched], silent: list[int]) -> None:
        """Gather the stacks, report, and end the run."""
        self.halted = True
        self._answer(silent)
        running = [each for each in self.watched if each.status is not None and each.is_running]
        found: dict[int, str] = {}
        deadline = time.monotonic() + self.every + POLL + ANSWER
        while len(found) < len(running) and time.monotonic() < deadline:
            for each in running:
                stack = None if each.rank in found else self.channel.get(f"stack/{each.rank}")
                if stack is not None:
                    found[each.rank] = stack
            time.sleep(0.05)
        first = guilty[0]
        failure = Failure(first.rank, time.time(), STILL, complaint(self.limit, first.waits), found.get(first.rank, ""))
        self.channel.put(REPORT, asdict(failure))
        say(report(guilty, running, found, self.limit))
        self._end(failure, silent)

    def _look_for_halt(self) -> float | None:
        if self.status.state == "done" or self.halted:
            return None
        order = self.channel.get(HALT)
        if order is None:
            return self.channel.paced(POLL)
        self.halted = True
        self._answer(order["silent"])
        deadline = time.monotonic() + 3 * (self.every + POLL + ANSWER)
        while (found := self.channel.get(REPORT)) is None and time.monotonic() < deadline and self.channel.is_open:
            time.sleep(0.05)
        if found is None:
            say(f"Rank {self.channel.rank} was told that the run stands still, and no more. It stands here itself:\n{self._own_stack()}")
            found = asdict(Failure(order["guilty"][0], time.time(), STILL, complaint(self.limit)))
        self._end(Failure(**found), order["silent"])
        return None

    def _answer(self, silent: list[int]) -> None:
        """Publish the stack of this process, and of those of this machine that can't do so themselves."""
        self.channel.put(f"stack/{self.channel.rank}", self._own_stack())
        for rank in silent:
            status = self.channel.get(self._key(rank))
            if status is not None and rank != self.channel.rank:
                stack = stack_by_signal(Status(**status))
                if stack:
                    self.channel.put_first(f"stack/{rank}", stack)

    def _own_stack(self) -> str:
        return stacks.described(stacks.frame_of(self.channel.owner))

    def _end(self, failure: Failure, silent: list[int]) -> None:
        """End this process; rank 0, which holds the loggers, may come to its end in an orderly way, if it still can."""
        if self._timed:
            faulthandler.cancel_dump_traceback_later()
        if not self.channel.is_open:
            return
        note_failure(failure)
        for rank in silent:
            status = self.channel.get(self._key(rank))
            if status is not None and is_neighbour(Status(**status)):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(status["pid"], signal.SIGKILL)
        if failure.rank == self.channel.rank:
            hand_to_torchrun(failure)
        else:
            time.sleep(POLL)
        self.channel.end(failure, at_once=self.channel.rank > 0)

    def _prepare_dump(self) -> None:
        """Have the system write the stack of this process when it gets the signal, even if no Python can run."""
        if DUMP is None or not stacks.machine() or signal.getsignal(DUMP) is not signal.SIG_DFL:
            return
        with suppress(OSError, RuntimeError, ValueError):
            self._memory = os.memfd_create("stack")  # type: ignore[attr-defined, unused-ignore]  # only on Linux
            faulthandler.register(DUMP, file=self._memory, all_threads=False)
            self.status.dump = f"/proc/{os.getpid()}/fd/{self._memory}"


# ---- processes whose interpreter is held --------------------------------------------------------------------------------


def is_neighbour(status: Status) -> bool:
    """Whether the process is on this machine, and still the one that has published this."""
    return bool(status.began) and status.machine == stacks.machine() and stacks.started(status.pid) == status.began


def stack_by_signal(status: Status) -> str:
    """The stack of a process of this machine, written by its C code; empty if that can't be had."""
    if DUMP is None or not status.dump or not is_neighbour(status):
        return ""
    text = ""
    with suppress(OSError):
        os.kill(status.pid, DUMP)
        deadline = time.monotonic() + ANSWER / 3
        while not text.strip() and time.monotonic() < deadline:
            time.sleep(0.1)  # also after it has begun, so that it is complete
            with open(status.dump, encoding="utf-8", errors="replace") as file:
                text = file.read()
    return f"(innermost first; its interpreter is held by what it has called)\n{text}" if text.strip() else ""


# ---- words --------------------------------------------------------------------------------------------------------------


def describe_position(position: Any) -> str:
    """A position for people.

    Example::

        >>> from collections import namedtuple
        >>> describe_position(namedtuple("Position", "epoch batch")(1, 20))
        'epoch 1, batch 20'
    """
    if position is None:
        return ""
    names = getattr(position, "_fields", None)
    return f"position {position}" if names is None else ", ".join(f"{name} {value}" for name, value in zip(names, position))


def complaint(limit: float, waits: bool = False) -> str:
    """What is said of a rank that has made no progress for ``limit`` seconds, in one sentence."""
    does = "waits for other ranks, which wait too" if waits else "stands still"
    return f"{does}: it has made no progress for {limit:g} s"


def report(guilty: list[Watched], running: list[Watched], found: dict[int, str], limit: float) -> str:
    """What is printed when the run stands still: who holds it up, where, and what the others do.

    Args:
        guilty: the processes that hold it up.
        running: all from which something is expected.
        found: stacks, by rank.
        limit: seconds without progress.
    """
    lines = []
    for each in guilty[:SHOWN]:
        does = "waits for others" if each.waits else "stands still"
        stack = found.get(each.rank) or "  It gives no answer: its process is gone, or nothing there can run.\n"
        lines.append(f"{str(each).capitalize()} {does}. It has made no progress for {limit:g} s:\n{stack.rstrip()}")
    if len(guilty) > SHOWN:
        lines.append(f"So do {len(guilty) - SHOWN} more.")
    if all(each.waits for each in guilty):
        lines.append("All processes wait for each other: some are in another collective than the rest, or their connection is broken.")
    others = [each for each in running if each not in guilty]
    for each in others[:SHOWN]:
        does = "waits for others" if each.waits else "works" if each.still < limit else "stands still too"
        lines.append(f"{str(each).capitalize()} {does}{place_of(found.get(each.rank, ''))}.")
    if len(others) > SHOWN:
        lines.append(f"{len(others) - SHOWN} more are not listed.")
    lines.append("The run is ended. If a step may really take that long, set the strategy's `watchdog_timeout`; None turns this off.")
    return "\n".join(lines)


def place_of(stack: str) -> str:
    """The innermost function of a stack, and the line of the program that it was called from.

    Example::

        >>> place_of('  File "/home/me/train.py", line 3, in step\\n    f()\\n  File "/usr/site-packages/a.py", line 1, in wait\\n')
        ', in wait, called from step (/home/me/train.py, line 3)'
    """
    lines = [[part.strip() for part in line.split(",", 2)] for line in stack.splitlines() if line.startswith('  File "')]
    if not lines:
        return ""
    own = next((line for line in reversed(lines) if "site-packages" not in line[0] and stacks.OURS not in line[0]), lines[-1])
    called = "" if own is lines[-1] else f", called from {own[2].removeprefix('in ')}"
    return f", {lines[-1][2]}{called} ({own[0][6:-1]}, {own[1]})"
