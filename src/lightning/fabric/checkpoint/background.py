"""Saves that go on beside the training: begun by it, or tried again after they have failed."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from lightning.fabric.checkpoint.io import CheckpointIO, PathLike, TorchCheckpointIO
from lightning.fabric.checkpoint.staging import Staging
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

log = logging.getLogger(__name__)

GO_ON, LAST_TRY, STOP = 0, 1, 2  # what becomes of a save that has failed; of several processes, the greatest counts

Write = Callable[[Any, bool], None]

_unfinished: set[BackgroundCheckpointIO] = set()  # which are at work, or have an error of which nobody has heard


class Job:
    """A checkpoint to be written.

    Args:
        path: where to.
        data: a copy, which nobody changes.
        write: called with the data, and whether that is in the background.
        staging: which has made the copy.
        agree: where processes write together, what they all do, of what each would; None where one writes alone.
    """

    def __init__(self, path: str, data: Any, write: Write, staging: Staging, agree: Callable[[int], int] | None) -> None:
        self.path = path
        self.data = data
        self.write = write
        self.staging = staging
        self.agree = agree

    def attempt(self) -> None:
        self.staging.wait()
        self.write(self.data, True)


class BackgroundCheckpointIO(CheckpointIO):
    """What :class:`AsyncCheckpointIO` and :class:`PatientCheckpointIO` have in common: a thread, and what waits for it.

    A removal that is asked for while a save is under way, or fails, happens once that save, or a later one, is on the disk. So, after
    the first, there is always a whole checkpoint on the disk.

    Args:
        checkpoint_io: who writes, reads and removes. None stands for :class:`TorchCheckpointIO`.

    Raises:
        TypeError: for anything else.

    Attributes:
        retries: whether a save that fails with an OSError is tried again, from a copy in memory, until it succeeds or a newer one begins,
            which the copy then survives for one more try. Else the error is raised by the next :meth:`poll`.
    """

    first_pause = 1.0  # seconds before a save is tried again; each pause is twice the one before
    longest_pause = 60.0
    patience = 10.0  # seconds that a process which fails waits for a save that needs the others

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        if checkpoint_io is not None and not isinstance(checkpoint_io, CheckpointIO):
            raise TypeError(
                f"`{type(self).__name__}(checkpoint_io={checkpoint_io!r})`: a {type(checkpoint_io).__name__} can't write checkpoints. Give "
                "an instance of a CheckpointIO, or leave it out."
            )
        self._checkpoint_io = checkpoint_io
        self.retries = False
        self._reset()

    def _reset(self) -> None:
        self._staging = Staging()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._path: str | None = None  # of the save that is under way, or is to be tried again
        self._held: Job | None = None  # a save that was interrupted between two tries
        self._spare: str | None = None  # of an older save that is tried once more after this one
        self._after: list[tuple[str, Callable[[], Any]]] = []  # what waits for a save that succeeds: what it is about, and what to do
        self._failed = False  # whether the latest save has
        self._told: list[tuple[str, BaseException, bool]] = []  # errors of which nobody has heard, and whether they are raised
        self._order = GO_ON
        self._wake = threading.Event()
        self._acting = False  # the first of these is being done
        self._stalled = False  # one of them has failed, and is tried again
        self._pausing = False  # a save has failed, and is tried again later
        self._leaving = False
        self.troubled = False

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {"checkpoint_io": self._checkpoint_io, "retries": self.retries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        BackgroundCheckpointIO.__init__(self, state["checkpoint_io"])
        self.retries = state["retries"]

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

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint.

        Args:
            args: as for :meth:`CheckpointIO.save_checkpoint`.
            kwargs: the same.
        """
        self._save(*args, **kwargs)

    def _save(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        self.submit(path, checkpoint, lambda data, _: self.writer.save_checkpoint(data, path, storage_options))

    def submit(self, path: PathLike, data: Any, write: Write, agree: Callable[[int], int] | None = None) -> None:
        """Save whatever ``write`` writes.

        Args:
            path: where to.
            data: of which a copy is written, unless that is done before this returns.
            write: takes the data or the copy, and whether training goes on meanwhile.
            agree: where processes save together, which then all call this: takes what this process would do, and returns the greatest.
                It is called in the background.

        Raises:
            OSError: or any other error by which the save before this one has failed; then this one does not begin.
        """
        raise NotImplementedError

    def _prepare(self, path: str) -> Job | None:
        """End what was under way; returns an older save that is worth another try."""
        held = self._interrupt()
        self.poll()
        with self._lock:
            self._after = [(about, action) for about, action in self._after if about != path]  # it is not to go any more
        return held if held is not None and held.path != path and held.agree is None else None

    def _interrupt(self) -> Job | None:
        """Wait for what is being written, but not for a save that has failed: that is returned."""
        self._command(STOP)
        held, self._held = self._held, None
        if held is not None:
            self._staging = Staging()  # the memory of the other one holds what was not saved
        return held

    def _command(self, order: int) -> None:
        """Wait for the thread, which hears what to do if its save fails, or has failed."""
        self._order = order
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self.patience if self._leaving and thread.daemon else None)
            if thread.is_alive():
                return
            self._thread = None
        self._order = GO_ON
        self._wake.clear()

    def _stage(self, path: str, data: Any, write: Write, agree: Callable[[int], int] | None) -> Job:
        return Job(path, self._staging.stage(data), write, self._staging, agree)

    def _start(self, job: Job | None, older: Job | None, failed: bool = False) -> None:
        with self._lock:
            self._path, self._spare = None if job is None else job.path, None if older is None else older.path
        # Not a daemon: an interpreter that ends waits for it. It does not wait for other processes, which may be gone.
        together = job is not None and job.agree is not None
        _unfinished.add(self)
        atexit.unregister(_finish_at_exit)  # now it runs before what was registered until now, such as leaving the other processes
        atexit.register(_finish_at_exit)
        go = threading.Event()  # else the thread would begin with Python's lock in its hands, and training would wait for it
        work = (self._work, go, job, older, failed)
        self._thread = threading.Thread(target=copy_context().run, args=work, name="checkpoint", daemon=together)
        self._thread.start()
        go.set()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _work(self, go: threading.Event, job: Job | None, older: Job | None, failed: bool) -> None:
        try:
            self._write(go, job, older, failed)
        finally:
            with self._lock:
                if not self._told:
                    _unfinished.discard(self)

    def _write(self, go: threading.Event, job: Job | None, older: Job | None, failed: bool) -> None:
        go.wait()
        if job is not None and not self._persist(job, failed):
            return
        if older is not None and all(about != older.path for about, _ in self._after):
            try:
                older.attempt()
            except BaseException as error:
                log.debug("The checkpoint %r is given up for a newer one: %s", older.path, error)
        self._follow_up()

    def _persist(self, job: Job, failed: bool) -> bool:
        """Write a checkpoint, again and again if need be; returns whether it is on the disk."""
        pause, order, silent = self.first_pause, GO_ON, failed
        while True:
            if failed:
                if order == GO_ON:
                    self._pausing = True
                    self._wake.wait(pause)
                    self._pausing = False
                    pause = min(2 * pause, self.longest_pause)
                order = self._order if job.agree is None else self._agreed(job)
                if order == STOP:
                    with self._lock:
                        self._held, self._path, self._spare = job, None, None
                    return False
            try:
                job.attempt()
            except BaseException as error:
                final = not self.retries or order == LAST_TRY or not isinstance(error, OSError)
                self._fail(job.path, error, final, silent)
                if final:
                    return False
                failed = silent = True
                continue
            if failed:
                rank_zero_info(f"The checkpoint {job.path!r} is saved now.")
            return True

    def _agreed(self, job: Job) -> int:
        assert job.agree is not None
        try:
            return job.agree(self._order)
        except BaseException as error:  # the others are gone, and nothing that needs them can be saved
            log.debug("The processes could not agree on a checkpoint: %s", error)
            return STOP

    def _fail(self, path: str, error: BaseException, final: bool, silent: bool = False) -> None:
        with self._lock:
            self._failed, self._stalled = True, False
            if final:
                self._path = self._spare = None
            if final or not silent:
                self._told.append((f"The checkpoint {path!r} was not saved", error, final))
                self.troubled = True

    def _follow_up(self) -> None:
        """Do what has waited for a save that succeeds."""
        while True:
            with self._lock:
                if not self._after:
                    self._failed, self._stalled, self._path, self._spare = False, False, None, None
                    return
                about, action = self._after[0]
                self._acting = True
            error: BaseException | None = None
            try:
                done = action() is not False
            except BaseException as caught:
                error = caught
                done = not (self.retries and isinstance(error, OSError))
            with self._lock:
                self._acting = False
                if done:
                    self._after.pop(0)
                if done and error is None:
                    continue
                # What comes after it may rely on it: the removal of a file to which a link was to point no more.
                self._failed, self._path, self._spare = error is not None, None, None
                self._stalled = error is not None and not done
                if error is not None:
                    self._told.append((f"After a checkpoint was saved, {about!r} could not be removed or changed", error, done))
                    self.troubled = True
                return

    # ---- what goes with it ------------------------------------------------------------------------------------------

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, once what is being written is complete.

        Args:
            args: as for :meth:`CheckpointIO.load_checkpoint`.
            kwargs: the same.
        """
        self.settle()
        return self.writer.load_checkpoint(*args, **kwargs)

    def settle(self) -> None:
        """Wait for what is being written, but not for a save that has failed to succeed after all."""
        thread = self._thread
        while thread is not None and thread.is_alive() and not self._pausing and thread is not threading.current_thread():
            thread.join(0.01)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Delete a checkpoint, once those that were saved before this call are on the disk.

        Args:
            args: as for :meth:`CheckpointIO.remove_checkpoint`.
            kwargs: the same.
        """
        path = os.fspath(args[0] if args else kwargs["path"])

        def remove() -> None:
            try:
                self.writer.remove_checkpoint(*args, **kwargs)
            except OSError as error:  # which leaves a file too many, and keeps nothing else from being done
                if not self.retries:
                    raise
                with self._lock:
                    self._told.append((f"{path!r} could not be removed", error, False))
                    self.troubled = True

        self.after_saves(path, remove)

    def after_saves(self, path: PathLike, action: Callable[[], Any]) -> None:
        """Do something once the saves that have begun are on the disk; not before another succeeds, if the latest has failed.

        Args:
            path: what it is about; a new save to this path makes the action void, and a new action takes its place.
            action: takes nothing, and returns False if it must wait for another save; it may be called by another thread.
        """
        about = os.fspath(path)
        with self._lock:
            if self._path is not None or self._spare is not None or self._failed:
                earlier = [place for place, (other, _) in enumerate(self._after) if other == about and (place > 0 or not self._acting)]
                if earlier:
                    self._after[earlier[0]] = about, action
                else:
                    self._after.append((about, action))
                return
            if not self._acting:
                self._after = [(other, waiting) for other, waiting in self._after if other != about]
        action()

    def is_pending(self, path: PathLike | None = None) -> bool:
        """Whether a save to this path, or to any, is under way, or is to be tried again, or something waits that is about it."""
        with self._lock:
            if path is None:
                return self._path is not None or self._spare is not None or self._failed or bool(self._after)
            return os.fspath(path) in (self._path, self._spare, *(about for about, _ in self._after))

    def poll(self) -> None:
        """Raise the error of a save that has failed, if none has heard of it yet; warn of it if it is tried again. It never waits.

        It has something to say only if ``troubled``.
        """
        if not self.troubled:
            return
        with self._lock:
            told, self._told, self.troubled = self._told, [], False
            if self._thread is None or not self._thread.is_alive():
                _unfinished.discard(self)
        for message, error, final in told:
            if not final:
                number = f" (errno {error.errno})" if isinstance(error, OSError) and error.errno is not None else ""
                reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
                then = "and it stays" if message.endswith("could not be removed") else "it is tried again, and what was saved before stays"
                rank_zero_warn(f"{message}: {reason}{number}. The run goes on, {then}.")
        for message, error, final in told:
            if final:
                if isinstance(error, OSError) and error.errno is not None:
                    raise OSError(error.errno, f"{message}: {error.strerror}", error.filename) from error
                log.error("%s.", message)
                raise error

    def wait(self) -> None:
        """Wait until what has been saved is on the disk, and raise the error if it is not; what has failed is tried a last time."""
        self._end()
        self.poll()

    def _end(self) -> None:
        self._command(LAST_TRY)
        if self._stalled:
            self._stalled = False
            self._follow_up()

    def leave_soon(self) -> None:
        """This process fails: don't wait for long for other processes any more, until :meth:`teardown`."""
        self._leaving = True

    def teardown(self) -> None:
        """Wait for what is being written, and free the memory of the copies.

        Raises:
            OSError: or any other error, if the last save has failed.
        """
        try:
            self._end()
            self.poll()
        finally:
            self._staging, self._held, self._spare, self._leaving = Staging(), None, None, False
            # What another run saves is no reason to remove anything of this one.
            self._after, self._failed, self._stalled = [], False, False
            self.writer.teardown()


