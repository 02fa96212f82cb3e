"""Folders to which no checkpoint could be written are told at once."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning.fabric.checkpoint.writable import check_writable


def test_nothing_stays_where_checkpoints_can_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "not" / "yet" / "there")
    check_writable("memory://anywhere")
    assert os.listdir(tmp_path) == []


def test_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"no folder.*dirpath"):
        check_writable(tmp_path / "file" / "below")


@pytest.mark.skipif(sys.platform != "linux", reason="needs the file systems of Linux")
@pytest.mark.parametrize("folder", ["/proc/nope", "/proc", "/sys/nope"])
def test_file_systems_that_hold_no_files_are_told_to_root_as_well(folder: str) -> None:
    with pytest.raises(OSError, match=rf"Checkpoints can't be written to '{folder}': .*dirpath"):
        check_writable(folder)


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def number_of(folder: str) -> int | None:
    try:
        check_writable(folder)
    except OSError as error:
        return error.errno
    return None


def test_folder_without_the_right_to_write_is_told() -> None:
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o555)

    def work() -> None:
        if os.getuid() == 0:
            os.setuid(65534)  # root may write anywhere
        assert number_of(folder) == number_of(os.path.join(folder, "checkpoints")) == errno.EACCES

    assert in_child(work) == 0
    os.rmdir(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mounts in a namespace of their own")
@pytest.mark.parametrize(
    ("options", "number"),
    [("size=4k", errno.ENOSPC), ("nr_inodes=1", errno.ENOSPC), ("ro", errno.EROFS), ("size=1m", None)],
    ids=["full", "no inodes", "read-only", "room"],
)
def test_file_system_that_takes_no_more_is_told_to_root_as_well(tmp_path: Path, options: str, number: int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    read_only = 1 if options == "ro" else 0

    def work() -> None:
        if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS: what is mounted here is gone with this process
            os._exit(77)
        libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None)  # MS_PRIVATE | MS_REC
        data = b"" if options == "ro" else options.encode()
        if libc.mount(b"tmpfs", os.fsencode(tmp_path), b"tmpfs", read_only, data) != 0:
            os._exit(77)
        if options == "size=4k":
            (tmp_path / "file").write_bytes(bytes(4096))
        assert number_of(str(tmp_path)) == number_of(str(tmp_path / "a" / "b")) == number

    code = in_child(work)
    if code == 77:
        pytest.skip("this user may not mount file systems")
    assert code == 0
