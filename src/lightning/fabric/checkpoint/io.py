"""Checkpoint files on disk and on remote storage: a save is whole or did not happen, a load runs no code of the file."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import IO, Any, Union

import torch

from lightning.fabric.checkpoint import seal
from lightning.fabric.checkpoint.format import decode, encode
from lightning.fabric.checkpoint.pickles import refuse_endless
from lightning.fabric.checkpoint.seal import ZIP_MAGIC, DamagedCheckpoint, Generation, Sealing
from lightning.fabric.checkpoint.temporary import REPLACED, temporary_name
from lightning.fabric.utilities.cloud_io import get_filesystem, local_path, replacing

PathLike = Union[str, "os.PathLike[str]"]
MapLocation = Any  # a device, a name of one, a dict of names, or a function (storage, location) -> storage; None keeps locations

_counter = 0  # of the checkpoints that this process has written, or of the newest that it has read


def save(checkpoint: Any, path: PathLike, storage_options: dict[str, Any] | None = None, manifest: tuple[int, int] | None = None) -> None:
    """Write a checkpoint file. Until it is complete and on the disk, ``path`` keeps what it held before.

    The file ends with a seal (see :mod:`~lightning.fabric.checkpoint.seal`): a checksum of all of it, and, if the checkpoint is a dict
    with a ``global_step``, its generation.

    Args:
        checkpoint: a dict of anything that :func:`~lightning.fabric.checkpoint.format.encode` accepts.
        path: a local path or a URL that fsspec knows; missing folders are made.
        storage_options: for a URL, options of its file system.
        manifest: for the seal of a sharded checkpoint, see there.

    Raises:
        TypeError: if a value can't be stored (it names the path to it), or for storage options with a local path.
        OSError: if the file can't be written.

    Example::

        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "last.ckpt")
        >>> save({"epoch": 3}, path)
        >>> load(path)
        {'epoch': 3}
    """
    generation = _next_generation(checkpoint)

    def write(file: IO[bytes]) -> None:
        _write(content, file, os.fspath(path), generation, manifest)

    content = encode(checkpoint)
    local = local_path(path)
    if local is None:
        _save_remote(write, os.fspath(path), storage_options or {})
    elif storage_options:
        raise TypeError(
            f"storage_options={storage_options!r} was given for the local path {local!r}: they are for URLs (s3://..., gs://...). "
            "Leave them out, or write a CheckpointIO that knows what to do with them."
        )
    else:
        _save_local(write, local)


def _next_generation(checkpoint: Any) -> Generation | None:
    global _counter
    step = checkpoint.get("global_step") if isinstance(checkpoint, dict) else None
    if type(step) is not int:
        return None
    _counter += 1
    return Generation(step, _counter)


def note_generation(generation: Generation | None) -> None:
    """Let what this process saves from now on be newer than the checkpoint that it has read."""
    global _counter
    if generation is not None:
        _counter = max(_counter, generation.counter)


def _save_local(write: Callable[[IO[bytes]], None], target: str) -> None:
    if os.path.isdir(target) and not os.path.islink(target) and not os.path.exists(os.path.join(target, "meta.pt")):
        raise IsADirectoryError(errno.EISDIR, "A checkpoint file can't take the place of a directory that is no checkpoint", target)
    folder = os.path.dirname(os.path.abspath(target))
    make_folder(folder)
    temporary = os.path.join(folder, temporary_name())
    try:
        # 0o666 less the umask: what open() gives, and tempfile does not
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.close()  # what is left in its buffer can't be written either, which nobody needs to hear
                raise
        replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def make_folder(folder: str) -> None:
    """Make a folder with all those above it, and flush their names to the disk."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for each in reversed(missing):
        os.makedirs(each, exist_ok=True)
        sync_folder(os.path.dirname(each))


def replace(new: str, target: str) -> None:
    """Move a complete checkpoint, a file or a directory, to the place of an old one, which goes."""
    old = None
    if os.path.lexists(target) and (os.path.isdir(new) or (os.path.isdir(target) and not os.path.islink(target))):
        # A directory neither takes a place nor leaves it to a file by renaming.
        if exchange(new, target):
            old = new
        else:
            old = target + REPLACED
            TorchCheckpointIO().remove_checkpoint(old)
            os.replace(target, old)
    if old != new:
        os.replace(new, target)
    sync_folder(os.path.dirname(os.path.abspath(target)))
    if old is not None:
        TorchCheckpointIO().remove_checkpoint(old)


def exchange(one: str, other: str) -> bool:
    """Let two files or directories change places in one step; False, and nothing has happened, where the system can't."""
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    here, change_places = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return function is not None and function(here, os.fsencode(one), here, os.fsencode(other), change_places) == 0