def _finish_at_exit() -> None:
    """Wait for what processes save together, before they leave each other, unless an uncaught error ends this one; tell errors."""
    failing = getattr(sys, "last_value", None) is not None
    for writer in list(_unfinished):
        if failing:
            writer.leave_soon()
        try:
            writer.wait()
        except Exception as error:
            log.error("%s", error)


class PatientCheckpointIO(BackgroundCheckpointIO):
    """Lets another CheckpointIO write; if that fails with an OSError, training goes on, and the save is tried again in the background.

    The state that was to be saved is kept in the memory of the host until then. Each failure is a warning; that of the last save of
    a run is an error. This is what ``Trainer(on_save_error="retry")`` uses.

    Args:
        checkpoint_io: who writes, reads and removes. None stands for :class:`TorchCheckpointIO`.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io)
        self.retries = True

    def submit(self, path: PathLike, data: Any, write: Write, agree: Callable[[int], int] | None = None) -> None:
        target = os.fspath(path)
        older = self._prepare(target)
        try:
            write(data, False)
        except OSError as error:
            job = self._stage(target, data, write, agree)
            self._fail(target, error, final=False)
            self._start(job, older, failed=True)
            self.poll()
            return
        if older is not None or self._after:
            self._start(None, older)
        else:
            self._failed = False
