"""EpochTimes: what each part of an epoch counts for, the line, the rows, and a device that is behind."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from simulated_device import Event, World

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import EpochTimes
from lightning.pytorch.profilers import epoch as module
from lightning.pytorch.profilers.epoch import CATEGORIES, _Device, _Epoch, category_of, line

LONG = 0.2  # seconds that are slept


class Slow(Dataset[Tensor]):
    """One sample of two takes its time, if it is told to."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.seconds * index)
        return torch.tensor([float(index)])

    def __len__(self) -> int:
        return 2


class Sleeper(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        time.sleep(LONG / 2)


@pytest.mark.parametrize("where", ["data_wait", "copy", "compute", "hooks", "validation", "checkpoint", "logging", "optimizer", "val_data"])
def test_a_slow_part_counts_for_what_it_is(Evaluated: Any, make_trainer: Any, Rows: Any, where: str, tmp_path: Path) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            time.sleep(LONG / 2 if where == "copy" and self.trainer.training else 0)
            return batch

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            time.sleep(LONG / 2 if where == "compute" else 0)
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            time.sleep(LONG if where == "validation" else 0)

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            time.sleep(LONG if where == "checkpoint" else 0)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(LONG / 2 if where == "optimizer" else 0)
            super().optimizer_step(*args, **kwargs)

    class Logger(Rows):  # type: ignore[misc]
        called_in_background = False

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            time.sleep(LONG / 2 if where == "logging" else 0)

    callbacks: list[Any] = [ModelCheckpoint(tmp_path, every_n_train_steps=2)]
    trainer = make_trainer(
        profiler="epoch",
        logger=Logger(),
        enable_checkpointing=True,
        callbacks=[*callbacks, Sleeper()] if where == "hooks" else callbacks,
    )
    trainer.fit(Model(), DataLoader(Slow(LONG if where == "data_wait" else 0)), DataLoader(Slow(LONG if where == "val_data" else 0)))
    (times,) = trainer.profiler.times
    expected = {"optimizer": "compute", "val_data": "validation"}.get(where, where)
    assert times[expected] >= LONG
    assert all(times[name] < times["whole"] - LONG * 0.99 for name in CATEGORIES if name != expected)  # it counts once
    assert sum(times[name] for name in CATEGORIES) == pytest.approx(times["whole"])
    assert times["epoch"] == 0


def test_a_line_for_each_epoch(Weight: Any, make_trainer: Any, numbers: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = make_trainer(max_epochs=2, profiler="epoch")
    trainer.fit(Weight(), numbers(2))
    lines = [record.getMessage() for record in caplog.records if "of which" in record.getMessage()]
    assert [text.split(":")[0] for text in lines] == ["Epoch 0", "Epoch 1"]
    assert "compute" in lines[0]
    assert "validation" not in lines[0]
    assert lines == [line(times) for times in trainer.profiler.times]


def test_loggers_get_the_times_on_request(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    for asked in (False, True):
        rows = Rows()
        make_trainer(max_epochs=2, logger=rows, profiler=EpochTimes(to_loggers=asked)).fit(Weight(), numbers(3))
        assert [step for step, _ in rows.of("epoch_time/data_wait")] == ([2, 5] if asked else [])
        assert [row["epoch"] for _, row in rows.rows] == ([0, 1] if asked else [])


def test_a_file_gets_the_lines_of_the_run(Weight: Any, make_trainer: Any, numbers: Any, tmp_path: Path) -> None:
    make_trainer(max_epochs=2, profiler=EpochTimes(dirpath=tmp_path, filename="times")).fit(Weight(), numbers(2))
    text = (tmp_path / "fit-times.txt").read_text(encoding="utf-8")
    assert [part.split(":")[0] for part in text.splitlines()] == ["Epoch 0", "Epoch 1"]


def test_other_tasks_have_no_epochs(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer(profiler="epoch")
    trainer.validate(Evaluated(), numbers(2))
    trainer.predict(Evaluated(), numbers(2))
    assert trainer.profiler.times == []


def test_a_run_that_fails_leaves_a_profiler_that_works(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Failing(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("no")

    profiler = EpochTimes()
    with pytest.raises(RuntimeError, match="no"):
        make_trainer(profiler=profiler).fit(Failing(), numbers(2))
    assert profiler.times == []
    make_trainer(profiler=profiler).fit(Weight(), numbers(2))
    (times,) = profiler.times
    assert times["compute"] > 0


def test_an_error_within_an_epoch_that_somebody_catches_loses_no_time() -> None:
    profiler = EpochTimes()
    with profiler.profile("run_training_epoch"):
        for _ in range(2):
            with suppress(ValueError), profiler.profile("run_training_batch"), profiler.profile("[Strategy]X.backward"):
                raise ValueError
    (times,) = profiler.times
    assert times["compute"] > 0
    assert sum(times[name] for name in CATEGORIES) == pytest.approx(times["whole"])


@pytest.mark.parametrize(
    ("action", "category"),
    [
        ("[Strategy]DDPStrategy.batch_to_device", "copy"),
        ("[LightningDataModule]Data.on_before_batch_transfer", "copy"),
        ("[Strategy]DDPStrategy.backward", None),
        ("[LightningModule]Model.optimizer_step", None),
        ("[LightningModule]Model.on_train_batch_end", "hooks"),
        ("[Callback]ModelCheckpoint{'monitor': None, 'mode': 'min'}.on_train_batch_end", "hooks"),
        ("[_EvaluationLoop].val_next", None),
        ("of the user's own", None),
    ],
)
def test_actions_count_for_a_category_or_what_they_run_within(action: str, category: str | None) -> None:
    assert category_of(action) == category


def test_times_are_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    profiler = EpochTimes()

    def run(*actions: Any) -> None:
        for action in actions:
            if isinstance(action, tuple):
                with profiler.profile(action[0]):
                    run(*action[1:])
            else:
                now[0] += action

    saved = ("save_checkpoint", 16.0, ("[Callback]X.on_save_checkpoint", 32.0))
    step = ("run_training_batch", 2.0, ("[Callback]X.on_after_backward", 4.0))
    validation = ("run_validation", 8.0, ("[Strategy]X.batch_to_device", 64.0), ("[Callback]X.on_validation_end", 128.0, saved))
    epoch = ("run_training_epoch", 1.0, step, validation, ("log_metrics", 256.0), 512.0)
    run(1000.0, ("[Callback]X.on_train_start", 1000.0), epoch, 1000.0)
    assert profiler.times == [
        {"epoch": 0, "whole": 1023.0, "data_wait": 0.0, "copy": 0.0, "compute": 2.0, "hooks": 4.0, "logging": 256.0, "checkpoint": 48.0,
         "validation": 200.0, "other": 513.0},
    ]  # fmt: skip


def test_the_line_names_the_longest_first() -> None:
    times = {"epoch": 3, "whole": 100.0, **dict.fromkeys(CATEGORIES, 0.0), "compute": 20.5, "data_wait": 69.5, "device_wait": 10.0}
    assert line({**times, "device_steps": 25.0, "data_wait_idle": 60.0}) == (
        "Epoch 3: 100 s, of which data wait 69.5 s (70 %), compute 20.5 s (20 %), waiting for the GPU 10 s (10 %). "
        "The GPU took 25 s (25 %) for the steps, and had nothing to do in 60 s of the data wait."
    )


# ---- a device that is behind ------------------------------------------------------------------------------------------


class SimulatedDevice(_Device):
    def _event(self) -> Any:
        return Event(self._stream)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(module.time, "perf_counter", lambda: world.now)
    return world


def epoch_of(world: World, profiler: EpochTimes, data: float, step: float, device: float, validation: float = 0.0) -> dict[str, float]:
    """An epoch of ten steps, at whose end values are read."""
    with profiler.profile("run_training_epoch"):
        for _ in range(10):
            with profiler.profile("[_TrainingEpochLoop].train_dataloader_next"):
                world.now += data
            with profiler.profile("run_training_batch"):
                world.launch(device)
                world.now += step
            with profiler.profile("log_metrics"):
                world.now += 0.125  # nobody waits
        if validation:
            with profiler.profile("run_validation"):
                world.launch(validation)
                world.synchronize()
        with profiler.profile("log_metrics"):
            world.synchronize()
    return profiler.times[-1]


@pytest.fixture
def simulated(world: World) -> EpochTimes:
    profiler = EpochTimes()
    profiler._device = SimulatedDevice(world)
    return profiler


def parts(times: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in times.items() if seconds and name not in ("epoch", "whole")}


def test_a_host_that_runs_ahead_waits_for_the_device_and_not_for_the_loggers(world: World, simulated: EpochTimes) -> None:
    for _ in range(2):
        times = epoch_of(world, simulated, data=0.5, step=1.0, device=10.0)
        assert parts(times) == {
            "data_wait": 5.0, "compute": 10.0, "logging": 1.25, "device_wait": 84.25, "device_steps": 100.0, "data_wait_idle": 0.5,
        }  # fmt: skip
        assert times["whole"] == 100.5
    assert world.waited == 0


def test_the_wait_for_data_is_idle_where_the_device_is_done(world: World, simulated: EpochTimes) -> None:
    times = epoch_of(world, simulated, data=10.0, step=0.125, device=1.0)
    assert parts(times) == {
        "data_wait": 100.0, "compute": 1.25, "logging": 1.25 , "device_wait": 0.75, "device_steps": 10.0,
        "data_wait_idle": 10.0 + 9 * 9.25,
    }  # fmt: skip


def test_validation_begins_when_the_device_comes_to_it(world: World, simulated: EpochTimes) -> None:
    times = epoch_of(world, simulated, data=0.5, step=1.0, device=10.0, validation=30.0)
    assert parts(times)["validation"] == 30.0
    assert parts(times)["device_wait"] == 84.25


def test_a_line_waits_for_the_events_and_nobody_else_does(world: World, simulated: EpochTimes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with simulated.profile("run_training_epoch"):
        for _ in range(3):
            with simulated.profile("run_training_batch"):
                world.launch(10.0)
    assert caplog.messages == []
    assert "device_steps" not in simulated.times[0]
    world.now += 100.0
    with simulated.profile("run_training_epoch"), simulated.profile("run_training_batch"):
        world.launch(10.0)
    assert ["Epoch 0: 0 s" in message and "GPU took 30 s" in message for message in caplog.messages] == [True]
    assert world.waited == 0
    simulated.describe()  # at the end of the run
    assert len(caplog.messages) == 2
    assert world.waited == 1


def test_events_are_used_again_and_steps_do_not_pile_up(world: World, simulated: EpochTimes) -> None:
    with simulated.profile("run_training_epoch"):
        for _ in range(1000):
            with simulated.profile("run_training_batch"):
                world.launch(1.0)
            world.now += 1.0
    assert len(simulated._device._free) <= 4  # type: ignore[union-attr]


def test_rows_for_loggers_come_when_the_device_has_come_so_far(world: World) -> None:
    device = SimulatedDevice(world)
    device.begin(world.now)
    world.launch(4.0)
    device.end()
    steps = device.take()
    epoch = _Epoch({"epoch": 0, "whole": 10.0, **dict.fromkeys(CATEGORIES, 0.0)}, steps)
    assert not epoch.ready()
    world.now += 4.0
    assert epoch.ready()
    assert epoch.read()["epoch_time/device_steps"] == 4.0
