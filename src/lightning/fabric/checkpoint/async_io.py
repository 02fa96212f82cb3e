"""Checkpoints written in the background, while training goes on."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.checkpoint.io import CheckpointIO, PathLike, TorchCheckpointIO
from lightning.fabric.checkpoint.staging import Staging

log = logging.getLogger(__name__)


class AsyncCheckpointIO(CheckpointIO):
    """Copies a checkpoint to the memory of the host, and lets another CheckpointIO write the copy in the background.

    Training waits for the copy only. One save is under way at a time: the next one waits for it. What it takes beside: host memory
    for a second copy of the checkpoint (pinned, for what lies on a GPU), kept from save to save.

    A removal that is asked for while a save is under way happens once that save is on the disk; after a save that has failed, no
    checkpoint is removed until one succeeds. So, after the first, there is always a whole checkpoint on the disk.

    Args:
        checkpoint_io: who writes, reads and removes. None stands for :class:`TorchCheckpointIO`.

    Example::

        trainer = Trainer(plugins=[AsyncCheckpointIO()])

    Note:
        A save that fails raises its error at the next call of :meth:`poll`, :meth:`save_checkpoint` or :meth:`teardown`, once; saves
        after that are as any other.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        if checkpoint_io is not None and not isinstance(checkpoint_io, CheckpointIO):
            raise TypeError(
                f"`AsyncCheckpointIO(checkpoint_io={checkpoint_io!r})`: a {type(checkpoint_io).__name__} can't write checkpoints. Give an "
                "instance of a CheckpointIO, or leave it out."
            )
        self._checkpoint_io = checkpoint_io
        self._reset()

    def _reset(self) -> None:
        self._staging = Staging()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._path: str | None = None  # of the save that is under way
        self._after: list[tuple[str, Callable[[], None]]] = []  # what waits for a save that succeeds: what it is about, and what to do
        self._failed = False  # whether the latest save has
        self._error: tuple[str, BaseException] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._wait()
        return {"checkpoint_io": self._checkpoint_io}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["checkpoint_io"])  # type: ignore[misc]

    @property
    def checkpoint_io(self) -> CheckpointIO | None:
        """What was given; None until something is saved or read if nothing was."""
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO | None) -> None:
        self._checkpoint_io = checkpoint_io

    @property
    def writer(self) -> CheckpointIO:
        """Who writes, reads and removes."""
        if self._checkpoint_io is None:
            self._checkpoint_io = TorchCheckpointIO()
        return self._checkpoint_io

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Copy a checkpoint and begin to write it.

        Args:
            args: as for :meth:`CheckpointIO.save_checkpoint`.
            kwargs: the same.

        Raises:
            OSError: or any other error by which the save before this one has failed; then this one does not begin.
        """
        self._begin(*args, **kwargs)

    def _begin(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        self._wait()
        self.poll()
        copied = self._staging.stage(checkpoint)
        with self._lock:
            self._path = os.fspath(path)
            self._after = [(about, action) for about, action in self._after if about != self._path]  # it is not to go any more
        # Not a daemon: an interpreter that ends waits for it.
        self._thread = threading.Thread(target=self._write, args=(copied, path, storage_options), name="checkpoint")
        self._thread.start()

    def _write(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any) -> None:
        try:
            self._staging.wait()
            self.writer.save_checkpoint(checkpoint, path, storage_options)
        except BaseException as error:
            with self._lock:
                self._failed, self._error, self._path = True, (f"The checkpoint {os.fspath(path)!r} was not saved", error), None
            return
        while True:
            with self._lock:
                if not self._after:
                    self._failed, self._path = False, None
                    return
                about, action = self._after.pop(0)
            try:
                action()
            except BaseException as error:
                # What comes after it may rely on it: the removal of a file to which a link was to point no more.
                with self._lock:
                    message = f"After a checkpoint was saved, {about!r} could not be removed or changed"
                    self._failed, self._error, self._path = True, (message, error), None
                return

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, once what is being written is complete.

        Args:
            args: as for :meth:`CheckpointIO.load_checkpoint`.
            kwargs: the same.
        """
        self._wait()
        return self.writer.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Delete a checkpoint, once those that were saved before this call are on the disk.

        Args:
            args: as for :meth:`CheckpointIO.remove_checkpoint`.
            kwargs: the same.
        """
        path = args[0] if args else kwargs["path"]
        self.after_saves(os.fspath(path), lambda: self.writer.remove_checkpoint(*args, **kwargs))

    def after_saves(self, path: PathLike, action: Callable[[], None]) -> None:
        """Do something once the saves that have begun are on the disk; not before another succeeds, if the latest has failed.

        Args:
            path: what it is about; a new save to this path makes the action void.
            action: takes nothing; it may be called by another thread.
        """
        with self._lock:
            if self._path is not None or self._failed:
                self._after.append((os.fspath(path), action))
                return
        action()

    def is_pending(self, path: PathLike) -> bool:
        """Whether a save to this path is under way."""
        with self._lock:
            return self._path == os.fspath(path)

    def poll(self) -> None:
        """Raise the error of a save that has failed, if none has heard of it yet. It costs nothing else, and never waits."""
        if self._error is None:
            return
        with self._lock:
            told, self._error = self._error, None
        if told is None:
            return
        message, error = told
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{message}: {error.strerror}", error.filename) from error
        log.error("%s.", message)
        raise error

    def wait(self) -> None:
        """Wait until what has been saved is on the disk, and raise the error if it is not."""
        self._wait()
        self.poll()

    def _wait(self) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None

    def teardown(self) -> None:
        """Wait for what is being written, and free the memory of the copies.

        Raises:
            OSError: or any other error, if the last save has failed.
        """
        self._wait()
        self._staging = Staging()
        try:
            self.poll()
        finally:
            self.writer.teardown()
