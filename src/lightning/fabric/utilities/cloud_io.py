"""Files on the local disk and on remote storage, through one interface (fsspec)."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LOCAL_PROTOCOLS = ("file", "local")


def get_filesystem(path: str | os.PathLike[str], **kwargs: Any) -> AbstractFileSystem:
    """The file system that ``path`` lies on.

    Args:
        path: a local path, or a URL such as ``s3://bucket/folder``.
        kwargs: storage options of that file system (credentials, endpoints, ...).

    Raises:
        ImportError: if the package that serves the URL's protocol is not installed; it names the package.

    Example::

        >>> get_filesystem("memory://runs").protocol
        'memory'
    """
    from fsspec.core import url_to_fs

    filesystem, _ = url_to_fs(os.fspath(path), **kwargs)
    return filesystem


def local_path(path: str | os.PathLike[str]) -> str | None:
    """Where ``path`` lies on the local disk (``file://`` taken off, ``~`` expanded), or None if it is remote.

    Example::

        >>> local_path("runs/1"), local_path("file:///runs/1"), local_path("s3://bucket/1")
        ('runs/1', '/runs/1', None)
    """
    text = os.fspath(path)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return os.path.expanduser(text)
    return rest if protocol in LOCAL_PROTOCOLS else None


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` lies on the local disk.

    Example::

        >>> is_local("runs/1"), is_local("memory://runs/1")
        (True, False)
    """
    return local_path(path) is not None


def join_path(path: str | os.PathLike[str], *parts: str) -> str:
    """``os.path.join`` that keeps ``/`` as the separator of URLs on every system.

    Example::

        >>> join_path("s3://bucket/runs/", "version_0", "metrics.csv")
        's3://bucket/runs/version_0/metrics.csv'
    """
    text = os.fspath(path)
    if "://" not in text:
        return os.path.join(text, *parts)
    return "/".join([text.rstrip("/") if not text.endswith("://") else text[:-1], *parts])


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[TextIO, None, None]:
    """Open a text file whose content takes the place of ``path`` once the block has ended without an error.

    Until then, and after an error, ``path`` keeps what it holds: the new content goes to a temporary file beside it.

    Args:
        path: a local path or a URL; its folder must exist.

    Example::

        >>> import pathlib, tempfile
        >>> path = join_path(tempfile.mkdtemp(), "notes.txt")
        >>> with replacing(path) as file:
        ...     _ = file.write("all or nothing")
        >>> pathlib.Path(path).read_text()
        'all or nothing'
    """
    local = local_path(path)
    target = os.fspath(path) if local is None else local
    temporary = f"{target}.{os.getpid()}.tmp"
    filesystem = get_filesystem(path) if local is None else None
    try:
        if filesystem is None:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        else:
            with filesystem.open(temporary, "w", encoding="utf-8", newline="") as file:
                yield file
            filesystem.mv(temporary, target)
    except BaseException:
        with suppress(Exception):
            os.unlink(temporary) if filesystem is None else filesystem.rm_file(temporary)
        raise