def _save_remote(write: Callable[[IO[bytes]], None], url: str, storage_options: dict[str, Any]) -> None:
    filesystem = get_filesystem(url, **storage_options)
    target = str(filesystem._strip_protocol(url))
    folder = target.rpartition("/")[0]
    temporary = f"{folder}/{temporary_name()}"
    with contextlib.suppress(FileExistsError, NotImplementedError):  # object stores have no folders to make
        filesystem.makedirs(folder, exist_ok=True)
    try:
        # Leaving the block uploads what was written, after an error too: hence another key, moved when complete.
        with filesystem.open(temporary, "wb") as file:
            write(file)
        filesystem.mv(temporary, target)
    except BaseException:
        with contextlib.suppress(Exception):
            filesystem.rm_file(temporary)
        raise


def _write(content: Any, file: IO[bytes], target: str, generation: Generation | None, manifest: tuple[int, int] | None) -> None:
    sealing = Sealing(file)
    try:
        torch.save(content, sealing)  # type: ignore[arg-type]
        sealing.seal(generation, manifest)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error
    except RuntimeError as error:
        # torch hides what the file said ("No space left on device") behind an error about positions in the archive
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, target) from error
        raise


def sync_folder(folder: str) -> None:
    """Flush the names of the files in a folder to the disk, where the file system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't sync a folder
            raise
    finally:
        os.close(descriptor)


def load(
    path: PathLike | IO[bytes],
    map_location: MapLocation = None,
    weights_only: bool | None = None,
    mmap: bool = False,
    verify: bool = True,
) -> Any:
    """Read a checkpoint.

    Args:
        path: a local path, of a file or of the directory of a sharded checkpoint, an open binary file, an ``http(s)://`` URL
            (downloaded once, to the folder of ``torch.hub``), or a URL that fsspec knows.
        map_location: where tensors go, as for :func:`torch.load`; None restores them to the device they were saved from.
        weights_only: None and True read data and never run code that the file brings along. False unpickles anything: for
            files from a source you trust.
        mmap: leave the tensors of a local file where they are on the disk, to be read when they are used, and kept in memory once
            for all processes. The file must not be written to, nor, on a network, be removed, as long as they are in use.
        verify: read the whole file once before anything of it is used, and compare its checksum, also with ``mmap``: about 2 to 3 GB/s
            from memory, else as fast as the disk. Of the directory of a sharded checkpoint, the files that are used.

    Raises:
        FileNotFoundError: if there is no such file.
        pickle.UnpicklingError: if the file holds a class that is not read without ``weights_only=False``; it names the class.
        RuntimeError: if the file is damaged or is no checkpoint.
    """
    trusted = weights_only is False
    if not isinstance(path, (str, os.PathLike)):
        return _read(path, f"<{getattr(path, 'name', None) or type(path).__name__}>", map_location, trusted, verify)
    text = os.fspath(path)
    if text.startswith(("http://", "https://")):
        return _load_from_web(text, map_location, trusted, verify)
    local = local_path(text)
    if local is None:
        filesystem = get_filesystem(text)
        try:
            file = _fetch(filesystem.open(text, "rb"))
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "Checkpoint file not found", text) from None
    else:
        if os.path.isdir(local):
            from lightning.fabric.checkpoint import sharded

            if not sharded.is_sharded_checkpoint(local):
                raise IsADirectoryError(
                    errno.EISDIR, f"This directory is no checkpoint, or one that was not saved to its end: it has no {sharded.META}", local
                )
            return sharded.read_sharded(local, map_location, weights_only, verify)
        if os.path.exists(local) and not os.path.isfile(local):
            raise DamagedCheckpoint(f"{local!r} is no file, but a device or a pipe, which may have no end. Give the path of a checkpoint.")
        try:
            file = open(local, "rb")  # noqa: SIM115 (closed below, like the remote one)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "Checkpoint file not found", local) from None
    with file:
        return _read(file, repr(text), map_location, trusted, verify, mapped=local if mmap else None)


def _fetch(remote: IO[bytes]) -> IO[bytes]:
    """A local copy of a remote file, which is read twice, and the second time not in its order."""
    import shutil
    import tempfile

    with remote:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (closed by who reads it)
        try:
            shutil.copyfileobj(remote, copy, 1 << 22)
        except BaseException:
            copy.close()
            raise
    copy.seek(0)
    return copy


def _load_from_web(url: str, map_location: MapLocation, trusted: bool, verify: bool) -> Any:
    import hashlib
    from urllib.error import HTTPError
    from urllib.parse import urlsplit

    # The whole URL is in the name: two files called model.ckpt are two files.
    name = f"{hashlib.sha256(url.encode()).hexdigest()}-{os.path.basename(urlsplit(url).path)[-100:]}"
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not _is_as_downloaded(cached):
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, cached, progress=False)
        except HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(errno.ENOENT, "Checkpoint file not found", url) from None
            raise
        with replacing(cached + SUM) as sum_file:
            sum_file.write("{} {}".format(*seal.checksum_of(cached)))
    try:
        with open(cached, "rb") as file:
            return _read(file, repr(url), map_location, trusted, verify)
    except RuntimeError:
        os.unlink(cached)  # a broken download must not be there the next time
        raise


SUM = ".sum"  # ends the name of the file that holds size and checksum of a download


def _is_as_downloaded(path: str) -> bool:
    """Whether a file is there, and is still what was downloaded."""
    try:
        with open(path + SUM, encoding="utf-8") as file:
            size, crc32 = map(int, file.read(100).split())
        return seal.checksum_of(path) == (size, crc32)
    except (OSError, ValueError):
        return False


def _read(file: IO[bytes], name: str, map_location: MapLocation, trusted: bool, verify: bool, mapped: str | None = None) -> Any:
    start = file.tell()
    if verify:
        found = seal.verify(file, name, start)
        note_generation(found.generation if found is not None else None)
    if not trusted:
        seal.refuse_bombs(file, name, start)
    if mapped is not None:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            mapped = None  # the format of old releases can't be mapped
        file.seek(start)
    try:
        with _harmless_classes():
            content = torch.load(mapped or file, map_location=map_location, weights_only=not trusted, mmap=mapped is not None)
    except Exception as error:
        problem = _explain(error, file, start, name, trusted)
        if problem is None:
            raise
        raise problem from error
    try:
        if not trusted:
            refuse_endless(content)
        return decode(content, trusted, map_location)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedCheckpoint(f"The checkpoint {name} can't be read: {reason}") from error


def _explain(error: Exception, file: IO[bytes], start: int, name: str, trusted: bool) -> Exception | None:
    """A clearer error, or None if this one says what is wrong."""
    message = str(error)
    size = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    is_archive = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    # a file cut off near its end sends the reader to a place before its start (EINVAL)
    cut_off = isinstance(error, EOFError) or (isinstance(error, OSError) and error.errno == errno.EINVAL)
    if cut_off or size == 0 or "PytorchStreamReader" in message or "Invalid magic number" in message:
        return DamagedCheckpoint(f"The checkpoint {name} is incomplete or damaged ({size} bytes). Was it copied completely? ({message})")
    if isinstance(error, MemoryError):
        return MemoryError(f"The checkpoint {name} ({size} bytes) needs more memory than there is.")
    if trusted or isinstance(error, OSError) or (isinstance(error, RuntimeError) and type(error) is not RuntimeError):
        return None
    if isinstance(error, RuntimeError):
        return _explain_runtime_error(message, name)
    if isinstance(error, pickle.UnpicklingError) and (is_archive or "GLOBAL" in message):
        found = re.search(r"GLOBAL (\S+)|unrecognized function (.+?)(?: which|$|\n)|but got (.+)", message)
        what = next((group for group in found.groups() if group), "") if found else ""
        return pickle.UnpicklingError(
            f"The checkpoint {name} holds {what.rstrip('.') or 'something'} that can't be read safely: unpickling it could run any code. "
            "If you trust the source of the file, pass weights_only=False. A class that you know to be harmless "
            "can be allowed with torch.serialization.add_safe_globals([...]) instead."
        )
    if not is_archive or isinstance(error, (LookupError, UnicodeDecodeError)):
        return DamagedCheckpoint(
            f"The file {name} is not a checkpoint, or damaged ({size} bytes; {type(error).__name__}: {_first_sentence(message)})."
        )
    return DamagedCheckpoint(
        f"The checkpoint {name} can't be read ({type(error).__name__}: {_first_sentence(message)}). It was damaged, or made to do harm: "
        "copy it anew from where it came from, or use the checkpoint before it."
    )


def _explain_runtime_error(message: str, name: str) -> Exception:
    if "weights_only" in message:  # of a format that can't be read without running what it says
        return pickle.UnpicklingError(
            f"The checkpoint {name} can't be read safely: {_first_sentence(message)}. If you trust the source of the file, "
            "pass weights_only=False."
        )
    return RuntimeError(f"The checkpoint {name} can't be read: {message}")


def _first_sentence(message: str) -> str:
    return message.partition("\n")[0].partition(". ")[0].removesuffix(".")[:200]


# --- classes in files that other programs wrote ---------------------------------------------------------------------

_lock = threading.Lock()
_readers = 0
_added: list[Any] = []


@contextlib.contextmanager
def _harmless_classes() -> Generator[None, None, None]:
    """Let torch's safe reader make paths, namespaces and dates while a file is read.

    Lightning pickles them into checkpoints as they are; making one does nothing but hold the values it is given.
    """
    global _readers, _added
    with _lock:
        if _readers == 0:
            known = torch.serialization.get_safe_globals()
            _added = [entry for entry in _harmless() if entry not in known]  # leaving must not undo what the user has allowed
            torch.serialization.add_safe_globals(_added)
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                torch.serialization.safe_globals(_added).__exit__(None, None, None)


def _harmless() -> list[Any]:
    import argparse
    import datetime
    import pathlib

    entries: list[Any] = [(argparse.Namespace, "argparse.Namespace")]
    entries += [(getattr(datetime, name), f"datetime.{name}") for name in ("datetime", "date", "time", "timedelta", "timezone")]
    for module in ("pathlib", "pathlib._local"):  # the second is where Python 3.13 keeps them
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            foreign = name == ("WindowsPath" if os.name == "posix" else "PosixPath")
            entries.append((getattr(pathlib, f"Pure{name}" if foreign else name), f"{module}.{name}"))
    return entries


# --- the plugin interface -------------------------------------------------------------------------------------------


def keep_on_cpu(storage: Any, location: str) -> Any:
    """A ``map_location`` that leaves every tensor where the file's bytes are read to: on the CPU."""
    return storage


