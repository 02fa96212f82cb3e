"""Timer: durations, what it measures, and when it stops a run."""

from __future__ import annotations

import logging
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import timer as timer_module
from lightning.pytorch.callbacks.timer import Interval, Timer
from lightning.pytorch.trainer.states import RunningStage


class Clock:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timer_module.time, "monotonic", clock)
    return clock


def stand_in() -> SimpleNamespace:
    """What Timer asks of a trainer."""
    strategy = SimpleNamespace(broadcast=lambda obj, src=0: obj, world_size=1)
    return SimpleNamespace(is_global_zero=True, sanity_checking=False, should_stop=False, strategy=strategy)


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (None, None),
        ("00:00:00:05", 5.0),
        ("01:02:03:04", 93784.0),
        ("00:25:00:99", 90099.0),
        ("365:00:00:00", 31536000.0),
        (timedelta(minutes=2), 120.0),
        ({"minutes": 1, "seconds": 30}, 90.0),
        (timedelta(0), 0.0),
    ],
)
def test_duration_is_understood(duration: Any, seconds: float | None) -> None:
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("duration", ["1:2:3:4", "00:00:05", "aa:00:00:00", "", "00:00:00:1.5", 5, 5.0, ["00:00:00:05"]])
def test_duration_of_another_form_is_refused(duration: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"Timer\(duration=.*DD:HH:MM:SS"):
        Timer(duration)


def test_duration_dict_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(TypeError, match=r"'fortnights': 1.*weeks, days"):
        Timer({"fortnights": 1})


@pytest.mark.parametrize("interval", ["batch", "", None, 3])
def test_interval_of_another_form_is_refused(interval: Any) -> None:
    with pytest.raises(MisconfigurationException, match="'step' or 'epoch'"):
        Timer(interval=interval)


def test_interval_is_a_string_enum() -> None:
    assert Interval.step == "step"
    assert Interval("epoch") is Interval.epoch


def test_nothing_is_measured_before_the_start() -> None:
    timer = Timer("00:00:01:00")
    assert timer.start_time() is None
    assert timer.end_time() is None
    assert timer.time_elapsed() == 0
    assert timer.time_remaining() == 60
    with pytest.raises(ValueError, match="fitting"):
        timer.time_elapsed("fitting")


@pytest.mark.parametrize(
    ("stage", "start", "end"),
    [
        ("train", "on_train_start", "on_train_end"),
        ("validate", "on_validation_start", "on_validation_end"),
        ("test", "on_test_start", "on_test_end"),
        ("predict", "on_predict_start", "on_predict_end"),
        ("sanity_check", "on_sanity_check_start", "on_sanity_check_end"),
    ],
)
def test_each_stage_is_measured(clock: Clock, stage: str, start: str, end: str) -> None:
    timer, trainer = Timer("00:00:01:00"), stand_in()
    getattr(timer, start)(trainer, None)
    clock.now = 107.0
    assert (timer.start_time(stage), timer.end_time(stage)) == (100.0, None)
    assert timer.time_elapsed(RunningStage(stage)) == 7.0
    assert timer.time_remaining(stage) == 53.0
    getattr(timer, end)(trainer, None)
    clock.now = 200.0
    assert timer.end_time(stage) == 107.0
    assert timer.time_elapsed(stage) == 7.0
    assert [other for other in RunningStage if timer.time_elapsed(other)] == [stage]


def test_validation_hooks_of_the_sanity_check_are_not_validation(clock: Clock) -> None:
    timer, trainer = Timer(), stand_in()
    trainer.sanity_checking = True
    timer.on_validation_start(trainer, None)
    timer.on_validation_end(trainer, None)
    assert timer.start_time("validate") is None
    assert timer.end_time("validate") is None


def test_second_run_of_a_stage_is_measured_afresh(clock: Clock) -> None:
    timer, trainer = Timer(), stand_in()
    timer.on_train_start(trainer, None)
    clock.now = 110.0
    timer.on_train_end(trainer, None)
    clock.now = 150.0
    timer.on_train_start(trainer, None)
    clock.now = 153.0
    assert timer.end_time() is None
    assert timer.time_elapsed() == 3.0


def test_interrupted_stage_does_not_run_on(clock: Clock) -> None:
    timer, trainer = Timer(), stand_in()
    timer.on_train_start(trainer, None)
    clock.now = 110.0
    timer.on_exception(trainer, None, KeyboardInterrupt())
    clock.now = 999.0
    assert timer.time_elapsed() == 10.0


@pytest.mark.parametrize(("interval", "hook"), [("step", "on_train_batch_end"), ("epoch", "on_train_epoch_end")])
def test_stop_comes_when_the_time_is_up(clock: Clock, interval: str, hook: str) -> None:
    timer, trainer = Timer("00:00:00:10", interval=interval), stand_in()
    other = {"on_train_batch_end": "on_train_epoch_end", "on_train_epoch_end": "on_train_batch_end"}[hook]
    timer.on_fit_start(trainer, None)
    timer.on_train_start(trainer, None)
    clock.now = 109.9
    getattr(timer, hook)(trainer, None)
    assert not trainer.should_stop
    clock.now = 110.0
    getattr(timer, other)(trainer, None)
    assert not trainer.should_stop
    getattr(timer, hook)(trainer, None)
    assert trainer.should_stop


