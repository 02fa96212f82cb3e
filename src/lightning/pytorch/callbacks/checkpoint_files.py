"""Where checkpoint files lie: paths compared, looked for and linked, on the local disk and on remote storage."""

from __future__ import annotations

import errno
import logging
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning.fabric.checkpoint.io import replace
from lightning.fabric.checkpoint.temporary import sweep, temporary_name
from lightning.fabric.utilities.cloud_io import get_filesystem, join_path, local_path

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

Path = str | os.PathLike[str]

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # what file systems without links answer


def folder_of_run(trainer: pl.Trainer) -> str:
    """Where checkpoints go if nobody says so: beside the log of the first logger, else in the trainer's folder."""
    if not trainer.loggers or trainer.fast_dev_run:
        return join_path(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    folder = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return join_path(folder, *filter(None, (str(logger.name), version, "checkpoints")))


def canonical(path: Path) -> str:
    """One text for one place: a local path made absolute, with links followed and ``~`` expanded; a URL as it is.

    Example::

        >>> canonical("s3://bucket/run")
        's3://bucket/run'
    """
    local = local_path(path)
    return os.fspath(path) if local is None else os.path.realpath(local)


def within(path: Path, folder: Path) -> bool:
    """Whether ``path`` lies in ``folder``, at any depth.

    Example::

        >>> within("runs/a/x.ckpt", "runs"), within("runs2/x.ckpt", "runs")
        (True, False)
    """
    local, local_folder = local_path(path), local_path(folder)
    if local is None or local_folder is None:
        return os.fspath(path).startswith(os.fspath(folder).rstrip("/") + "/")
    return os.path.abspath(local).startswith(os.path.abspath(local_folder).rstrip(os.sep) + os.sep)


def exists(path: Path) -> bool:
    """Whether a file or folder lies at ``path``; a link that leads nowhere does not count."""
    local = local_path(path)
    return bool(get_filesystem(path).exists(os.fspath(path))) if local is None else os.path.exists(local)


def lies_at(path: Path) -> bool:
    """Whether anything lies at ``path``, be it a link that leads nowhere: what it led to has been lost."""
    local = local_path(path)
    return exists(path) if local is None else os.path.lexists(local)


def holds_files(folder: Path) -> bool:
    """Whether ``folder`` is there and not empty."""
    local = local_path(folder)
    if local is not None:
        return os.path.isdir(local) and bool(os.listdir(local))
    filesystem, text = get_filesystem(folder), os.fspath(folder)
    return bool(filesystem.isdir(text) and filesystem.ls(text))


def find(folder: Path, wanted: re.Pattern[str]) -> set[str]:
    """The files, folders and links below ``folder`` whose path from there matches ``wanted`` in full."""
    local = local_path(folder)
    if local is None:
        from fsspec.core import url_to_fs

        filesystem, root = url_to_fs(os.fspath(folder))
        below = [path[len(root) :].lstrip("/") for path in filesystem.find(root, withdirs=True)]
    else:
        paths = [os.path.join(top, name) for top, folders, names in os.walk(local) for name in (*folders, *names)]
        below = [os.path.relpath(path, local).replace(os.sep, "/") for path in paths]
    return {join_path(folder, name) for name in below if wanted.fullmatch(name)}


def link(target: Path, path: Path) -> bool:
    """Put a relative symbolic link to ``target`` at ``path``, in place of what is there.

    Returns:
        Whether that was possible: False on remote storage, and on file systems without links.
    """
    local, local_target = local_path(path), local_path(target)
    if local is None or local_target is None:
        return False
    try:
        make_link(local_target, local)
    except OSError as error:
        log.debug("No link at %s: %s", path, error)
        return False
    return True


def link_to_saved(target: str, path: str) -> bool:
    """The same for local paths, if ``target`` has been saved by now; a copy where links are not possible.

    Returns:
        Whether it has been saved.

    Raises:
        OSError: if neither was possible.
    """
    if not os.path.exists(target):
        return False
    try:
        make_link(target, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        copy_saved(target, path)
    return True


def copy_saved(target: str, path: str) -> None:
    """Put a copy of a local checkpoint, a file or a directory, at ``path``, in place of what is there."""
    import shutil

    temporary = os.path.join(os.path.dirname(os.path.abspath(path)), temporary_name())
    try:
        (shutil.copytree if os.path.isdir(target) else shutil.copyfile)(target, temporary)
        for top, _, names in os.walk(temporary) if os.path.isdir(temporary) else [("", [], [temporary])]:
            for name in names:
                with open(os.path.join(top, name), "r+b") as file:
                    os.fsync(file.fileno())
        replace(temporary, path)
    except OSError:
        with suppress(OSError):
            shutil.rmtree(temporary) if os.path.isdir(temporary) else os.unlink(temporary)
        raise


def make_link(target: str, path: str) -> None:
    """The same for local paths.

    Raises:
        OSError: if it was not possible.
    """
    path = os.path.abspath(path)
    temporary = os.path.join(os.path.dirname(path), temporary_name())
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(os.path.relpath(target, os.path.dirname(path)), temporary)
        replace(temporary, path)  # on the disk before what the link has pointed to so far is removed
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def prepare_folder(trainer: pl.Trainer, folder: Path) -> None:
    """Find out before the first step whether checkpoints can be written to a folder, and remove what dead processes left there.

    Rank 0 looks, or each process where all of them write.

    Raises:
        OSError: in all processes, if any of them can't write there.
    """
    from lightning.fabric.checkpoint.writable import check_writable

    strategy = trainer.strategy
    local = local_path(folder)
    if local is None:
        return
    problem: tuple[Any, ...] | None = None
    if trainer.is_global_zero or getattr(strategy, "saves_directories", False):
        try:
            check_writable(local)
        except OSError as error:
            problem = (type(error), error.errno, error.strerror, error.filename)
    found = strategy.gather_objects(problem) if strategy.reduce_boolean_decision(problem is not None, all=False) else []
    for rank, told in enumerate(found):
        if told is not None:
            kind, number, text, name = told
            raise kind(number, text if strategy.world_size == 1 else f"{text} (on rank {rank})", name)
    if trainer.is_global_zero:
        sweep(local)
