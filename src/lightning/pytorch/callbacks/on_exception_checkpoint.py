"""OnExceptionCheckpoint: saves the state of training when an exception ends it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import join_path
from lightning.pytorch.callbacks import checkpoint_files as files
from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.finite import looked_at, nonfinite_at_start, nonfinite_part

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class OnExceptionCheckpoint(Checkpoint):
    """Save a checkpoint when an exception, an interrupt included, ends training.

    The exception goes on as if nothing had been saved; a failure to save is logged and never takes its place. The file is
    removed once a later ``fit`` that resumed from it has ended well. Nothing is saved by ``fast_dev_run``, in the sanity check, or
    outside of ``fit``, nor where weights, or what else ModelCheckpoint looks at, hold NaN or infinity.

    Args:
        dirpath: the folder of the file, local or remote.
        filename: its name without the extension.

    Raises:
        ValueError: if ``filename`` is empty.

    Example::

        >>> OnExceptionCheckpoint("runs").ckpt_path
        'runs/on_exception.ckpt'
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise ValueError(f"`OnExceptionCheckpoint(filename={filename!r})` needs a name for the file, without its extension.")
        self.dirpath = dirpath
        self.filename = filename
        self._training = False
        self._nonfinite_at_start: frozenset[str] = frozenset()

    @property
    def ckpt_path(self) -> str:
        """Where the checkpoint is, or will be, saved."""
        return join_path(self.dirpath, self.filename + self.FILE_EXTENSION)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run; find out whether the file could be written, as far as that can be known."""
        self._training = False
        if stage == TrainerFn.FITTING and not trainer.fast_dev_run:
            files.prepare_folder(trainer, self.dirpath)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save."""
        self._training = not trainer.fast_dev_run
        self._nonfinite_at_start = nonfinite_at_start(trainer) if self._training else frozenset()

    def on_exception(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Save, unless no training is going on."""
        training, self._training = self._training, False
        if not training:
            return
        try:
            name = nonfinite_part(trainer, known=self._nonfinite_at_start)
            if name is not None:
                log.warning("The %s holds NaN or infinity, so the state of the interrupted run is not saved.", name)
                return
            with looked_at():
                trainer.save_checkpoint(self.ckpt_path)
        except Exception:
            # Logged, not warned: under `-W error` a warning would take the place of the exception that ended the run.
            log.exception("No checkpoint of the interrupted run could be saved at %s.", self.ckpt_path)

    def save_to_go_on(self, trainer: pl.Trainer) -> str | None:
        """Save where a signal ends the run, in place of saving on the exception that then follows; all processes must call it.

        Returns:
            the path; None if nothing was saved.
        """
        training, self._training = self._training, False
        if not training or nonfinite_part(trainer, known=self._nonfinite_at_start) is not None:
            return None
        with looked_at():
            trainer.save_checkpoint(self.ckpt_path)
        return self.ckpt_path

    def teardown(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Remove the file if this run resumed from it and ended well: it has served its purpose."""
        if self._training and trainer.ckpt_path and files.canonical(trainer.ckpt_path) == files.canonical(self.ckpt_path):
            trainer.strategy.remove_checkpoint(self.ckpt_path)

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """What ``ckpt_path="last"`` may mean."""
        return {self.ckpt_path} if files.exists(self.ckpt_path) else set()
