"""A stand-in that calls a bar's hooks in the trainer's order, and a terminal that shows what was written to it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Run:
    """Runs a bar through fit, validate, test or predict: five training batches an epoch, three validation batches."""

    def __init__(self, bar: Any, fn: str = "fit", batches: float = 5, loaders: int = 1, epochs: int = 2) -> None:
        sizes = [math.inf if batches == math.inf else 3] * loaders
        self.bar, self.fn, self.loaders, self.epochs = bar, fn, loaders, epochs
        self.per_epoch = 5 if batches == math.inf else int(batches)
        self.at: Callable[[str], None] = lambda event: None
        self.trainer: Any = SimpleNamespace(
            is_global_zero=True,
            loggers=[],
            progress_bar_metrics={},
            num_training_batches=batches,
            max_steps=-1,
            num_val_batches=sizes,
            num_test_batches=sizes,
            num_predict_batches=sizes,
            num_sanity_val_batches=[2] * loaders,
            sanity_checking=False,
            state=SimpleNamespace(fn=fn),
            check_val_every_n_epoch=1,
            current_epoch=0,
            enable_validation=True,
            max_epochs=epochs,
            lightning_module=None,
            progress_bar_callback=bar,
        )

    def __call__(self, first_batch: int = 0) -> Run:
        bar, trainer = self.bar, self.trainer
        bar.setup(trainer, None, self.fn)
        try:
            if self.fn == "fit":
                self.fit(first_batch)
            else:
                self.evaluate("validation" if self.fn == "validate" else self.fn)
        except RuntimeError as error:
            bar.on_exception(trainer, None, error)
        bar.teardown(trainer, None, self.fn)
        return self

    def fit(self, first_batch: int) -> None:
        bar, trainer = self.bar, self.trainer
        if not first_batch:
            bar.on_sanity_check_start(trainer, None)
            self.evaluate("validation", sanity=True)
            bar.on_sanity_check_end(trainer, None)
        bar.on_train_start(trainer, None)
        for trainer.current_epoch in range(self.epochs):
            if not first_batch:
                bar.on_train_epoch_start(trainer, None)
            for batch_idx in range(first_batch, self.per_epoch):
                self.at(f"train {batch_idx}")
                trainer.progress_bar_metrics["loss"] = batch_idx + 0.5
                bar.on_train_batch_end(trainer, None, None, None, batch_idx)
            first_batch = 0
            self.evaluate("validation")
            trainer.progress_bar_metrics["loss_epoch"] = 7.0
            bar.on_train_epoch_end(trainer, None)
            trainer.progress_bar_metrics["late"] = 9.0
            self.at("epoch end")
        bar.on_train_end(trainer, None)

    def evaluate(self, kind: str, sanity: bool = False) -> None:
        bar, trainer = self.bar, self.trainer
        trainer.sanity_checking = sanity
        getattr(bar, f"on_{kind}_start")(trainer, None)
        for loader in range(self.loaders):
            for batch_idx in range(2 if sanity else 3):
                getattr(bar, f"on_{kind}_batch_start")(trainer, None, None, batch_idx, loader)
                self.at(f"{kind} {loader} {batch_idx}")
                getattr(bar, f"on_{kind}_batch_end")(trainer, None, None, None, batch_idx, loader)
        if not sanity and kind == "validation":
            trainer.progress_bar_metrics["val"] = 1.0
        getattr(bar, f"on_{kind}_end")(trainer, None)
        trainer.sanity_checking = False


def render(text: str) -> list[str]:
    """The lines that a terminal shows after ``text`` was written to it, the empty ones at the end left out."""
    lines: list[list[str]] = [[]]
    row = column = position = 0
    while position < len(text):
        char = text[position]
        if char == "\x1b":
            match = ESCAPE.match(text, position)
            assert match, f"unknown escape sequence at {text[position : position + 8]!r}"
            if match[2] == "A":
                row -= int(match[1] or 1)
            elif match[2] == "K":
                lines[row] = []
            position = match.end()
            continue
        if char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
        else:
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = char
            column += 1
        while len(lines) <= row:
            lines.append([])
        position += 1
    shown = ["".join(line).rstrip() for line in lines]
    while shown and not shown[-1]:
        shown.pop()
    return shown


@pytest.fixture
def run() -> type[Run]:
    return Run


@pytest.fixture
def rendered() -> Callable[[str], list[str]]:
    return render


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """What a terminal shows of all that was printed since the last look."""
    return lambda: render(capsys.readouterr().out)
