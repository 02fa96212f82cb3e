"""Files that are not complete yet: their names tell who writes them, so that what a dead process left can be removed."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
import socket
import time

SUFFIX = ".partial"
REPLACED = ".replaced"  # a directory that has to step aside, on file systems where two can't change places
PATIENCE = 24 * 3600.0  # seconds without a change after which the file of an unknown process counts as left behind
NAME = re.compile(r"\.[0-9a-f]{16}(?:~(?P<host>[^~]*)~(?P<boot>[^~]*)~(?P<space>[^~]*)~(?P<pid>\d+)~(?P<start>\d+))?\.partial(?:\.old)?")


def temporary_name() -> str:
    """A free name, hidden, that says which process of which machine writes there.

    Processes that write to one directory together need the same: take that of rank 0.

    Example::

        >>> temporary_name().endswith(".partial")
        True
    """
    pid = os.getpid()
    return f".{secrets.token_hex(8)}~{'~'.join(_machine())}~{pid}~{_started(pid)}{SUFFIX}"


def sweep(folder: str | os.PathLike[str]) -> list[str]:
    """Remove what processes that are gone have left half-written in a folder.

    A file goes if its process ran on this machine and does so no longer, or if nobody knows its process, and it has not changed for a day.
    A directory that had stepped aside for another one, which did not come, is put back.

    Args:
        folder: on a local disk; it need not be there.

    Returns:
        The paths that were removed.
    """
    removed = []
    try:
        entries = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in entries:
        path = os.path.join(os.fspath(folder), name)
        if name.endswith(REPLACED) and os.path.isfile(os.path.join(path, "meta.pt")):
            target = path.removesuffix(REPLACED)
            if not os.path.lexists(target):
                with contextlib.suppress(OSError):  # another process was faster
                    os.rename(path, target)
                continue
        elif not (found := NAME.fullmatch(name)) or _in_use(path, found):
            continue
        with contextlib.suppress(OSError):  # what can't be removed harms nobody
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
            removed.append(path)
    return removed


def _in_use(path: str, found: re.Match[str]) -> bool:
    host, boot, space = _machine()
    if found["pid"] is not None and found["host"] == host and boot:
        if found["boot"] != boot:
            return False  # the machine has been started anew since
        if found["space"] == space:
            return _started(int(found["pid"])) == int(found["start"]) if os.path.isdir("/proc/self") else _lives(int(found["pid"]))
    return time.time() - _changed(path) < PATIENCE


def _changed(path: str) -> float:
    """When a file, or anything in a directory, was last written to."""
    latest = 0.0
    for top, _, names in os.walk(path):
        for each in (top, *(os.path.join(top, name) for name in names)):
            with contextlib.suppress(OSError):
                latest = max(latest, os.lstat(each).st_mtime)
    with contextlib.suppress(OSError):
        latest = max(latest, os.lstat(path).st_mtime)
    return latest


@functools.cache
def _machine() -> tuple[str, str, str]:
    """The name of this machine, which of its starts this is, and the space in which its processes are numbered."""
    boot = space = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()[:8]
    with contextlib.suppress(OSError):
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64], boot, space


def _started(pid: int) -> int:
    """When a process began, in ticks since the machine did: numbers of processes are used again. 0 if it is not there."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
