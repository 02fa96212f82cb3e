"""ModelCheckpoint: saves the best, the latest or all states of a training run."""

from __future__ import annotations

import logging
import os
from copy import copy
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning.fabric.utilities.cloud_io import join_path, local_path, replacing
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.pytorch.callbacks import checkpoint_files as files
from lightning.pytorch.callbacks import checkpoint_names as names
from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.callbacks.checkpoint_books import BOOKS, Books, in_one_storage, on_cpu
from lightning.pytorch.callbacks.checkpoint_schedule import Schedule, refuse
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.finite import looked_at, nonfinite_at_start, nonfinite_part

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

T = TypeVar("T")


class ModelCheckpoint(Books, Checkpoint):
    """Save checkpoints while training: the ``save_top_k`` best by a metric, or the latest, and optionally ``last.ckpt``.

    By default one file with the latest state is saved at the end of each training epoch; with several validation runs in an epoch,
    or not one in each, after validation instead. ``best_model_path`` names the best file (the latest without ``monitor``),
    ``last_model_path`` the ``last`` one.

    A checkpoint chosen by ``monitor`` holds the very weights on which that metric was measured: a save that falls due when the
    metric is of older weights, or just before a validation run, is put off to the end of the validation run or epoch at which a value
    of the current weights is there. The books (``best_k_models``, ``best_model_path``, ...) change, and files that dropped out are
    removed, only once the new file is complete; a save that fails raises, unless ``Trainer(on_save_error="retry")`` says otherwise.
    A state in which parameters, moments of optimizers, statistics of normalizing layers or (NaN only) other buffers are no numbers is not
    saved: what was saved before stays, and a warning names the first. What of it was so at the start, but for trained parameters, does
    not count. Nothing is saved by ``fast_dev_run``, in the sanity check, or outside of ``fit``.

    In a run of several processes the metrics of rank 0 decide for all; log with ``sync_dist=True`` what shall be of all data.

    Several instances in one trainer must differ in ``monitor``, ``mode``, ``every_n_train_steps``, ``every_n_epochs`` or
    ``train_time_interval``.

    Args:
        dirpath: folder of the files, local or remote. None stands for ``checkpoints`` in the folder of the first logger's run, or in the
            trainer's ``default_root_dir`` without a logger.
        filename: template of the names, without extension: ``{epoch}``, ``{step}`` (the optimizer steps taken) and all metrics may be
            fields, with formats as in ``{val_loss:.2f}``; a metric that is missing shows as 0. A ``/`` makes a folder. None
            stands for ``{epoch}-{step}``.
        monitor: name of the metric that decides which states are best; None keeps the latest.
        verbose: whether to log (level INFO) what is saved and why.
        save_last: True saves a copy ``last.ckpt`` whenever a checkpoint is saved; ``"link"`` makes it a relative symbolic link on a
            local disk, and a copy where links are not possible.
        save_top_k: how many checkpoints to keep: 0 none, -1 all. Without ``monitor`` only -1, 0 and 1 make sense.
        save_on_exception: whether to save the state in which an exception ends training, outside of the top k.
        save_weights_only: whether to leave out the state of optimizers, schedulers, callbacks and loops.
        mode: ``"min"`` or ``"max"``: which values of ``monitor`` are better.
        auto_insert_metric_name: whether ``{epoch}`` becomes ``epoch=1`` or ``1``. Set it to False if names of metrics contain ``/``.
        every_n_train_steps: save at every n-th optimizer step; 0 or None: not by steps.
        train_time_interval: save after the first batch after this time.
        every_n_epochs: save at every n-th epoch; 0: not by epochs. None means 1, or 0 if one of the other two is given; the
            three exclude each other.
        save_on_train_epoch_end: whether epochs are counted at the end of training epochs (True) or of validation runs (False).
        enable_version_counter: whether a name that is taken gets ``-v1``, ``-v2``, ... or is overwritten.

    Raises:
        MisconfigurationException: if an argument is not one of these, or there are more checkpoints to keep than ``monitor`` can rank;
            while training, if validation has run and nothing was logged under ``monitor``.
        ValueError: if ``filename`` is not a valid template.

    Note:
        ``CHECKPOINT_JOIN_CHAR``, ``CHECKPOINT_EQUALS_CHAR``, ``CHECKPOINT_NAME_LAST`` (a template, too), ``FILE_EXTENSION`` and
        ``STARTING_VERSION`` may be set on the instance.

    Example::

        >>> checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=2, filename="{epoch:02d}-{val_loss:.2f}", save_last=True)
        >>> checkpoint.format_checkpoint_name({"epoch": 3, "val_loss": 0.257})
        'epoch=03-val_loss=0.26.ckpt'
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        if dirpath is not None and not isinstance(dirpath, (str, os.PathLike)):
            raise TypeError(f"`ModelCheckpoint(dirpath={dirpath!r})` is not a path; accepted: a string, a `pathlib.Path`, or None.")
        self.dirpath = None if dirpath is None else files.canonical(dirpath)
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self._enable_version_counter = enable_version_counter
        self._schedule = Schedule(every_n_train_steps, train_time_interval, every_n_epochs, save_on_train_epoch_end)
        self._check_arguments()

        self._open_books()
        self._first_step: int | None = None  # the global step at which training began
        self._validated_step: int | None = None  # the global step of the latest validation run
        self._last_global_step_saved = 0
        self._last_checkpoint_saved = ""  # what `last` may link to
        self._saved_state: tuple[str, Any] = ("", None)  # the last file from which a run can go on, and from where
        self._told_of_nonfinite = False
        self._nonfinite_at_start: frozenset[str] = frozenset()
        self._forget_run(global_step=0)

    def _check_arguments(self) -> None:
        if not isinstance(self.save_top_k, int) or self.save_top_k < -1:
            raise refuse("save_top_k", self.save_top_k, "-1 (keep all), 0 (keep none), or how many to keep")
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise refuse("monitor", self.monitor, "the name of a metric that is logged, or None")
        if self.monitor is None and self.save_top_k > 1:
            raise refuse(
                "save_top_k", self.save_top_k, "-1, 0 or 1, unless `monitor` names the metric that tells which checkpoints are best"
            )
        if self.mode not in ("min", "max"):
            raise refuse("mode", self.mode, "'min' or 'max'")
        if self.save_last not in (None, True, False, "link"):
            raise refuse("save_last", self.save_last, "True, False, None or 'link'")
        if self.filename is not None and not isinstance(self.filename, str):
            raise refuse("filename", self.filename, "a template such as '{epoch}-{val_loss:.2f}', or None")
        names.check(self.filename or "")

    # ---- what is documented for users -------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint: its class and the arguments that tell instances apart."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._schedule.steps,
            every_n_epochs=self._schedule.epochs,
            train_time_interval=self._schedule.interval,
        )

    @property
    def every_n_epochs(self) -> int | None:
        """At every how many epochs to save; 0 if not by epochs."""
        return self._schedule.epochs

    def format_checkpoint_name(
        self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """The path of a checkpoint, in ``dirpath`` if that is known.

        Args:
            metrics: values for the fields of the template, ``epoch`` and ``step`` among them; missing ones count as 0.
            filename: a template to use instead of this callback's.
            ver: a version to append, as in ``-v1``.
            prefix: text to put in front of the name.

        Raises:
            ValueError: if a format does not suit its value.

        Example::

            >>> ModelCheckpoint(filename="{epoch:03d}").format_checkpoint_name({"epoch": 5}, ver=2)
            'epoch=005-v2.ckpt'
        """
        join = self.CHECKPOINT_JOIN_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        name = names.fill(template, metrics, self.CHECKPOINT_EQUALS_CHAR, self.auto_insert_metric_name)
        if prefix is not None:
            name = f"{prefix}{join}{name}"
        if ver is not None:
            name = f"{name}{join}v{ver}"
        name += self.FILE_EXTENSION
        return join_path(self.dirpath, name) if self.dirpath else name

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether a state with the score ``current`` belongs to the ``save_top_k`` best; all ranks get the same answer."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        worst = self.best_k_models[self.kth_best_model_path]
        better = bool(current < worst if self.mode == "min" else current > worst)
        return bool(trainer.strategy.reduce_boolean_decision(better))

    def file_exists(self, filepath: str | os.PathLike[str], trainer: pl.Trainer) -> bool:
        """Whether a file or folder lies at ``filepath``; rank 0 looks, all ranks get its answer."""
        return bool(_of_rank_0(trainer, trainer.is_global_zero and self._taken(trainer, filepath)))

    @staticmethod
    def _taken(trainer: pl.Trainer, path: str | os.PathLike[str]) -> bool:
        return files.exists(path) or trainer.strategy.checkpoint_io.is_pending(path)

    @rank_zero_only
    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write ``best_k_models``, paths and their scores, to a YAML file.

        Args:
            filepath: where to; None stands for ``best_k_models.yaml`` in ``dirpath``.
        """
        import yaml

        target = join_path(self.dirpath or "", "best_k_models.yaml") if filepath is None else filepath
        with replacing(target) as file:
            yaml.safe_dump({path: score.item() for path, score in self.best_k_models.items()}, file)

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Decide where the files go."""
        self._first_step = None
        self.dirpath = trainer.strategy.broadcast(self.dirpath or files.folder_of_run(trainer))
        self._told_of_nonfinite = False
        saves = stage == TrainerFn.FITTING and not trainer.fast_dev_run
        if saves:
            files.prepare_folder(trainer, self.dirpath)
        may_collide = saves and self.save_top_k != 0
        if may_collide and not trainer._goes_on and trainer.is_global_zero and files.holds_files(self.dirpath):
            then = "gets a version" if self._enable_version_counter else "is overwritten"
            rank_zero_warn(f"The checkpoint folder {self.dirpath} is not empty: a name that is taken {then}.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._forget_run(trainer.global_step)
        self._nonfinite_at_start = frozenset() if self._inactive(trainer) else nonfinite_at_start(trainer)
        if trainer.validation_due and self._schedule.within_epochs and self._schedule.batch_due(trainer):
            self._top_k_due = self._last_due = True  # a resumed run comes to the validation for which the batch's save was put off

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if steps or time say so; after the validation run if one follows this batch at once."""
        if self._schedule.within_epochs and not self._inactive(trainer) and self._schedule.batch_due(trainer):
            self._top_k_due = self._last_due = True
            if not trainer.validation_due:
                self._save_due(trainer, at_batch=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was put off, or what epochs say."""
        if self._inactive(trainer):
            return
        self._validated_step = trainer.global_step
        self._save_due(trainer)
        if self._top_k_due:
            self._report_missing(trainer, fatal=False)  # it may be a metric of the training epoch
        if not self._schedule.at_train_epoch_end(trainer):
            self._save_epoch(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was put off, or what epochs say."""
        if self._inactive(trainer):
            return
        self._save_due(trainer)
        if self._top_k_due and (self._validated_step is not None or not trainer.enable_validation):
            self._report_missing(trainer, fatal=self._validated_step is not None)
        if self._schedule.at_train_epoch_end(trainer):
            self._save_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save ``last`` if a run that trained has saved none so far."""
        if self._inactive(trainer) or trainer.global_step == self._first_step:
            return
        if self._top_k_due:
            self._report_missing(trainer, fatal=False)
        if self.save_last and not self.last_model_path:
            self._save_last(trainer, self._metrics(trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the state of the interrupted run if asked to; a failure to do so is logged and never hides ``exception``."""
        nothing_new = trainer.global_step in (self._first_step, self._last_global_step_saved)
        if not self.save_on_exception or self._first_step is None or nothing_new or self._inactive(trainer):
            return
        try:
            if not self._finite(trainer):
                return
            metrics = self._metrics(trainer)
            path = self._free_path(trainer, metrics)
            self._save(trainer, path)
            self._last_checkpoint_saved = path
            self._notify(trainer)
            log.info("%s ended training at global step %d; its state is saved at %s.", type(exception).__name__, trainer.global_step, path)
            if self.save_last:
                self._save_last(trainer, metrics, looked=True)
        except Exception:
            # Logged, not warned: under `-W error` a warning would take the place of the exception that ended the run.
            log.exception("The state of the interrupted run could not be saved.")

    def save_to_go_on(self, trainer: pl.Trainer) -> str | None:
        """Save ``last`` where a signal ends the run, whatever else is saved and when; all processes must call it.

        It holds all that a run goes on from, also with ``save_weights_only``. If the last checkpoint that was saved is of this very
        state, ``last`` becomes a link to it where that is possible.

        Returns:
            the path; None if training has not begun, or the weights are no numbers.
        """
        if self._first_step is None or self._inactive(trainer):
            return None
        former, (saved, position) = self.last_model_path, self._saved_state
        current = saved if position == trainer.fit_loop.progress.position() else ""
        if current and current == former:
            return former
        if not self._finite(trainer, complete=True):
            return None
        path = self._free_path(trainer, self._metrics(trainer), own=former, template=self.CHECKPOINT_NAME_LAST)
        with self._unchanged_on_error():
            self.last_model_path, self._last_checkpoint_saved = path, current
            if not self._link(trainer, path):
                with looked_at():
                    trainer.save_checkpoint(path)
        self._last_global_step_saved = trainer.global_step
        self._notify(trainer)
        if former:
            self._remove(trainer, former, path)
        return path

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on after a restart: scores and paths."""
        books = {name: getattr(self, name) for name in BOOKS}
        return {"monitor": self.monitor, "dirpath": self.dirpath, **books, "best_k_models": in_one_storage(self.best_k_models)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; under another ``dirpath`` only with the path of the best checkpoint.

        Files in the other folder are left alone, and so are those beyond a ``save_top_k`` that is smaller than it was.
        """
        former = state_dict.get("dirpath", self.dirpath)
        if former == self.dirpath:
            books = {path: on_cpu(score) for path, score in state_dict.get("best_k_models", {}).items()}
            if self.save_top_k > 0:
                ranked = sorted(books, key=lambda path: books[path].item(), reverse=self.mode == "max")[: self.save_top_k]
                books = {path: score for path, score in books.items() if path in ranked}
            self.best_model_score = on_cpu(state_dict.get("best_model_score"))
            self.last_model_path = state_dict.get("last_model_path", "")
            if books:
                self._rank(books)
        else:
            rank_zero_warn(
                f"This run saves checkpoints in {self.dirpath!r}, the one that it resumes saved them in {former!r}. Only `best_model_path` "
                "is taken over; scores, `best_k_models` and `last_model_path` start anew, and the old files stay where they are."
            )
        self.best_model_path = state_dict.get("best_model_path", "")

    # ---- when to save -----------------------------------------------------------------------------------------------

    def _forget_run(self, global_step: int) -> None:
        self._schedule.restart(global_step)
        self._first_step = global_step
        self._validated_step = None
        self._top_k_due = self._last_due = self._reported = False
        self._last_checkpoint_saved, self._saved_state = "", ("", None)
        if self._last_global_step_saved > global_step:  # the callback serves a second run
            self._last_global_step_saved = 0

    def _inactive(self, trainer: pl.Trainer) -> bool:
        return bool(trainer.fast_dev_run) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING

    def _measured(self, trainer: pl.Trainer, at_batch: bool) -> bool:
        """Whether the monitored value is of the current weights, so that a decision can be taken."""
        if self.monitor is None or self.save_top_k == 0 or self.monitor in ("epoch", "step"):
            return True
        measured, validated = trainer.metric_steps.get(self.monitor), self._validated_step
        # A value of training that is not logged at every step may never be of the last weights of an epoch; the newest has to do.
        current = measured == trainer.global_step or (not at_batch and measured != validated)
        return _of_rank_0(trainer, self.monitor in trainer.callback_metrics and current)

    def _save_due(self, trainer: pl.Trainer, at_batch: bool = False) -> None:
        """Save what steps or time made due, as soon as the metric allows it; ``last`` does not wait for it."""
        if not (self._top_k_due or self._last_due):
            return
        metrics, saved = self._metrics(trainer), False
        if self._top_k_due and self._measured(trainer, at_batch):
            self._top_k_due = False
            saved = self._save_top_k(trainer, metrics)
        linked = self.save_last == "link" and self.save_top_k != 0
        if self.save_last and self._last_due and not saved and (not linked or self._last_checkpoint_saved):
            self._save_last(trainer, metrics)
        self._last_due = False

    def _save_epoch(self, trainer: pl.Trainer) -> None:
        """Save if it is the n-th epoch; ``last`` goes with the file, or alone where files are not asked for."""
        schedule = self._schedule
        last_alone = bool(self.save_last) and not schedule.within_epochs and (self.save_top_k == 0 or schedule.epochs == 0)
        # A resumed run's first state is that of the checkpoint it began with; only a new metric is a reason to save it again.
        known = trainer.global_step in (self._last_global_step_saved, self._first_step if self.monitor is None else None)
        if known or not (last_alone or schedule.epoch_due(trainer)):
            return
        metrics = self._metrics(trainer)
        if last_alone:
            self._save_last(trainer, metrics)
        elif self._measured(trainer, at_batch=False):
            self._save_top_k(trainer, metrics)
        else:
            self._top_k_due = True
            self._report_missing(trainer, fatal=self._validated_step is not None)

    def _report_missing(self, trainer: pl.Trainer, fatal: bool) -> None:
        """If nothing was logged under the monitored name, raise or warn; the warning, for a metric that may still come, is given once."""
        known = self._metrics(trainer)
        if self.monitor is None or self.monitor in known:
            return
        message = (
            f"`ModelCheckpoint(monitor={self.monitor!r})` has nothing to decide on: no metric of that name was logged. There are "
            f"{list(known)}. Name one of them, or log the missing one with `self.log({self.monitor!r}, value)`."
        )
        if fatal:
            raise MisconfigurationException(message)
        if not self._reported:
            self._reported = True
            rank_zero_warn(message)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _metrics(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        metrics = dict(trainer.callback_metrics)
        for name, value in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            metrics[name] = metrics[name].int() if name in metrics else torch.tensor(value)
        return _of_rank_0(trainer, metrics)

    def _save_top_k(self, trainer: pl.Trainer, metrics: dict[str, Tensor]) -> bool:
        """Save a checkpoint, then ``last``, and remove what dropped out; returns whether there was a reason to."""
        if self.save_top_k == 0:
            return False
        if trainer.strategy.checkpoint_io.retries:
            self._forget_given_up(trainer)
        if self.monitor is None:
            if not self._finite(trainer):
                return False
            dropped = self._save_latest(trainer, metrics)
        else:
            score = on_cpu(metrics[self.monitor])
            event = f"Epoch {trainer.current_epoch}, global step {trainer.global_step}: {self.monitor!r} = {score:.5f}"
            if not self.check_monitor_top_k(trainer, score):
                self._say(f"{event} is not among the best {self.save_top_k}.")
                return False
            if not self._finite(trainer):
                return False
            dropped = self._save_ranked(trainer, metrics, self._worst if torch.isnan(score) else score)
            self._say(f"{event}, saved at {self._last_checkpoint_saved!r}.")
        if self.save_last == "link":  # before the file goes to which the link points
            self._save_last(trainer, metrics, looked=True)
        if dropped:
            self._remove(trainer, dropped, self._last_checkpoint_saved)
        if self.save_last and self.save_last != "link":
            self._save_last(trainer, metrics, looked=True)
        return True

    def _finite(self, trainer: pl.Trainer, complete: bool = False) -> bool:
        """Whether what is saved are numbers. If not, nothing is saved by itself: it would take the place of what is still of use."""
        name = nonfinite_part(trainer, self.save_weights_only and not complete, self._nonfinite_at_start)
        if name is not None and not self._told_of_nonfinite:
            self._told_of_nonfinite = True
            message = (
                f"The {name} holds NaN or infinity at global step {trainer.global_step}, so ModelCheckpoint saves nothing as "
                "long as that is so; what was saved before stays. `trainer.save_checkpoint` saves such a state."
            )
            rank_zero_warn(message)
        return name is None

    def _forget_given_up(self, trainer: pl.Trainer) -> None:
        """Take out of the books what could not be saved, and was given up for a newer checkpoint."""
        known = [path for path in (*self.best_k_models, self.last_model_path) if path]
        gone = _of_rank_0(trainer, [path for path in known if not self._taken(trainer, path)] if trainer.is_global_zero else [])
        self._forget(gone)

    def _save_latest(self, trainer: pl.Trainer, metrics: dict[str, Tensor]) -> str:
        """Save without a ranking; returns the path that is to go."""
        dropped = self.best_model_path if self.save_top_k == 1 else ""
        path = self._free_path(trainer, metrics, own=dropped)
        with self._unchanged_on_error():
            self.best_model_path = path
            self._save(trainer, path)
        self._last_checkpoint_saved = path
        self._notify(trainer)
        return dropped

    def _save_ranked(self, trainer: pl.Trainer, metrics: dict[str, Tensor], score: Tensor) -> str:
        """Save as one of the best; returns the path that is to go."""
        full = self.save_top_k != -1 and len(self.best_k_models) >= self.save_top_k
        path = self._free_path(trainer, metrics, own=self.kth_best_model_path if full else "")
        dropped = self.kth_best_model_path if full and path not in self.best_k_models else ""
        kept = {kept: its_score for kept, its_score in self.best_k_models.items() if kept not in (dropped, path)}
        with self._unchanged_on_error():
            self.current_score = score
            self._rank({**kept, path: score})
            self._save(trainer, path)
        self._last_checkpoint_saved = path
        self._notify(trainer)
        return dropped

    def _save_last(self, trainer: pl.Trainer, metrics: dict[str, Tensor], looked: bool = False) -> None:
        if not looked and not self._finite(trainer):
            return
        former = self.last_model_path
        path = self._free_path(trainer, metrics, own=former, template=self.CHECKPOINT_NAME_LAST)
        with self._unchanged_on_error():
            self.last_model_path = path
            if not (self.save_last == "link" and self._link(trainer, path)):
                self._save(trainer, path)
        self._notify(trainer)
        if former:
            self._remove(trainer, former, path)

    def _save(self, trainer: pl.Trainer, path: str) -> None:
        with looked_at():
            trainer.save_checkpoint(path, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        if not self.save_weights_only:
            self._saved_state = (path, trainer.fit_loop.progress.position())

    def _link(self, trainer: pl.Trainer, path: str) -> bool:
        target = self._last_checkpoint_saved
        writer = trainer.strategy.checkpoint_io
        local, local_target = local_path(path), local_path(target)
        if trainer.is_global_zero and target and writer.is_pending() and local is not None and local_target is not None:
            # A link to a file that is not there yet, in place of one to a file that is, would be the end of a run killed now.
            writer.after_saves(path, partial(files.link_to_saved, local_target, local))
            return _of_rank_0(trainer, True)
        return bool(target and _of_rank_0(trainer, trainer.is_global_zero and files.link(target, path)))

    def _notify(self, trainer: pl.Trainer) -> None:
        """Tell the loggers, once the file is on the disk, of this callback as it is now: they hear of it from a thread of their own."""
        if trainer.is_global_zero:
            tell = partial(trainer.tell_loggers, "after_save_checkpoint", copy(self))
            trainer.strategy.checkpoint_io.after_saves(f"{self._last_checkpoint_saved}#{trainer.global_step}", tell)

    # ---- files ------------------------------------------------------------------------------------------------------

    def _free_path(self, trainer: pl.Trainer, metrics: dict[str, Tensor], own: str = "", template: str | None = None) -> str:
        """A path that is not taken; ``own`` is the file that the new one replaces."""
        path = self.format_checkpoint_name(metrics, template)
        version = self.STARTING_VERSION
        while self._enable_version_counter and path != own and self.file_exists(path, trainer):
            path = self.format_checkpoint_name(metrics, template, ver=version)
            version += 1
        return path

    def _remove(self, trainer: pl.Trainer, former: str, current: str) -> None:
        """Remove a file that dropped out, unless it lies in another folder or is the one that this run resumed from."""
        ours = files.within(former, self.dirpath or "") and former.endswith(self.FILE_EXTENSION)  # a checkpoint may name any file
        if former == current or not ours:
            return
        if trainer.ckpt_path and files.canonical(trainer.ckpt_path) == files.canonical(former):
            return
        trainer.strategy.remove_checkpoint(former)

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """The paths under which this or an earlier run of this callback has saved ``last``."""
        signs = (self.CHECKPOINT_JOIN_CHAR, self.FILE_EXTENSION, self.CHECKPOINT_EQUALS_CHAR)
        wanted = names.pattern(self.CHECKPOINT_NAME_LAST, *signs, insert_names=self.auto_insert_metric_name)
        return files.find(self.dirpath or files.folder_of_run(trainer), wanted)

    def _say(self, message: str) -> None:
        if self.verbose:
            rank_zero_only(log.info)(message)


def _of_rank_0(trainer: pl.Trainer, value: T) -> T:
    """The value that rank 0 has, by which all processes decide alike; while a run is failing, nobody is waited for."""
    return value if trainer.state.status == TrainerStatus.INTERRUPTED else trainer.strategy.broadcast(value)
