"""What a step costs does not depend on what has been before it: lines of the package that are executed, counted.

Lines, for a loop over what has gathered takes more of them, though it may call nothing. ``benchmarks/scaling.py`` draws the same in time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger

PACKAGE = str(Path(lightning.__file__).parent)
pytestmark = pytest.mark.filterwarnings("ignore")  # of small runs


class Lines:
    """A trace function that counts the lines of the package that this thread executes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self.note if frame.f_code.co_filename.startswith(PACKAGE) else None

    def note(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.count += event == "line"
        return self.note


class Rows(Logger):
    """A logger that drops its rows, at once."""

    name, version, called_in_background = "rows", 0, False  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Model(LightningModule):
    """Logs one name in each step, and some more in the first."""

    def __init__(self, names: int = 0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.names, self.lines, self.per_step, self.last = names, Lines(), list[int](), 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).sum()
        if self.trainer.global_step == 0:
            for index in range(self.names):
                self.log(f"name_{index}", loss, on_step=True, on_epoch=True, prog_bar=False)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.per_step.append(self.lines.count - self.last)
        self.last = self.lines.count
        return loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validation", self.layer(batch).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def batches(count: int) -> Any:
    return DataLoader([torch.ones(3, 2)] * count, batch_size=None)  # type: ignore[arg-type]


def lines_of(model: Model, steps: int, epochs: int = 1, callbacks: tuple[Any, ...] = (), validates: bool = False) -> list[int]:
    """The lines of the package from each training step to the next, with a progress bar and rows that come often."""
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=Rows(), enable_model_summary=False, log_every_n_steps=5, num_sanity_val_steps=0,
        callbacks=[TQDMProgressBar(refresh_rate=5), *callbacks], enable_checkpointing=saves,
    )  # fmt: skip
    outer = sys.gettrace()
    sys.settrace(model.lines)
    try:
        trainer.fit(model, batches(steps), batches(2) if validates else None)
    finally:
        sys.settrace(outer)
    assert len(model.per_step) == steps * epochs
    return model.per_step


def between(lines: list[int], start: int, count: int = 20) -> int:
    """The lines of some steps, of which some send rows and draw the bar."""
    return sum(lines[start : start + count])


def test_steps_cost_as_much_late_as_early() -> None:
    lines = lines_of(Model(), 600)
    assert between(lines, 20) == pytest.approx(between(lines, 560), rel=0.02)


def test_epochs_cost_as_much_late_as_early() -> None:
    lines = lines_of(Model(), 10, epochs=40, validates=True)
    assert between(lines, 40) == pytest.approx(between(lines, 360), rel=0.02)


def test_names_that_earlier_epochs_logged_cost_nothing() -> None:
    without, with_many = lines_of(Model(), 30, epochs=3), lines_of(Model(200), 30, epochs=3)
    assert between(with_many, 65) == pytest.approx(between(without, 65), rel=0.02)


def test_callbacks_that_override_nothing_cost_nothing() -> None:
    class Idle(Callback):
        def __init__(self, index: int) -> None:
            self.index = index

        @property
        def state_key(self) -> str:
            return f"Idle{self.index}"

    without, with_many = lines_of(Model(), 60), lines_of(Model(), 60, callbacks=tuple(Idle(index) for index in range(200)))
    assert between(with_many, 30) == pytest.approx(between(without, 30), rel=0.02)


def test_a_checkpoint_costs_as_much_however_many_are_kept() -> None:
    keeping = ModelCheckpoint("kept", save_top_k=-1, every_n_train_steps=2, filename="{step}")
    lines = lines_of(Model(), 200, callbacks=(keeping,))
    assert len(list(Path("kept").iterdir())) >= 100
    assert between(lines, 20) == pytest.approx(between(lines, 170), rel=0.02)


def test_one_more_of_the_best_checkpoints_costs_a_few_lines() -> None:
    best = ModelCheckpoint("best", monitor="loss_step", save_top_k=1000, every_n_train_steps=2, filename="{step}")
    lines = lines_of(Model(), 200, callbacks=(best,))
    more = (between(lines, 170) - between(lines, 20)) / 10  # for a save, when 75 more are kept
    assert more / 75 <= 40
