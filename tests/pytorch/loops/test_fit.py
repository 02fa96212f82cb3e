"""When training begins and ends: bounds on epochs, steps and time, requests to stop, and running fit again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping


class Stop(Callback):
    """Asks for a stop in one hook, at its ``at``-th call."""

    def __init__(self, hook: str, at: int = 1) -> None:
        self.at, self.calls = at, 0
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Any, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            trainer.should_stop = True


# ---- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "batches", "epoch", "step"),
    [
        ({"max_epochs": 2}, 8, 2, 8),
        ({"max_epochs": 0}, 0, 0, 0),
        ({"max_steps": 0}, 0, 0, 0),
        ({"max_epochs": None, "max_steps": 6}, 6, 2, 6),
        ({"max_epochs": -1, "max_steps": 6}, 6, 2, 6),
        ({"max_epochs": 1, "max_steps": 6}, 4, 1, 4),
        ({"max_epochs": 3, "max_steps": 8}, 8, 2, 8),
        ({"max_epochs": None, "max_steps": 3, "accumulate_grad_batches": 2}, 6, 2, 3),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 2, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4, 2, 4),
        ({"max_epochs": 2, "limit_train_batches": 100}, 8, 2, 8),
        ({"max_epochs": 2, "limit_train_batches": 1.0}, 8, 2, 8),
        ({"max_epochs": 2, "limit_train_batches": 1}, 2, 2, 2),
        ({"max_epochs": 2, "limit_train_batches": 0}, 0, 0, 0),
        ({"max_epochs": 2, "overfit_batches": 2}, 4, 2, 4),
        ({"max_epochs": 2, "overfit_batches": 0.25}, 2, 2, 2),
        ({"fast_dev_run": True}, 1, 1, 1),
        ({"fast_dev_run": 3}, 3, 1, 3),
    ],
)
def test_run_ends_at_its_bounds(Weight: Any, make_trainer: Any, numbers: Any, arguments: Any, batches: int, epoch: int, step: int) -> None:
    model, trainer = Weight(), make_trainer(**arguments)
    trainer.fit(model, numbers(4))
    assert len(model.seen) == batches
    assert (trainer.current_epoch, trainer.global_step) == (epoch, step)
    assert not trainer.interrupted


def test_thousand_epochs_bound_a_run_without_bounds(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer(max_epochs=None, callbacks=[Stop("on_train_epoch_end")])
    with pytest.warns(UserWarning, match="1000 epochs"):
        trainer.fit(Weight(), numbers(1))
    assert trainer.max_epochs == 1000


@pytest.mark.parametrize("form", [timedelta(seconds=0), "00:00:00:00", {"seconds": 0}], ids=["timedelta", "string", "dict"])
def test_time_bounds_a_run_after_the_batch_that_is_under_way(Weight: Any, make_trainer: Any, numbers: Any, form: Any) -> None:
    model, trainer = Weight(), make_trainer(max_epochs=None, max_time=form)
    trainer.fit(model, numbers(4))
    assert len(model.seen) <= 1
    assert trainer.max_epochs == -1  # time is bound enough: no thousand epochs


def test_time_gives_way_to_the_minimum_of_steps(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model, trainer = Weight(), make_trainer(max_epochs=10, max_time=timedelta(seconds=0), min_steps=6)
    trainer.fit(model, numbers(4))
    assert trainer.global_step == 6


# ---- requests to stop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "at", "batches"),
    [
        ("on_fit_start", 1, 0),
        ("on_train_start", 1, 0),
        ("on_train_epoch_start", 1, 0),
        ("on_train_epoch_start", 2, 4),
        ("on_train_batch_start", 2, 2),
        ("on_before_zero_grad", 2, 2),
        ("on_before_backward", 2, 2),
        ("on_after_backward", 2, 2),
        ("on_before_optimizer_step", 2, 2),
        ("on_train_batch_end", 2, 2),
        ("on_train_batch_end", 4, 4),
        ("on_validation_start", 1, 2),
        ("on_validation_batch_end", 1, 2),
        ("on_validation_end", 1, 2),
        ("on_validation_end", 2, 4),
        ("on_train_epoch_end", 1, 4),
    ],
)
def test_stop_asked_for_in_any_hook_ends_training_after_the_batch(
    Evaluated: Any, make_trainer: Any, numbers: Any, hook: str, at: int, batches: int
) -> None:
    model = Evaluated()
    trainer = make_trainer(max_epochs=3, callbacks=[Stop(hook, at)], val_check_interval=2)
    trainer.fit(model, numbers(4), numbers(1))
    assert len(model.seen) == trainer.global_step == batches
    assert not trainer.interrupted


def test_stop_asked_for_validates_the_last_weights_once(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    validated: list[int] = []

    class Model(Evaluated):  # type: ignore[misc]
        def on_validation_start(self) -> None:
            validated.append(self.global_step)

    make_trainer(callbacks=[Stop("on_train_batch_end", 3)]).fit(Model(), numbers(10), numbers(1))
    assert validated == [3]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_stop_asked_for_inside_an_accumulation_window_waits_for_its_update(
    Evaluated: Any, make_trainer: Any, numbers: Any, hook: str
) -> None:
    validated: list[int] = []

    class Model(Evaluated):  # type: ignore[misc]
        def on_validation_start(self) -> None:
            validated.append(len(self.seen))

    model = Model()
    trainer = make_trainer(callbacks=[Stop(hook, 1)], accumulate_grad_batches=3)
    trainer.fit(model, numbers(10), numbers(1))
    assert len(model.seen) == 3
    assert trainer.global_step == 1
    assert validated == [3]
    assert model.weight.item() == -1.0  # the mean of 0, 1 and 2


@pytest.mark.parametrize(
    ("minimum", "batches"),
    [
        ({"min_epochs": 2}, 8),
        ({"min_steps": 6}, 6),
        ({"min_steps": 3}, 4),
        ({"min_epochs": 0, "min_steps": 3}, 3),
        ({"min_epochs": 2, "min_steps": 3}, 8),
    ],
)
def test_nothing_stops_a_run_before_its_minimum(Weight: Any, make_trainer: Any, numbers: Any, minimum: Any, batches: int) -> None:
    model = Weight()
    make_trainer(max_epochs=5, callbacks=[Stop("on_train_batch_end")], **minimum).fit(model, numbers(4))
    assert len(model.seen) == batches


def test_early_stopping_decides_anew_after_the_minimum(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    scores = iter([1.0, 2.0, 0.5, 0.4, 0.6, 0.7])

    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", next(scores))

    trainer = make_trainer(max_epochs=10, min_epochs=3, callbacks=[EarlyStopping("val", patience=1)])
    trainer.fit(Model(), numbers(2), numbers(1))
    assert trainer.current_epoch == 5  # not 3: at that time it had got better again


def test_batch_start_returning_minus_one_ends_the_epoch_without_that_batch(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    model, trainer = Model(), make_trainer(max_epochs=2)
    trainer.fit(model, numbers(4))
    assert model.seen == [[0.0], [1.0]] * 2
    assert (trainer.current_epoch, trainer.global_step) == (2, 4)


# ---- again ----------------------------------------------------------------------------------------------------------


def test_second_fit_goes_on_where_the_first_ended(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model, trainer = Weight(), make_trainer(max_epochs=2)
    trainer.fit(model, numbers(2))
    trainer.fit(model, numbers(2))
    assert len(model.seen) == 4  # the bound is reached: nothing to do
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, numbers(2))
    assert len(model.seen) == 6
    assert (trainer.current_epoch, trainer.global_step) == (3, 6)


def test_second_fit_may_have_another_model_and_other_data(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    trainer, other = make_trainer(), Weight()
    trainer.fit(Weight(), numbers(2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, numbers(3, start=5))
    assert other.seen == [[5.0], [6.0], [7.0]]
    assert trainer.lightning_module is other


def test_stop_of_the_first_fit_does_not_stop_the_second(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model, trainer = Weight(), make_trainer(max_epochs=5, callbacks=[Stop("on_train_epoch_end")])
    trainer.fit(model, numbers(2))
    assert trainer.current_epoch == 1
    trainer.fit(model, numbers(2))
    assert trainer.current_epoch == 5


@pytest.mark.parametrize("where", ["training_step", "on_train_epoch_end", "on_train_start", "validation_step", "configure_optimizers"])
def test_fit_after_a_failed_one_starts_the_epoch_anew(Evaluated: Any, make_trainer: Any, numbers: Any, where: str) -> None:
    calls: list[str] = []

    class Model(Evaluated):  # type: ignore[misc]
        fails = True

        def fail_in(self, name: str) -> None:
            if self.fails and name == where and (self.current_epoch == 1 or name in ("on_train_start", "configure_optimizers")):
                raise RuntimeError("boom")

        def on_train_start(self) -> None:
            self.fail_in("on_train_start")

        def configure_optimizers(self) -> Any:
            self.fail_in("configure_optimizers")
            return super().configure_optimizers()

        def on_train_epoch_start(self) -> None:
            calls.append(f"epoch {self.current_epoch}")

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            calls.append(f"batch {batch_idx}")
            if batch_idx == 1:
                self.fail_in("training_step")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.fail_in("validation_step")

        def on_train_epoch_end(self) -> None:
            self.fail_in("on_train_epoch_end")

    model, trainer = Model(), make_trainer(max_epochs=3)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(model, numbers(2), numbers(1))
    assert trainer.interrupted
    calls.clear()
    model.fails = False
    trainer.fit(model, numbers(2), numbers(1))
    first = {"on_train_epoch_end": 2, "training_step": 1, "validation_step": 1}.get(where, 0)  # an epoch that was through is not run again
    assert calls == [call for epoch in range(first, 3) for call in (f"epoch {epoch}", "batch 0", "batch 1")]
    assert trainer.current_epoch == 3
    assert not trainer.interrupted


def test_one_model_may_be_trained_by_two_trainers_in_turn(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model = Weight()
    make_trainer(max_epochs=2).fit(model, numbers(2))
    second = make_trainer(max_epochs=1)
    second.fit(model, numbers(2))
    assert model.trainer is second
    assert second.global_step == 2
    assert len(model.seen) == 6


# ---- what batches and modes a step sees -----------------------------------------------------------------------------


def test_step_runs_with_gradients_in_training_mode_outside_of_inference(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    seen: set[tuple[bool, bool, bool]] = set()

    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.training))
            return self.weight * 1.0

    with torch.no_grad():  # the caller's business
        make_trainer(accumulate_grad_batches=2).fit(Model(), numbers(4))
    assert seen == {(True, False, True)}


def test_is_last_batch_and_current_epoch_are_right_in_every_batch(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[tuple[int, int, bool]] = []

    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.append((self.current_epoch, batch_idx, self.trainer.is_last_batch))
            return self.weight * 1.0

    make_trainer(max_epochs=2).fit(Model(), numbers(3))
    assert seen == [(epoch, index, index == 2) for epoch in range(2) for index in range(3)]


def test_model_without_training_parts_is_refused_before_anything_runs(make_trainer: Any, numbers: Any) -> None:
    class Bare(LightningModule):
        def prepare_data(self) -> None:
            raise AssertionError("too late")

    with pytest.raises(Exception, match="training_step"):
        make_trainer().fit(Bare(), numbers(1))
