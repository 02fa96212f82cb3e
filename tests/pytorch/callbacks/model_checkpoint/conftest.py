"""``train``: a run of a few batches, small enough to say what every number in it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.pytorch import LightningModule, Trainer


class Counting(LightningModule):
    """Its only weight is the number of optimizer steps taken.

    Validation logs ``vl``: the next of ``scores``, or the weight. With ``log_train`` each batch logs ``tl``, the first of an epoch
    ``rare``, and the end of an epoch ``te``: the weight as well.
    """

    def __init__(self, scores: list[float], log_train: bool, crash_at: int | None) -> None:
        super().__init__()
        self.scores, self.log_train, self.crash_at = list(scores), log_train, crash_at
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.crash_at:
            raise RuntimeError("crash")
        if self.log_train:
            self.log("tl", self.trainer.global_step + 1.0)
            if batch_idx == 0:
                self.log("rare", self.trainer.global_step + 1.0)
        return -self.weight

    def on_train_epoch_end(self) -> None:
        if self.log_train:
            self.log("te", self.weight.detach())

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self.log("vl", self.scores.pop(0) if self.scores else self.weight.detach(), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Run:
    """A trainer that is ready to fit, and what it saved."""

    def __init__(
        self,
        callbacks: list[Any],
        root: Path,
        batches: int = 4,
        validate: bool = True,
        scores: list[float] | None = None,
        log_train: bool = False,
        crash_at: int | None = None,
        ckpt_path: str | None = None,
        before_save: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        self.callbacks, self.root, self.ckpt_path, self.before_save = callbacks, root, ckpt_path, before_save
        self.model = Counting(scores or [], log_train, crash_at)
        self.loaders = range(batches), range(1)
        unvalidated = {} if validate else {"limit_val_batches": 0}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        given = {"max_epochs": 3, "accelerator": "cpu", "default_root_dir": root, **quiet, **unvalidated, **options}
        self.trainer = Trainer(callbacks=list(callbacks), **given)
        self.saves: list[tuple[int, str]] = []
        self._save = self.trainer.save_checkpoint
        self.trainer.save_checkpoint = self.save  # type: ignore[method-assign]

    def save(self, path: str, *arguments: Any) -> None:
        if self.before_save is not None:
            self.before_save(path)
        self._save(path, *arguments)
        self.saves.append((self.trainer.global_step, os.path.basename(path)))

    def fit(self) -> Run:
        self.trainer.fit(self.model, *self.loaders, ckpt_path=self.ckpt_path)
        return self

    def setup(self, stage: str) -> None:
        """Only what callbacks do before a run."""
        for callback in self.callbacks:
            callback.setup(self.trainer, self.model, stage)

    @property
    def files(self) -> list[str]:
        """All files and links below the root, links with their target."""
        paths = [path for path in self.root.rglob("*") if path.is_symlink() or path.is_file()]
        return sorted(f"{path.relative_to(self.root)}" + (f" -> {os.readlink(path)}" if path.is_symlink() else "") for path in paths)

    def steps_in(self, name: str) -> int:
        """The number of optimizer steps of the weights in a file."""
        return int(torch.load(self.root / name, weights_only=True)["state_dict"]["weight"])


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Run]:
    """A run with one callback or several, in the test's folder, not yet started."""

    def prepare(callbacks: Any, **options: Any) -> Run:
        return Run(callbacks if isinstance(callbacks, list) else [callbacks], options.pop("root", tmp_path), **options)

    return prepare


@pytest.fixture
def train(prepare: Callable[..., Run]) -> Callable[..., Run]:
    """The same, done."""

    def train(callbacks: Any, **options: Any) -> Run:
        return prepare(callbacks, **options).fit()

    return train
