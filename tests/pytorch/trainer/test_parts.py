"""The parts that a trainer brings when nobody gives them, and those that contradict each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.profilers import PassThroughProfiler, Profiler, SimpleProfiler
from lightning.pytorch.trainer import parts

MakeTrainer = Callable[..., Any]


def made(**arguments: Any) -> Any:
    """A trainer with all its defaults but those given."""
    return Trainer(accelerator="cpu", **{"logger": False, **arguments})


def kinds(**arguments: Any) -> list[str]:
    return [type(callback).__name__ for callback in made(**arguments).callbacks]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make packages look as if they were not installed."""
    there = parts.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(parts, "find_spec", lambda name: None if name in names else there(name))

    return hide


class Mine(Callback):
    pass


# ---- callbacks -------------------------------------------------------------------------------------------------------


def test_by_default_there_are_bar_summary_and_checkpoint() -> None:
    assert kinds() == ["RichProgressBar", "RichModelSummary", "ModelCheckpoint"]


def test_without_rich_the_plain_ones_are_taken(without: Callable[..., None]) -> None:
    without("rich")
    assert kinds() == ["TQDMProgressBar", "ModelSummary", "ModelCheckpoint"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"enable_progress_bar": False}, ["RichModelSummary", "ModelCheckpoint"]),
        ({"enable_model_summary": False}, ["RichProgressBar", "ModelCheckpoint"]),
        ({"enable_checkpointing": False}, ["RichProgressBar", "RichModelSummary"]),
        ({"callbacks": TQDMProgressBar()}, ["TQDMProgressBar", "RichModelSummary", "ModelCheckpoint"]),
        ({"callbacks": [ModelSummary()]}, ["ModelSummary", "RichProgressBar", "ModelCheckpoint"]),
        ({"callbacks": (Mine(),)}, ["Mine", "RichProgressBar", "RichModelSummary", "ModelCheckpoint"]),
        ({"max_time": {"hours": 1}}, ["Timer", "RichProgressBar", "RichModelSummary", "ModelCheckpoint"]),
        ({"fast_dev_run": True}, ["RichProgressBar", "RichModelSummary", "ModelCheckpoint"]),
        ({"barebones": True, "logger": None}, []),
        ({"barebones": True, "logger": None, "callbacks": [Mine()]}, ["Mine"]),
        ({"enable_model_summary": False, "callbacks": [ModelSummary()]}, ["ModelSummary", "RichProgressBar", "ModelCheckpoint"]),
    ],
)
def test_what_is_given_is_kept_and_what_is_missing_added(arguments: dict[str, Any], expected: list[str]) -> None:
    assert kinds(**arguments) == expected


def test_checkpoints_come_last_in_their_order() -> None:
    first, second = ModelCheckpoint(), ModelCheckpoint(monitor="x")
    trainer = made(callbacks=[first, Mine(), second, EarlyStopping("x")], enable_progress_bar=False, enable_model_summary=False)
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["Mine", "EarlyStopping", "ModelCheckpoint", "ModelCheckpoint"]
    assert trainer.callbacks[-2:] == [first, second]


def test_the_list_that_was_given_stays_as_it_was() -> None:
    given: list[Callback] = [ModelCheckpoint(), Mine()]
    made(callbacks=given)
    assert [type(callback).__name__ for callback in given] == ["ModelCheckpoint", "Mine"]


def test_max_time_gives_way_to_a_timer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert kinds(callbacks=[Timer("00:00:00:10")], max_time="00:01:00:00").count("Timer") == 1
    assert "max_time is ignored: callbacks holds a Timer already" in caplog.text


@pytest.mark.parametrize("given", ["stop", ["stop"], [Mine], [Mine(), object()], {Mine()}, 3])
def test_what_is_no_callback_is_refused(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"callbacks=.*: accepted are a Callback, or a list of them; .* is none"):
        made(callbacks=given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"enable_checkpointing": False, "callbacks": [ModelCheckpoint()]},
            "enable_checkpointing=False was given together with a checkpoint",
        ),
        (
            {"enable_progress_bar": False, "callbacks": [TQDMProgressBar()]},
            "enable_progress_bar=False was given together with the progress bar TQDMProgressBar",
        ),
        ({"callbacks": [TQDMProgressBar(), RichProgressBar()]}, "callbacks holds 2 progress bars; the trainer shows one"),
    ],
)
def test_callbacks_that_contradict_arguments_or_each_other_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        made(**arguments)


def test_two_callbacks_that_would_share_a_state_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"Two callbacks of type ModelCheckpoint have the same state_key .*Give them different arguments"
    ):
        made(callbacks=[ModelCheckpoint(), ModelCheckpoint()])
    made(callbacks=[ModelCheckpoint(), ModelCheckpoint(monitor="x")])
    made(callbacks=[Mine(), Mine()])


# ---- loggers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, True])
def test_the_default_logger_is_tensorboard(given: Any) -> None:
    trainer = made(logger=given, default_root_dir="runs")
    assert [type(logger).__name__ for logger in trainer.loggers] == ["TensorBoardLogger"]
    assert trainer.logger.save_dir == "runs"
    assert trainer.logger.name == "lightning_logs"


