"""When checkpoints are saved, and of which weights."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from lightning.pytorch.callbacks import checkpoint_schedule
from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint


def steps(run: Any) -> list[int]:
    return [step for step, _ in run.saves]


@pytest.mark.parametrize(
    ("arguments", "options", "saved"),
    [
        ({}, {}, [4, 8, 12]),
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [8, 16]),
        ({"every_n_epochs": 0}, {}, []),
        ({}, {"val_check_interval": 0.5}, [2, 4, 6, 8, 10, 12]),
        ({}, {"val_check_interval": 3}, [3, 7, 11]),
        ({}, {"check_val_every_n_epoch": 2}, [8]),
        ({}, {"check_val_every_n_epoch": None, "val_check_interval": 5}, [5, 10]),
        ({}, {"validate": False}, [4, 8, 12]),
        ({}, {"validate": False, "check_val_every_n_epoch": 2}, [4, 8, 12]),
        ({"save_on_train_epoch_end": False}, {"validate": False}, []),
        ({"save_on_train_epoch_end": True}, {"val_check_interval": 0.5}, [4, 8, 12]),
        ({"save_on_train_epoch_end": True}, {"check_val_every_n_epoch": 2}, [4, 8, 12]),
        ({"save_on_train_epoch_end": False, "every_n_epochs": 2}, {"check_val_every_n_epoch": 3, "max_epochs": 6}, [24]),
        ({"every_n_train_steps": 3}, {}, [3, 6, 9, 12]),
        ({"every_n_train_steps": 3}, {"accumulate_grad_batches": 2, "batches": 7}, [3, 6, 9, 12]),
        ({"every_n_train_steps": 50}, {}, []),
        ({"train_time_interval": timedelta(0)}, {"max_epochs": 1}, [1, 2, 3, 4]),
        ({"train_time_interval": timedelta(hours=1)}, {}, []),
    ],
)
def test_unmonitored_checkpoints_are_saved_when_due(
    train: Callable[..., Any], arguments: dict[str, Any], options: dict[str, Any], saved: list[int]
) -> None:
    assert steps(train(ModelCheckpoint(save_top_k=-1, **arguments), **options)) == saved


def test_time_is_counted_from_the_last_due_batch(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))  # a second between two looks at the clock
    monkeypatch.setattr(checkpoint_schedule.time, "monotonic", lambda: float(next(now)))
    run = train(ModelCheckpoint(save_top_k=-1, train_time_interval=timedelta(seconds=5)), validate=False)
    assert steps(run) == [5, 10]


def test_place_of_an_epochs_checkpoint_is_before_or_after_validation(prepare: Callable[..., Any]) -> None:
    class Places(ModelCheckpoint):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_end(trainer, pl_module)
            self.after_validation = len(run.saves)

    for arguments, expected in (({}, 0), ({"save_on_train_epoch_end": False}, 1)):
        checkpoint = Places(dirpath=f"folder{expected}", **arguments)
        run = prepare(checkpoint, max_epochs=1)
        run.fit()
        assert (checkpoint.after_validation, len(run.saves)) == (expected, 1)


# ---- a monitored checkpoint carries the metric of the weights that it holds -------------------------------------------


def scores_by_step(checkpoint: ModelCheckpoint, run: Any) -> dict[int, float]:
    return {run.steps_in(path): score.item() for path, score in checkpoint.best_k_models.items()}


def test_save_at_a_step_waits_for_the_validation_that_follows(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", every_n_train_steps=4, save_top_k=-1, filename="{step}-{vl}")
    run = train(checkpoint)
    assert scores_by_step(checkpoint, run) == {4: 4, 8: 8, 12: 12}
    assert run.files == [f"checkpoints/step={step}-vl={step}.0.ckpt" for step in (12, 4, 8)]


@pytest.mark.parametrize("arguments", [{}, {"monitor": "vl", "save_last": True, "save_top_k": 0}])
def test_every_save_waits_for_a_validation_due_at_its_step(prepare: Callable[..., Any], arguments: dict[str, Any]) -> None:
    seen = []

    class Spy(ModelCheckpoint):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(len(run.saves))
            super().on_validation_end(trainer, pl_module)

    run = prepare(Spy(every_n_train_steps=4, **arguments), max_epochs=2)
    run.fit()
    assert seen == [0, 1]
    assert steps(run) == [4, 8]


def test_save_between_validations_waits_for_the_next(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", every_n_train_steps=3, save_top_k=-1)
    run = train(checkpoint)
    assert scores_by_step(checkpoint, run) == {4: 4, 8: 8, 12: 12}


def test_save_by_time_waits_for_the_next_validation(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", train_time_interval=timedelta(0), save_top_k=-1)
    run = train(checkpoint, val_check_interval=2, max_epochs=2)
    assert scores_by_step(checkpoint, run) == {2: 2, 4: 4, 6: 6, 8: 8}


def test_last_does_not_wait_for_the_metric(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(monitor="vl", every_n_train_steps=3, save_last=True), max_epochs=1)
    assert run.saves == [(3, "last.ckpt"), (4, "epoch=0-step=4.ckpt"), (4, "last.ckpt")]


def test_link_waits_for_the_file_that_it_leads_to(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(monitor="vl", every_n_train_steps=3, save_last="link"), max_epochs=1)
    assert run.saves == [(4, "epoch=0-step=4.ckpt")]
    assert run.files[1] == "checkpoints/last.ckpt -> epoch=0-step=4.ckpt"


def test_metric_of_each_batch_needs_no_wait(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="tl", every_n_train_steps=3, save_top_k=-1)
    run = train(checkpoint, log_train=True, validate=False)
    assert scores_by_step(checkpoint, run) == {3: 3, 6: 6, 9: 9, 12: 12}


def test_metric_of_the_training_epoch_is_waited_for(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="te", every_n_train_steps=3, save_top_k=-1)
    run = train(checkpoint, log_train=True, validate=False)
    assert scores_by_step(checkpoint, run) == {4: 4, 8: 8, 12: 12}


def test_epoch_without_validation_saves_nothing_under_an_old_metric(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="no metric of that name"):  # epoch 0, which could not have one
        run = train(checkpoint, check_val_every_n_epoch=2, max_epochs=4)
    assert scores_by_step(checkpoint, run) == {8: 8, 16: 16}


def test_metric_that_is_rarely_logged_in_training_is_taken_as_it_is_at_the_end_of_the_epoch(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="rare", save_top_k=-1)
    run = train(checkpoint, log_train=True, max_epochs=2)
    assert scores_by_step(checkpoint, run) == {4: 1, 8: 5}


# ---- when nothing is saved ---------------------------------------------------------------------------------------------


def test_fast_dev_run_saves_nothing(train: Callable[..., Any]) -> None:
    checkpoints = [ModelCheckpoint(save_last=True), ModelCheckpoint(every_n_train_steps=1, save_on_exception=True)]
    assert train(checkpoints, fast_dev_run=True).files == []


def test_sanity_check_counts_for_nothing(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="no metric of that name"):  # an error if validation had run
        run = train(checkpoint, num_sanity_val_steps=1, check_val_every_n_epoch=2, max_epochs=2)
    assert run.saves == [(8, "epoch=1-step=8.ckpt")]


def test_sanity_check_of_a_second_fit_saves_nothing(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(save_on_train_epoch_end=False, every_n_epochs=2), num_sanity_val_steps=1, max_epochs=1)
    run.trainer.fit_loop.max_epochs = 2
    run.fit()
    assert run.saves == [(8, "epoch=1-step=8.ckpt")]


def test_validation_outside_of_fit_saves_nothing(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(save_on_train_epoch_end=False, every_n_epochs=2), max_epochs=1)
    run.trainer.validate(run.model, run.loaders[1], verbose=False)
    assert run.files == []


def test_one_state_is_saved_once(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_top_k=-1, filename="x", save_on_train_epoch_end=False)
    run = train(checkpoint, batches=4, accumulate_grad_batches=4, val_check_interval=1, check_val_every_n_epoch=None, max_epochs=2)
    assert steps(run) == [1, 2]  # validation runs after each of the eight batches


def test_callback_serves_a_second_run(train: Callable[..., Any], tmp_path: Any) -> None:
    checkpoint = ModelCheckpoint(save_top_k=-1)
    train(checkpoint, max_epochs=1)
    with pytest.warns(UserWarning, match="not empty"):
        run = train(checkpoint, max_epochs=1)
    assert run.files == ["checkpoints/epoch=0-step=4-v1.ckpt", "checkpoints/epoch=0-step=4.ckpt"]
