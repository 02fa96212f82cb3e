"""Whether checkpoints can be written to a folder, found out before there is anything to lose."""

from __future__ import annotations

import errno
import os

from lightning.fabric.checkpoint.io import PathLike
from lightning.fabric.checkpoint.temporary import temporary_name
from lightning.fabric.utilities.cloud_io import local_path

PROBE = 4096  # bytes that are written to see whether anything can be


def check_writable(folder: PathLike) -> None:
    """Find out that checkpoints can't be written to a folder before hours have gone by.

    A small file is written there, and removed: what rights and flags say does not hold for root, for /proc, or on network disks. If the
    folder is not there yet, the same is done in a new one beside it, which goes too.

    Args:
        folder: on a local disk, or a URL, which is not looked at. It need not be there.

    Raises:
        OSError: if this process can't write there: no right, a read-only file system, no space or inodes left, no such folder possible.
    """
    local = local_path(folder)
    if local is None:
        return
    wanted = there = os.path.abspath(local)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    hint = "give another folder for checkpoints (`ModelCheckpoint(dirpath=...)`, `default_root_dir`)"
    if not os.path.isdir(there):
        raise NotADirectoryError(errno.ENOTDIR, f"Checkpoints can't be written to {local!r}, since this is no folder; {hint}", there)
    probe = os.path.join(there, temporary_name())
    try:
        if there != wanted:
            os.mkdir(probe)
            try:
                _write_probe(os.path.join(probe, temporary_name()))
            finally:
                os.rmdir(probe)
        else:
            _write_probe(probe)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = f"no space, or no inodes, left; free some, or {hint}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"no right to write, or a read-only disk ({error.strerror}); {hint}"
        else:
            reason = f"{error.strerror}; {hint}"
        raise OSError(error.errno, f"Checkpoints can't be written to {local!r}: {reason}", there) from None


def _write_probe(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            left = PROBE
            while left:
                left -= os.write(descriptor, bytes(left))
            os.fsync(descriptor)  # some file systems look for space no earlier
        finally:
            os.close(descriptor)
    finally:
        os.unlink(path)
