"""Where a thread of this process stands, seen from another one, and what that says of it."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from types import FrameType

import torch

PACKAGES = os.path.dirname(os.path.dirname(torch.__file__)) + os.sep
OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

# Where a process stands that waits for others: what torch runs, and what of ours stands between that and the program.
WAITING = tuple(
    PACKAGES + path for path in ("torch/distributed/", "torch/nn/parallel/distributed.py", "torch/autograd/graph.py", "deepspeed/comm/")
)
AROUND = (PACKAGES + "torch/", PACKAGES + "deepspeed/comm/", OURS + "fabric/collectives.py", OURS + "fabric/uneven.py")
# Where files are read and written, which may take long and shows no other sign of progress.
STORING = (
    PACKAGES + "torch/serialization.py",
    PACKAGES + "torch/distributed/checkpoint/",
    PACKAGES + "safetensors/",
    OURS + "fabric/checkpoint/",
)
DEBUGGERS = ("bdb.py", "pdb.py", "pydevd.py")

ENOUGH_BYTES = 1 << 16  # read or written since the last look
ENOUGH_WORK = 0.5  # of one core


def frame_of(thread: int) -> FrameType | None:
    """The innermost frame of a thread, by its identifier."""
    return sys._current_frames().get(thread)


def outwards(frame: FrameType | None) -> list[FrameType]:
    """A frame and those that have called it."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def described(frame: FrameType | None) -> str:
    """The stack as Python prints it in a traceback."""
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def fingerprint(frames: list[FrameType]) -> int:
    """A number that changes when the thread does."""
    return hash(tuple((id(frame.f_code), frame.f_lasti) for frame in frames))


def waits(frames: list[FrameType]) -> bool:
    """Whether it waits for other processes: in a collective, or in a backward pass, which averages gradients."""
    for frame in frames:
        name = frame.f_code.co_filename
        if name.startswith(STORING):
            return False
        if name.startswith(WAITING):
            return True
        if not name.startswith(AROUND):
            return False
    return False


def stores(frames: list[FrameType]) -> bool:
    """Whether it reads or writes a checkpoint."""
    return any(frame.f_code.co_filename.startswith(STORING) for frame in frames)


def is_debugged(frames: list[FrameType]) -> bool:
    """Whether somebody looks at this process with a debugger."""
    if any(os.path.basename(frame.f_code.co_filename) in DEBUGGERS for frame in frames) or "pydevd" in sys.modules:
        return True
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None:
        return True
    with suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file)
    return False


@dataclass
class Pulse:
    """Looks for signs of life of a thread, from look to look.

    Args:
        thread: its identifier.
    """

    thread: int
    seen: int = 0  # the fingerprint
    bytes: int = 0
    work: float = 0.0  # seconds of all threads
    own: float = 0.0  # seconds of this thread
    time: float = field(default_factory=time.monotonic)
    moves: bool = True  # the stack has changed since the last look
    stores: bool = False
    waits: bool = False
    spins: bool = False  # it computes in one place: perhaps it waits for its device
    debugged: bool = False

    def look(self) -> bool:
        """Look again; returns whether there is any sign of life: another stack, bytes read or written, or a core at work."""
        frames = outwards(frame_of(self.thread))
        now, seen, done = time.monotonic(), fingerprint(frames), bytes_done()
        work, own = time.process_time(), time_of_thread(self.thread)
        elapsed = max(now - self.time, 1e-3)
        self.moves, self.stores, self.waits, self.debugged = seen != self.seen, stores(frames), waits(frames), is_debugged(frames)
        self.spins = not self.moves and own - self.own > ENOUGH_WORK * elapsed
        busy = not self.waits and work - self.work > ENOUGH_WORK * elapsed
        alive = self.moves or done - self.bytes > ENOUGH_BYTES or busy
        self.seen, self.bytes, self.work, self.own, self.time = seen, done, work, own, now
        return alive


def bytes_done() -> int:
    """How much this process has read and written so far; 0 where the system doesn't tell."""
    with suppress(OSError, ValueError), open("/proc/self/io", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("rchar:", "wchar:")))
    return 0


def time_of_thread(thread: int) -> float:
    """Seconds that a thread has computed; 0 where the system doesn't tell."""
    clock = getattr(time, "pthread_getcpuclockid", None)
    if clock is None:
        return 0.0
    with suppress(OSError):
        return time.clock_gettime(clock(thread))
    return 0.0


# ---- processes of the same machine -------------------------------------------------------------------------------------


@cache
def machine() -> str:
    """What only processes that can see each other have in common; empty where the system doesn't tell."""
    with suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def started(pid: int) -> str:
    """When a process began, in the system's units: its number may belong to another one by now. Empty if it is gone."""
    with suppress(OSError, IndexError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[19]
    return ""
