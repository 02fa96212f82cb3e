"""``train``: a run of a few batches in the order of events that the trainer keeps, small enough to say what every number is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus


class Strategy:
    """One process."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision

    def remove_checkpoint(self, path: str) -> None:
        os.remove(path)


class Run:
    """What a checkpoint callback asks of a trainer, and the events of ``fit``.

    Each batch takes one optimizer step; a checkpoint holds the number of steps as its weights. Validation logs ``vl``: the next of
    ``scores``, or the number of steps. With ``log_train`` each batch logs ``tl``, and each epoch at its end ``te``: the number of steps.
    """

    def __init__(
        self,
        callbacks: list[Any],
        root: Path,
        max_epochs: int = 3,
        batches: int = 4,
        scores: list[float] | None = None,
        validate: bool = True,
        val_check_interval: int | float = 1.0,
        check_val_every_n_epoch: int | None = 1,
        accumulate: int = 1,
        log_train: bool = False,
        crash_at: int | None = None,
        fast_dev_run: bool = False,
        ckpt_path: str | None = None,
        loggers: list[Any] | None = None,
        before_save: Callable[[str], None] | None = None,
    ) -> None:
        self.callbacks, self.root, self.max_epochs, self.batches = callbacks, root, max_epochs, batches
        self.scores, self.accumulate, self.log_train, self.crash_at = list(scores or []), accumulate, log_train, crash_at
        self.enable_validation, self.num_val_batches = validate, [1] if validate else [0]
        self.val_check_interval, self.check_val_every_n_epoch = val_check_interval, check_val_every_n_epoch
        self.fast_dev_run, self.ckpt_path, self.loggers, self.before_save = fast_dev_run, ckpt_path, loggers or [], before_save
        self.strategy, self.is_global_zero, self.default_root_dir = Strategy(), True, str(root)
        self.state = TrainerState(TrainerStatus.RUNNING, TrainerFn.FITTING, RunningStage.TRAINING)
        self.sanity_checking = self.validation_due = False
        self.global_step = self.current_epoch = self.total_batches = 0
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.metric_steps: dict[str, int] = {}
        self.saves: list[tuple[int, str]] = []

    @property
    def files(self) -> list[str]:
        """All files and links below the root, links with their target."""
        paths = [path for path in self.root.rglob("*") if path.is_symlink() or path.is_file()]
        return sorted(f"{path.relative_to(self.root)}" + (f" -> {os.readlink(path)}" if path.is_symlink() else "") for path in paths)

    def step_in(self, name: str) -> int:
        """The global step of the weights in a file."""
        return int(torch.load(self.root / name, weights_only=False)["global_step"])

    def save_checkpoint(self, path: str, weights_only: bool | None = None, storage_options: Any = None) -> None:
        if self.before_save is not None:
            self.before_save(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        states = {} if weights_only else {callback.state_key: callback.state_dict() for callback in self.callbacks}
        temporary = f"{path}.part"
        torch.save({"epoch": self.current_epoch, "global_step": self.global_step, "callbacks": states}, temporary)
        os.replace(temporary, path)
        self.saves.append((self.global_step, os.path.basename(path)))

    def call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, SimpleNamespace(), *args)

    def log(self, name: str, value: float) -> None:
        self.callback_metrics[name] = torch.tensor(value)
        self.metric_steps[name] = self.global_step

    def fit(self) -> Run:
        self.call("setup", TrainerFn.FITTING)
        if self.ckpt_path is not None:
            checkpoint = torch.load(self.ckpt_path, weights_only=False)
            self.global_step, self.current_epoch = checkpoint["global_step"], checkpoint["epoch"] + 1
            for callback in self.callbacks:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
        try:
            self.call("on_train_start")
            while self.current_epoch < self.max_epochs:
                self.epoch()
                self.current_epoch += 1
            self.call("on_train_end")
        except BaseException as error:
            self.call("on_exception", error)
            raise
        return self

    def epoch(self) -> None:
        for batch_idx in range(self.batches):
            if self.global_step == self.crash_at:
                raise RuntimeError("crash")
            last = batch_idx + 1 == self.batches
            self.total_batches += 1
            self.global_step += last or (batch_idx + 1) % self.accumulate == 0
            if self.log_train:
                self.log("tl", self.global_step)
            self.validation_due = self.enable_validation and self.due(batch_idx, last)
            self.call("on_train_batch_end", None, None, batch_idx)
            if self.validation_due:
                self.log("vl", self.scores.pop(0) if self.scores else self.global_step)
                self.call("on_validation_end")
            self.validation_due = False
        if self.log_train:
            self.log("te", self.global_step)
        self.call("on_train_epoch_end")

    def due(self, batch_idx: int, last: bool) -> bool:
        every, interval = self.check_val_every_n_epoch, self.val_check_interval
        if every is None:
            return self.total_batches % int(interval) == 0
        if (self.current_epoch + 1) % every:
            return False
        return last if interval == 1.0 else (batch_idx + 1) % int(interval if interval > 1 else self.batches * interval) == 0


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    """Run ``fit`` with one callback or several, in the test's folder."""

    def train(callbacks: Any, **options: Any) -> Run:
        return Run(callbacks if isinstance(callbacks, list) else [callbacks], options.pop("root", tmp_path), **options).fit()

    return train


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Run]:
    """The run of ``train``, not yet started."""

    def prepare(callbacks: Any, **options: Any) -> Run:
        return Run(callbacks if isinstance(callbacks, list) else [callbacks], options.pop("root", tmp_path), **options)

    return prepare