def test_stop_is_decided_by_rank_zero(clock: Clock) -> None:
    timer, trainer = Timer("00:00:00:10"), stand_in()
    trainer.strategy.world_size = 2
    trainer.strategy.broadcast = lambda obj, src=0: (True, 0)
    timer.on_train_batch_end(trainer, None)
    assert trainer.should_stop


def test_several_processes_look_at_the_clock_once_a_second_and_more_often_towards_the_end(clock: Clock) -> None:
    timer, trainer, looks = Timer("00:00:00:10"), stand_in(), []
    trainer.strategy.world_size = 2
    trainer.strategy.broadcast = lambda obj, src=0: looks.append(clock.now) or obj
    timer.on_fit_start(trainer)
    timer.on_train_start(trainer, None)
    steps = 0
    while not trainer.should_stop:
        clock.now += 0.05
        steps += 1
        timer.on_train_batch_end(trainer, None)
    assert steps == pytest.approx(200, abs=1)
    assert len(looks) < 40
    assert max(later - earlier for earlier, later in pairwise(looks)) <= 1.1


def test_no_stop_without_a_duration(clock: Clock) -> None:
    timer, trainer = Timer(), stand_in()
    timer.on_fit_start(trainer, None)
    timer.on_train_start(trainer, None)
    clock.now = 1e9
    timer.on_train_batch_end(trainer, None)
    timer.on_train_epoch_end(trainer, None)
    assert not trainer.should_stop
    assert timer.time_remaining() is None


def test_training_time_survives_a_restart(clock: Clock) -> None:
    first, trainer = Timer("00:00:00:10"), stand_in()
    first.on_train_start(trainer, None)
    clock.now = 106.0
    state = first.state_dict()
    assert state["time_elapsed"] == {"train": 6.0, "sanity_check": 0, "validate": 0, "test": 0, "predict": 0}

    second = Timer("00:00:00:10")
    second.load_state_dict(state)
    assert second.time_remaining() == 4.0
    second.on_train_start(trainer, None)
    clock.now = 109.0
    assert second.time_elapsed() == 9.0
    assert second.time_elapsed("validate") == 0


def test_run_that_resumes_with_its_time_used_up_stops_at_once(clock: Clock) -> None:
    timer, trainer = Timer("00:00:00:10", interval="epoch"), stand_in()
    timer.load_state_dict({"time_elapsed": {"train": 11.0}})
    timer.on_fit_start(trainer, None)
    assert trainer.should_stop


@pytest.mark.parametrize(("verbose", "messages"), [(True, 1), (False, 0)])
def test_message_is_logged_once(clock: Clock, caplog: pytest.LogCaptureFixture, verbose: bool, messages: int) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.callbacks.timer")
    timer, trainer = Timer("00:00:00:10", verbose=verbose), stand_in()
    timer.on_train_start(trainer, None)
    clock.now = 171.5
    for _ in range(3):
        trainer.should_stop = False
        timer.on_train_batch_end(trainer, None)
    assert caplog.messages == ["Time limit reached. Elapsed time is 0:01:11. Signaling Trainer to stop."] * messages


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize(("interval", "settings", "steps"), [("step", {}, 3), ("epoch", {}, 4), ("step", {"min_epochs": 3}, 12)])
def test_run_ends_when_the_time_is_up(clock: Clock, interval: str, settings: dict[str, Any], steps: int) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Model(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.now += 1
            return super().training_step(batch, batch_idx)

    timer = Timer("00:00:00:03", interval=interval)
    trainer = Trainer(callbacks=timer, max_epochs=5, limit_train_batches=4, limit_val_batches=1, **settings, **QUIET)
    trainer.fit(Model())
    assert trainer.global_step == steps
    assert timer.time_elapsed() == steps
    assert timer.start_time("validate") is not None


def test_resumed_run_has_the_rest_of_the_time(clock: Clock) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Model(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.now += 1
            return super().training_step(batch, batch_idx)

    limits = {"limit_train_batches": 4, "limit_val_batches": 0}
    first = Trainer(callbacks=Timer("00:00:00:07"), max_epochs=1, **limits, **QUIET)
    first.fit(Model())
    first.save_checkpoint("one-epoch.ckpt")
    for rest, steps in (("00:00:00:07", 7), ("00:00:00:04", 4)):
        second = Trainer(callbacks=Timer(rest), max_epochs=9, **limits, **QUIET)
        second.fit(Model(), ckpt_path="one-epoch.ckpt")
        assert second.global_step == steps
