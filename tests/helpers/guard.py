"""Runs something in a child process that may not do anything but read: what else it tries is written down."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MEMORY = 1 << 30  # what a child may take beside what it has, in bytes
SECONDS = 20

STARTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill"),
    *("subprocess.Popen", "pty.spawn", "socket.connect"),
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.chown", "os.truncate", "shutil.rmtree")
LOADS = ("ctypes.dlopen", "pickle.find_class", "code.__new__")


class Outcome(NamedTuple):
    """How a child ended."""

    status: int  # of its exit: 0 if it came to an end, negative if a signal did it
    error: str  # the name of the exception's class, or nothing
    bases: list[str]  # of that class
    message: str
    forbidden: list[str]  # what it did beside reading
    seconds: float
    memory: int  # its peak, more than it began with, in bytes


def outcome_of(action: Callable[[], Any], own: str, allowed: tuple[str, ...] = ()) -> Outcome:
    """Run ``action`` in a child.

    Args:
        action: takes nothing.
        own: the folder in which it may write.
        allowed: names of events that it may cause, such as ``"socket.connect"``.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _run(action, own, allowed, writing)
        finally:
            os._exit(99)
    os.close(writing)
    start = time.monotonic()
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not answer:
        return Outcome(status, "", [], "", [], time.monotonic() - start, 0)
    return Outcome(status, *json.loads(answer))


def _run(action: Callable[[], Any], own: str, allowed: tuple[str, ...], writing: int) -> None:
    forbidden: list[str] = []
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # also ends a hash, which no handler of Python's interrupts
    signal.alarm(SECONDS)
    modules = set(sys.modules)
    before = _resident()
    start = time.monotonic()
    active = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not active or event in allowed:
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if event in STARTS or event in LOADS or ((writes or event in CHANGES) and not _within(arguments[0], own)):
            forbidden.append(f"{event} {arguments!r}"[:300])
        elif event == "exec" and getattr(arguments[0], "co_filename", "").startswith("<"):
            forbidden.append(f"exec {arguments!r}"[:300])
        elif event == "import" and arguments[0].partition(".")[0] not in OWN and arguments[0] not in modules:
            forbidden.append(f"import {arguments[0]}")

    sys.addaudithook(watch)
    error, bases, message = "", [], ""
    try:
        action()
    except BaseException as caught:
        error, message = type(caught).__name__, str(caught)
        bases = [base.__name__ for base in type(caught).__mro__]
    active = False
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    answer = [error, bases, message[:3000], forbidden, time.monotonic() - start, _resident() - before]
    os.write(writing, json.dumps(answer).encode())
    os._exit(0)


# What of torch, the library and Python is imported when it is needed does no harm by being imported.
OWN = {"torch", "lightning", "encodings", "zoneinfo", "importlib", "traceback", "linecache"}


def _within(path: Any, own: str) -> bool:
    if isinstance(path, int):
        return True
    return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith((os.path.realpath(own) + os.sep, "/dev/null/"))


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
