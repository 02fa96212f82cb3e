"""The trainer's documented attributes: before, during and after a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.precision import MixedPrecision, Precision
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus

MakeTrainer = Callable[..., Any]
INFINITY = float("inf")


def test_every_attribute_is_documented() -> None:
    properties = {name: value for name, value in inspect.getmembers(Trainer) if isinstance(value, property)}
    assert [name for name, value in properties.items() if not value.__doc__] == []
    assert len(properties) > 60


# ---- before a run ----------------------------------------------------------------------------------------------------


def test_a_new_trainer_has_run_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_epochs=3)
    assert (trainer.current_epoch, trainer.global_step, trainer.should_stop, trainer.is_last_batch) == (0, 0, False, False)
    assert (trainer.min_epochs, trainer.max_epochs, trainer.min_steps, trainer.max_steps) == (None, 3, None, -1)
    assert (trainer.state.fn, trainer.state.stage, trainer.state.status) == (None, None, TrainerStatus.INITIALIZING)
    assert (trainer.lightning_module, trainer.model, trainer.datamodule, trainer.ckpt_path) == (None, None, None, None)
    assert (trainer.optimizers, trainer.lr_scheduler_configs) == ([], [])
    assert (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics, trainer.metric_steps) == ({}, {}, {}, {})
    assert (trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders, trainer.predict_dataloaders) == (None,) * 4
    assert trainer.num_training_batches == INFINITY
    assert (trainer.num_val_batches, trainer.num_test_batches, trainer.num_predict_batches, trainer.num_sanity_val_batches) == ([],) * 4
    assert (trainer.interrupted, trainer.received_sigterm, trainer.evaluating, trainer.enable_validation) == (False,) * 4


def test_where_it_runs(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(precision="bf16-mixed")
    assert type(trainer.accelerator) is CPUAccelerator
    assert type(trainer.strategy) is SingleDeviceStrategy
    assert type(trainer.precision_plugin) is MixedPrecision
    assert (trainer.precision, trainer.scaler) == ("bf16-mixed", None)
    assert (trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size, trainer.is_global_zero) == (0, 0, 0, 1, True)
    assert (trainer.num_nodes, trainer.num_devices, trainer.device_ids, trainer.distributed_sampler_kwargs) == (1, 1, [0], None)
    assert type(make_trainer().precision_plugin) is Precision


def test_without_a_profiler_there_is_one_that_does_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    assert type(trainer.profiler) is PassThroughProfiler
    trainer.profiler = "simple"
    assert type(trainer.profiler) is SimpleProfiler
    trainer.profiler = None
    assert type(trainer.profiler) is PassThroughProfiler


# ---- stages ----------------------------------------------------------------------------------------------------------

STAGES = {
    "training": RunningStage.TRAINING,
    "validating": RunningStage.VALIDATING,
    "testing": RunningStage.TESTING,
    "predicting": RunningStage.PREDICTING,
    "sanity_checking": RunningStage.SANITY_CHECKING,
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_can_be_set_and_unset(name: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    setattr(trainer, name, True)
    assert trainer.state.stage is STAGES[name]
    assert [other for other in STAGES if getattr(trainer, other)] == [name]
    assert trainer.evaluating is STAGES[name].evaluating
    for other in STAGES:
        if other != name:
            setattr(trainer, other, False)
    assert getattr(trainer, name)
    setattr(trainer, name, False)
    assert trainer.state.stage is None


def test_each_entry_point_goes_through_its_stages(make_trainer: MakeTrainer, Evaluated: Any, numbers: Any) -> None:
    seen: list[Any] = []

    def note(trainer: Any) -> None:
        seen.append((trainer.state.fn, trainer.state.stage, trainer.state.status))

    class Model(Evaluated):  # type: ignore[misc]
        def setup(self, stage: str) -> None:
            note(self.trainer)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            note(self.trainer)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            note(self.trainer)

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            note(self.trainer)

        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            note(self.trainer)
            return batch

    model, trainer = Model(), make_trainer(num_sanity_val_steps=1)
    trainer.fit(model, numbers(1), numbers(1))
    assert trainer.state.finished
    for function in ("validate", "test", "predict"):
        getattr(trainer, function)(model, numbers(1))
        assert (trainer.state.status, trainer.state.stage) == (TrainerStatus.FINISHED, None)
    train, sanity, val, test, predict = (RunningStage(name) for name in ("train", "sanity_check", "validate", "test", "predict"))
    fns = [TrainerFn.FITTING] * 4 + [TrainerFn.VALIDATING] * 2 + [TrainerFn.TESTING] * 2 + [TrainerFn.PREDICTING] * 2
    stages = [train, sanity, train, val, val, val, test, test, predict, predict]
    assert seen == [(fn, stage, TrainerStatus.RUNNING) for fn, stage in zip(fns, stages)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_by_an_exception_is_interrupted(error: type, make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    stages: list[Any] = []

    class Model(Weight):  # type: ignore[misc]
        def on_train_start(self) -> None:
            raise error("enough")

    class Listening(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            stages.append(trainer.state.stage)

    trainer = make_trainer(callbacks=[Listening()])
    with pytest.raises(error):
        trainer.fit(Model(), numbers())
    assert trainer.interrupted
    assert trainer.state.stopped
    assert stages == [RunningStage.TRAINING]
    trainer.fit(Weight(), numbers())
    assert not trainer.interrupted


# ---- counters, model, optimizers and data ----------------------------------------------------------------------------


def test_counters_move_with_the_run(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    seen: list[Any] = []

    class Noting(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append((trainer.current_epoch, trainer.global_step, trainer.is_last_batch))

    trainer = make_trainer(max_epochs=2, callbacks=[Noting()])
    trainer.fit(Weight(), numbers(2))
    assert seen == [(0, 1, False), (0, 2, True), (1, 3, False), (1, 4, True)]
    assert (trainer.current_epoch, trainer.global_step) == (2, 4)


def test_the_model_its_optimizers_and_schedulers_are_there_during_and_after(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            self.optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [self.optimizer], [StepLR(self.optimizer, 1)]

    model, trainer = Model(), make_trainer()
    trainer.fit(model, numbers())
    assert trainer.lightning_module is trainer.model is model
    assert trainer.optimizers == [model.optimizer]
    assert [type(config.scheduler) for config in trainer.lr_scheduler_configs] == [StepLR]
    other = torch.optim.SGD(model.parameters(), lr=2.0)
    trainer.optimizers = [other]
    assert trainer.strategy.optimizers == [other]


@pytest.mark.parametrize("kind", ["plain", "override", "manual"])
def test_optimizers_set_in_mid_run_take_the_next_step(kind: str, make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = kind != "manual"

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=100.0)]

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if kind == "manual":
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    class Override(Model):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(optimizer_closure)

    model = Override() if kind == "override" else Model()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, numbers(1, start=1))
    assert model.weight.item() == -1 - 100
    assert trainer.global_step == 2


def test_several_optimizers_set_in_mid_run_are_refused_in_automatic_optimization(
    make_trainer: MakeTrainer, Weight: Any, numbers: Any
) -> None:
    model = Weight()
    model.on_train_start = lambda: setattr(model.trainer, "optimizers", model.trainer.optimizers * 2)
    with pytest.raises(RuntimeError, match="returned 2 optimizers, and automatic optimization steps one"):
        make_trainer().fit(model, numbers(1))


def test_loaders_and_their_numbers_of_batches(make_trainer: MakeTrainer, Evaluated: Any, numbers: Any) -> None:
    train, first, second = numbers(4), numbers(3), numbers(5)
    seen: list[Any] = []

    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            if self.trainer.sanity_checking:
                seen.append(self.trainer.num_sanity_val_batches)

    trainer = make_trainer(limit_train_batches=0.5, limit_val_batches=4, num_sanity_val_steps=3)
    trainer.fit(Model(), train, [first, second])
    assert trainer.train_dataloader is train
    assert trainer.val_dataloaders == [first, second]
    assert (trainer.num_training_batches, trainer.num_val_batches) == (2, [3, 4])
    assert seen == [[3, 3]] * 6
    assert trainer.enable_validation
    trainer.test(Evaluated(), first, verbose=False)
    assert (trainer.test_dataloaders, trainer.num_test_batches) == (first, [3])
    trainer.predict(Evaluated(), second)
    assert (trainer.predict_dataloaders, trainer.num_predict_batches) == (second, [5])
    # The loaders are those of the last call, the numbers stay.
    assert (trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders) == (None, None, None)
    assert (trainer.num_training_batches, trainer.num_val_batches, trainer.num_sanity_val_batches) == (2, [3, 4], [3, 3])
    assert trainer.num_test_batches == [3]


@pytest.mark.parametrize(("arguments", "minimum"), [({}, 0), ({"min_steps": 1}, 1), ({"min_epochs": 2}, 2)])
def test_the_minimum_of_epochs_is_a_number_in_a_run(
    make_trainer: MakeTrainer, Weight: Any, numbers: Any, arguments: dict[str, Any], minimum: int
) -> None:
    trainer = make_trainer(max_epochs=2, **arguments)
    assert trainer.min_epochs == arguments.get("min_epochs")
    trainer.fit(Weight(), numbers(1))
    assert trainer.min_epochs == minimum


def test_the_number_of_batches_of_a_stream_is_infinite(make_trainer: MakeTrainer, Weight: Any, stream: Any) -> None:
    trainer = make_trainer()
    trainer.fit(Weight(), stream(3))
    assert trainer.num_training_batches == INFINITY


# ---- estimated steps -------------------------------------------------------------------------------------------------


def estimated(make_trainer: MakeTrainer, model: Any, loader: Any, **arguments: Any) -> float:
    """What ``configure_optimizers`` reads, which must be what the run then takes."""
    seen: list[float] = []
    configure = model.configure_optimizers

    def reading() -> Any:
        seen.append(model.trainer.estimated_stepping_batches)
        return configure()

    model.configure_optimizers = reading
    make_trainer(**arguments).fit(model, loader)
    return seen[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 1}, 7),
        ({"max_epochs": 3}, 21),
        ({"max_epochs": 3, "max_steps": 10}, 10),
        ({"max_epochs": -1, "max_steps": 10}, 10),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 3, "callbacks": GradientAccumulationScheduler({1: 7})}, 7 + 1 + 1),
    ],
)
def test_estimated_steps_are_those_that_the_run_takes(
    arguments: Any, expected: int, make_trainer: MakeTrainer, Weight: Any, numbers: Any
) -> None:
    model = Weight()
    assert estimated(make_trainer, model, numbers(7), **arguments) == expected
    assert model.trainer.global_step == expected


def test_estimated_steps_of_a_stream_are_infinite_or_bounded(make_trainer: MakeTrainer, Weight: Any, stream: Any) -> None:
    assert estimated(make_trainer, Weight(), stream(3), max_epochs=1) == INFINITY
    assert estimated(make_trainer, Weight(), stream(3), max_epochs=1, max_steps=2) == 2


# ---- callbacks, loggers, paths ---------------------------------------------------------------------------------------


def test_callbacks_are_found_by_their_kind(make_trainer: MakeTrainer) -> None:
    first, second = ModelCheckpoint(), ModelCheckpoint(monitor="x")
    stop, other_stop, bar = EarlyStopping("x"), EarlyStopping("y"), TQDMProgressBar()
    trainer = make_trainer(callbacks=[first, stop, second, other_stop, bar], enable_checkpointing=True, enable_progress_bar=True)
    assert (trainer.checkpoint_callback, trainer.checkpoint_callbacks) == (first, [first, second])
    assert (trainer.early_stopping_callback, trainer.early_stopping_callbacks) == (stop, [stop, other_stop])
    assert trainer.progress_bar_callback is bar
    bare = make_trainer()
    assert (bare.checkpoint_callback, bare.checkpoint_callbacks, bare.early_stopping_callback) == (None, [], None)
    assert (bare.early_stopping_callbacks, bare.progress_bar_callback) == ([], None)


def test_loggers_can_be_replaced(make_trainer: MakeTrainer) -> None:
    a, b = CSVLogger("a"), CSVLogger("b")
    trainer = make_trainer(logger=[a, b])
    assert (trainer.logger, trainer.loggers) == (a, [a, b])
    trainer.logger = b
    assert trainer.loggers == [b]
    trainer.loggers = [b, a]
    assert trainer.logger is b
    for nothing in (None, False):
        trainer.logger = nothing
        assert (trainer.logger, trainer.loggers) == (None, [])
    trainer.loggers = None
    assert trainer.loggers == []


def test_files_of_a_run_go_to_the_first_loggers_folder(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert make_trainer().log_dir == str(tmp_path)
    assert make_trainer(default_root_dir="here").log_dir == "here"
    for logger in (CSVLogger("csv", version=3), TensorBoardLogger("tb", version=3)):
        folder = make_trainer(logger=[logger, CSVLogger("other")]).log_dir
        assert folder == logger.log_dir
        assert folder.endswith("version_3")


def test_the_checkpoint_of_a_run_is_known(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    trainer = make_trainer()
    trainer.fit(Weight(), numbers())
    trainer.save_checkpoint("a.ckpt")
    assert trainer.ckpt_path is None
    again = make_trainer(max_epochs=2)
    again.fit(Weight(), numbers(), ckpt_path="a.ckpt")
    assert again.ckpt_path == "a.ckpt"
    again.ckpt_path = None
    assert again.ckpt_path is None


def test_metrics_are_tensors_for_callbacks_and_loggers_and_floats_for_the_bar(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("a", batch.mean(), prog_bar=True, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(logger=CSVLogger("logs"))
    trainer.fit(Model(), numbers(4))
    assert {key: value.item() for key, value in trainer.callback_metrics.items()} == {"a": 1.5, "a_step": 3.0, "a_epoch": 1.5}
    assert all(isinstance(value, Tensor) for value in [*trainer.callback_metrics.values(), *trainer.logged_metrics.values()])
    assert trainer.progress_bar_metrics == {"a_step": 3.0, "a_epoch": 1.5}
    assert {type(value) for value in trainer.progress_bar_metrics.values()} == {float}
    assert set(trainer.metric_steps.values()) == {4}
    trainer.add_callback_metrics({"mine": 5.0})
    assert trainer.callback_metrics["mine"] == 5


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_print_prints(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer().print("a", "b", sep="-", end="!")
    assert capsys.readouterr().out == "a-b!"


def test_saving_before_there_is_a_model_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(AttributeError, match=r"`Trainer\.save_checkpoint` needs a model: call fit, validate, test or predict before"):
        make_trainer().save_checkpoint("a.ckpt")
    assert not Path("a.ckpt").exists()