def test_without_tensorboard_the_default_logger_writes_csv(without: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    without("tensorboard", "tensorboardX")
    with caplog.at_level("INFO"):
        assert [type(logger).__name__ for logger in made(logger=True).loggers] == ["CSVLogger"]
    assert "pip install tensorboard" in caplog.text


def test_loggers_that_are_given_are_kept() -> None:
    a, b = CSVLogger("a"), CSVLogger("b")
    assert made(logger=a).loggers == [a]
    assert made(logger=[a, b]).loggers == made(logger=(a, b)).loggers == [a, b]
    stand_in = mock.Mock(spec=Logger)
    assert made(logger=stand_in).loggers == [stand_in]
    assert made(logger=False).loggers == made(logger=[]).loggers == []


@pytest.mark.parametrize("given", ["csv", [CSVLogger("a"), "csv"], CSVLogger, object(), 3])
def test_what_is_no_logger_is_refused(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"logger=.*: accepted are a Logger, a list of them, True, False, or None"):
        made(logger=given)


# ---- profilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [(None, PassThroughProfiler), ("simple", SimpleProfiler), ("Simple", SimpleProfiler)])
def test_profilers_are_found_by_name(given: Any, expected: type) -> None:
    assert type(made(profiler=given).profiler) is expected


def test_a_profiler_that_is_given_is_kept_unless_it_does_nothing() -> None:
    class Own(PassThroughProfiler):
        pass

    for profiler in (SimpleProfiler(), Own()):
        assert made(profiler=profiler)._profiler is profiler
    assert made(profiler=PassThroughProfiler())._profiler is None


@pytest.mark.parametrize("given", ["gut feeling", 3, SimpleProfiler, Profiler, ["simple"]])
def test_what_is_no_profiler_is_refused(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"profiler=.*: accepted are 'simple', 'epoch', an instance of Profiler, or None"):
        made(profiler=given)


# ---- datamodules and models in place of arguments --------------------------------------------------------------------


def test_a_datamodule_may_stand_in_the_place_of_loaders(make_trainer: MakeTrainer, Evaluated: Any) -> None:
    datamodule = LightningDataModule.from_datasets(*[torch.ones(1, 1)] * 4)
    model, trainer = Evaluated(), make_trainer()
    trainer.fit(model, datamodule)
    assert trainer.datamodule is datamodule
    for function in ("validate", "test", "predict"):
        getattr(trainer, function)(model, datamodule)
        assert trainer.datamodule is datamodule
    with pytest.raises(MisconfigurationException, match="Two datamodules were passed, one of them in the place of the loaders"):
        trainer.fit(model, datamodule, datamodule=datamodule)


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_without_a_model_the_last_one_is_taken(function: str, make_trainer: MakeTrainer, Evaluated: Any, numbers: Any) -> None:
    trainer = make_trainer()
    with pytest.raises(TypeError, match=rf"`Trainer\.{function}\(\)` needs a model: pass one, since this trainer has not run any yet"):
        getattr(trainer, function)(dataloaders=numbers(1))
    model = Evaluated()
    trainer.fit(model, numbers(1), numbers(1))
    getattr(trainer, function)(dataloaders=numbers(1))
    assert trainer.lightning_module is model


# ---- the sanity check ------------------------------------------------------------------------------------------------


def test_the_sanity_check_leaves_neither_metrics_nor_drawn_numbers(
    make_trainer: MakeTrainer, Evaluated: Any, Rows: Any, numbers: Any
) -> None:
    class Random(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", torch.rand(()) + random.random() + float(np.random.rand()))

        def on_train_start(self) -> None:
            self.drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]
            assert self.trainer.callback_metrics == self.trainer.logged_metrics == {}

    drawn = []
    for steps in (0, 3):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        rows, model = Rows(), Random()
        make_trainer(num_sanity_val_steps=steps, logger=rows).fit(model, numbers(1), numbers(4))
        drawn.append(model.drawn)
        assert len(rows.of("val")) == 1
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("steps", "expected"), [(0, 0), (2, 2), (9, 4), (-1, 4)])
def test_the_sanity_check_runs_so_many_batches(steps: int, expected: int, make_trainer: MakeTrainer, Evaluated: Any, numbers: Any) -> None:
    seen: list[int] = []

    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if self.trainer.sanity_checking:
                seen.append(batch_idx)

    make_trainer(num_sanity_val_steps=steps).fit(Model(), numbers(1), numbers(4))
    assert seen == list(range(expected))


def test_a_sanity_check_that_fails_does_not_mute_the_next_run(make_trainer: MakeTrainer, Evaluated: Any, Rows: Any, numbers: Any) -> None:
    class Fails(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise RuntimeError("no")

    rows = Rows()
    trainer = make_trainer(num_sanity_val_steps=1, logger=rows)
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(Fails(), numbers(1), numbers(4))
    trainer.fit(Evaluated(), numbers(1), numbers(4))
    assert rows.of("val") == [(0, 1.5)]


# ---- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "said"),
    [
        (0, "cpu", 1, "CPUAccelerator: 1 device of this machine used. GPUs available: 0."),
        (0, "cpu", 2, "CPUAccelerator: 2 devices of this machine used. GPUs available: 0."),
        (2, "cpu", 1, "GPUs available: 2, none of them used: for these, give accelerator='gpu'."),
        (2, "cuda", 1, "CUDAAccelerator: 1 device of this machine used. GPUs available: 2."),
    ],
)
def test_a_new_trainer_says_what_it_runs_on(
    gpus: int, accelerator: str, devices: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: gpus)
    monkeypatch.setattr("lightning.fabric.accelerators.mps.MPSAccelerator.is_available", lambda: False)
    with caplog.at_level("INFO"):
        Trainer(accelerator=accelerator, devices=devices, logger=False)
    assert len([record for record in caplog.records if record.getMessage().endswith(said)]) == 1