class CheckpointIO(ABC):
    """How checkpoints are written, read and removed. Subclass it to keep them elsewhere, or in another form.

    Example::

        class Uploading(TorchCheckpointIO):
            def save_checkpoint(self, checkpoint, path, storage_options=None):
                super().save_checkpoint(checkpoint, path, storage_options)
                upload(path)

        trainer = Trainer(plugins=[Uploading()])
    """

    troubled = False  # whether poll() has something to say: the Trainer looks at it after each batch
    retries = False  # whether a save that fails is tried again later, instead of raising its error

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what to store.
            path: where to.
            storage_options: what :meth:`Trainer.save_checkpoint` was given under that name.
        """

    @abstractmethod
    def load_checkpoint(self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: where it is.
            map_location: where tensors go, as for :func:`torch.load`.
            weights_only: False unpickles anything in the file; for files from a source you trust.
        """

    @abstractmethod
    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete a checkpoint; nothing happens if it is not there."""

    def after_saves(self, path: PathLike, action: Callable[[], Any]) -> None:
        """Do something once what was saved is on the disk: at once, unless saves happen in the background.

        Args:
            path: what it is about.
            action: takes nothing.
        """
        action()

    def is_pending(self, path: PathLike | None = None) -> bool:
        """Whether a save to this path, or to any, is under way in the background."""
        return False

    def poll(self) -> None:
        """Raise the error of a save in the background that has failed, once. Called between two batches, once ``troubled`` is True."""

    def settle(self) -> None:
        """Wait for what is being written in the background."""

    def wait(self) -> None:
        """Wait until what has been saved is on the disk, and raise the error if it is not. Called at the end of ``fit``."""

    def teardown(self) -> None:
        """Finish what is under way. Called when the run ends."""


class TorchCheckpointIO(CheckpointIO):
    """Checkpoints in torch's own file format, written with :func:`save` and read with :func:`load`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write a checkpoint file, whole or not at all.

        Args:
            checkpoint: what to store.
            path: a local path or a URL that fsspec knows.
            storage_options: for a URL, options of its file system.

        Raises:
            TypeError: if a value can't be stored, or for storage options with a local path.
            OSError: if the file can't be written.
        """
        save(checkpoint, path, storage_options)

    def load_checkpoint(self, path: PathLike, map_location: Any | None = keep_on_cpu, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint file.

        Args:
            path: a local path, or a URL.
            map_location: where tensors go, as for :func:`torch.load`; to the CPU if not given.
            weights_only: None and True never run code that the file brings along; False unpickles anything.

        Raises:
            FileNotFoundError: if there is no such file.
            pickle.UnpicklingError: if the file needs ``weights_only=False``.
            RuntimeError: if the file is damaged.
        """
        return load(path, map_location, weights_only)  # type: ignore[no-any-return]

    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete a checkpoint file, or a folder that holds a sharded one; nothing happens if it is not there."""
        local = local_path(path)
        if local is None:
            filesystem = get_filesystem(path)
            if filesystem.exists(path):
                filesystem.rm(os.fspath(path), recursive=True)
        elif os.path.isdir(local) and not os.path.islink(local):
            import shutil

            shutil.rmtree(local)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(local)
