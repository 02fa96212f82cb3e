"""The host waits for the GPU in no setting: callbacks that stop, save and measure, in every precision, one by one and all at once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import lightning.pytorch as L
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger

from .common import Check, Place, batches
from .compiled import Task
from .running_ahead import STEP_AND_EPOCH, EagerBar, Guard, Rows

EPOCHS, COUNT = 3, 12


class Between(Guard):
    """Raises where the host waits for the GPU, in all batches but an epoch's first, up to the validation after them."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.guarded += batch_idx > 0
        self.place.sync_errors(batch_idx > 0)

    def on_validation_start(self, *_: Any) -> None:
        self.place.sync_errors(False)

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        pass

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        pass


class SlowRows(Rows):
    """A logger that takes its time for each row."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        time.sleep(0.02)
        super().log_metrics(metrics, step)


def early_stopping() -> Callback:
    return EarlyStopping("val_loss", patience=100)


def early_stopping_by_training() -> Callback:
    return EarlyStopping("loss_epoch", patience=100, check_on_train_epoch_end=True)


def throughput() -> Callback:
    return ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=4)


def best() -> Callback:
    return ModelCheckpoint(monitor="val_loss", save_top_k=2, every_n_epochs=1)


def windows() -> Callback:
    return GradientAccumulationScheduler({0: 1, 1: 3})


def timer() -> Callback:
    return Timer(duration="00:01:00:00")


NORM = {"gradient_clip_val": 0.5}
VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
OFTEN = {"val_check_interval": 4}
FOUR = {"accumulate_grad_batches": 4}
ALL = [early_stopping, LearningRateMonitor, throughput, best, timer]

# What: (precision, arguments of the trainer, makers of callbacks, progress bar, loggers)
SETTINGS: dict[str, tuple[str, dict[str, Any], list[Callable[[], Callback]], bool, bool]] = {
    "EarlyStopping between validations": ("32-true", OFTEN, [early_stopping], False, False),
    "EarlyStopping by a value of training": ("32-true", {}, [early_stopping_by_training], False, False),
    "ModelCheckpoint by a value of validation": ("32-true", OFTEN, [best], False, False),
    "LearningRateMonitor": ("32-true", {}, [LearningRateMonitor], False, True),
    "ThroughputMonitor": ("bf16-mixed", {}, [throughput], False, True),
    "Timer": ("32-true", {}, [timer], False, False),
    "GradientAccumulationScheduler": ("32-true", NORM, [windows], False, False),
    "16-mixed, clipping by value": ("16-mixed", VALUE, [], False, False),
    "16-mixed, accumulation": ("16-mixed", FOUR, [], False, False),
    "16-mixed, accumulation, clipping by norm": ("16-mixed", {**FOUR, **NORM}, [], False, False),
    "bf16-mixed, accumulation, clipping by value": ("bf16-mixed", {**FOUR, **VALUE}, [], False, False),
    "bf16-true, clipping by norm": ("bf16-true", NORM, [], False, False),
    "progress bar, validation between": ("32-true", OFTEN, [], True, False),
    "garbage on a schedule": ("32-true", {"gc_interval": 3}, [], False, True),
    "a slow logger": ("32-true", {}, [], False, True),
    'compile="default"': ("32-true", {"compile": "default", **NORM}, [], False, True),
    "all, 32-true": ("32-true", {**OFTEN, **FOUR, **NORM}, ALL, True, True),
    "all, bf16-mixed": ("bf16-mixed", {**OFTEN, **FOUR, **NORM}, ALL, True, True),
    "all, 16-mixed": ("16-mixed", {**OFTEN, **FOUR, **NORM}, ALL, True, True),
    "all, rich": ("32-true", {**OFTEN, **NORM}, ALL, True, True),
}  # fmt: skip


def checks(place: Place) -> list[Check]:
    return [(f"no read from the device, {name}", lambda n=name: no_read(place, n)) for name in SETTINGS]


def no_read(place: Place, name: str) -> str:
    precision, options, callbacks, bar, logs = SETTINGS[name]
    if options.get("compile") and not place.is_cuda:
        options = {**options, "compile": {"backend": "aot_eager"}}  # a compiler for the CPU takes its time
    guard, rows = Between(place), (SlowRows if "slow" in name else Rows)()
    found = [guard, *(make() for make in callbacks)]
    if bar:
        found.append(RichProgressBar() if "rich" in name else EagerBar())
    torch.manual_seed(0)
    module = Task(log=STEP_AND_EPOCH, schedule="step", flags={"fused": True})
    with tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] = {"logger": [rows, CSVLogger(folder)], "log_every_n_steps": 3} if logs else {}
        more |= {"enable_checkpointing": best in callbacks, "enable_progress_bar": bar, "default_root_dir": folder, "max_epochs": EPOCHS}
        trainer = place.trainer(precision, callbacks=found, **{**options, **more})
        trainer.fit(module, batches(COUNT, pin=place.is_cuda), batches(2, pin=place.is_cuda))
    assert guard.guarded == EPOCHS * (COUNT - 1), guard.guarded
    assert bool(rows.rows) == logs
    return f"{guard.guarded} steps" + (f", {len(rows.rows)} rows" if logs else "")
