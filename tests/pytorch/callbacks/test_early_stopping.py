"""EarlyStopping: what it decides from a sequence of values, and that a run follows it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning.fabric.strategies import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.early_stopping import EarlyStopping, EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn

NAN, INF = float("nan"), float("inf")
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def stand_in(**overrides: Any) -> SimpleNamespace:
    """What EarlyStopping asks of a trainer."""
    trainer = SimpleNamespace(
        callback_metrics={},
        check_val_every_n_epoch=1,
        current_epoch=0,
        fast_dev_run=False,
        global_rank=0,
        sanity_checking=False,
        should_stop=False,
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        strategy=Strategy(),
        val_check_interval=1.0,
        world_size=1,
    )
    vars(trainer).update(overrides)
    return trainer


def check(callback: EarlyStopping, values: list[float], trainer: SimpleNamespace | None = None) -> int | None:
    """Give the values one by one; the index of the one that stopped the run, or None."""
    trainer = trainer or stand_in()
    callback.setup(trainer, None, "fit")
    for epoch, value in enumerate(values):
        trainer.current_epoch = epoch
        trainer.callback_metrics = {callback.monitor: torch.tensor(value)}
        callback.on_validation_end(trainer, None)
        callback.on_train_epoch_end(trainer, None)
        if trainer.should_stop:
            return epoch
    return None


@pytest.mark.parametrize(
    ("arguments", "values", "stopped_at", "reason"),
    [
        ({"patience": 2}, [1.0, 2.0, 3.0, 4.0], 2, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 2}, [3.0, 4.0, 2.0, 3.0, 2.0, 9.0], 4, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 0}, [3.0, 2.0, 2.0], 2, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 2, "mode": "max"}, [1.0, 2.0, 3.0, 2.0, 3.0, 4.0], 4, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.4, 2.2, 2.0], 3, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 2, "min_delta": -0.5}, [3.0, 3.4, 3.8, 4.5, 5.0], 4, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 2, "min_delta": 0.5, "mode": "max"}, [1.0, 1.6, 1.8, 2.0], 3, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 9}, [1.0, NAN, 0.5], 1, EarlyStoppingReason.NON_FINITE_METRIC),
        ({"patience": 9}, [-INF], 0, EarlyStoppingReason.NON_FINITE_METRIC),
        ({"patience": 2, "check_finite": False}, [1.0, NAN, NAN, 0.5], 2, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"stopping_threshold": 1.5}, [3.0, 2.0, 1.5, 1.0], 3, EarlyStoppingReason.STOPPING_THRESHOLD),
        ({"stopping_threshold": 0.9, "mode": "max"}, [0.8, 0.95], 1, EarlyStoppingReason.STOPPING_THRESHOLD),
        ({"divergence_threshold": 5.0}, [3.0, 5.0, 6.0], 2, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
        ({"divergence_threshold": 0.5, "mode": "max"}, [0.6, 0.5, 0.4], 2, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
        ({"patience": 3}, [5.0, 4.0, 3.0, 2.0], None, EarlyStoppingReason.NOT_STOPPED),
    ],
)
def test_stop_comes_at_the_value_that_calls_for_it(
    arguments: dict[str, Any], values: list[float], stopped_at: int | None, reason: EarlyStoppingReason
) -> None:
    callback = EarlyStopping("loss", **arguments)
    assert check(callback, values) == stopped_at
    assert callback.stopped_epoch == (stopped_at or 0)
    assert callback.stopping_reason is reason
    assert (callback.stopping_reason_message is None) == (stopped_at is None)


def test_threshold_is_not_crossed_by_an_equal_float32() -> None:
    assert check(EarlyStopping("acc", mode="max", stopping_threshold=0.1), [0.1]) is None
    assert check(EarlyStopping("loss", divergence_threshold=0.1), [0.1]) is None


def test_patience_may_be_endless() -> None:
    assert check(EarlyStopping("loss", patience=INF), [1.0] * 20) is None  # type: ignore[arg-type]
    assert check(EarlyStopping("loss", patience=np.int64(1)), [1.0] * 20) == 1


def test_best_score_counts_the_value_that_reached_the_threshold() -> None:
    callback = EarlyStopping("loss", stopping_threshold=1.5)
    check(callback, [2.0, 1.0])
    assert callback.best_score == 1.0


def test_reason_says_which_metric_and_why() -> None:
    callback = EarlyStopping("val_loss", divergence_threshold=2.5)
    check(callback, [3.0])
    assert callback.stopping_reason_message == "Divergence threshold reached: val_loss = 3.0 > 2.5. Signaling Trainer to stop."


def test_decision_is_taken_back_when_the_run_went_on_and_the_metric_improved() -> None:
    callback, trainer = EarlyStopping("loss", patience=2), stand_in()
    assert check(callback, [1.0, 2.0, 3.0], trainer) == 2
    trainer.should_stop = False  # what the trainer does before `min_epochs`
    assert check(callback, [0.5, 0.6], trainer) is None
    assert (callback.stopped_epoch, callback.wait_count) == (0, 1)
    assert callback.stopping_reason is EarlyStoppingReason.NOT_STOPPED
    assert callback.stopping_reason_message is None


def test_decision_is_repeated_when_the_run_went_on_without_improvement() -> None:
    callback, trainer = EarlyStopping("loss", patience=2), stand_in()
    check(callback, [1.0, 2.0, 3.0], trainer)
    trainer.should_stop = False
    trainer.current_epoch = 3
    trainer.callback_metrics = {"loss": torch.tensor(4.0)}
    callback.on_train_epoch_end(trainer, None)
    assert trainer.should_stop
    assert callback.stopped_epoch == 3


def test_stop_of_somebody_else_is_left_alone() -> None:
    callback, trainer = EarlyStopping("loss"), stand_in(should_stop=True)
    check(callback, [1.0], trainer)
    assert trainer.should_stop


@pytest.mark.parametrize(
    ("settings", "at_epoch_end"),
    [
        ({}, True),
        ({"val_check_interval": 0.5}, False),
        ({"val_check_interval": 10}, False),
        ({"check_val_every_n_epoch": 2}, False),
        ({"check_val_every_n_epoch": None}, False),
    ],
)
@pytest.mark.parametrize("explicit", [None, True, False])
def test_place_of_the_check(settings: dict[str, Any], at_epoch_end: bool, explicit: bool | None) -> None:
    callback = EarlyStopping("loss", check_on_train_epoch_end=explicit)
    trainer = stand_in(callback_metrics={"loss": torch.tensor(1.0)}, **settings)
    callback.setup(trainer, None, "fit")
    wanted = at_epoch_end if explicit is None else explicit
    callback.on_validation_end(trainer, None)
    assert torch.isfinite(callback.best_score) == (not wanted)
    callback.on_train_epoch_end(trainer, None)
    assert torch.isfinite(callback.best_score)


def test_place_of_the_check_is_chosen_anew_for_each_run() -> None:
    callback = EarlyStopping("loss")
    callback.setup(stand_in(val_check_interval=0.5), None, "fit")
    trainer = stand_in(callback_metrics={"loss": torch.tensor(1.0)})
    callback.setup(trainer, None, "fit")
    callback.on_train_epoch_end(trainer, None)
    assert callback.best_score == 1.0


@pytest.mark.parametrize(
    "situation", [{"sanity_checking": True}, {"state": SimpleNamespace(fn=TrainerFn.VALIDATING)}, {"fast_dev_run": True}]
)
def test_no_check_outside_of_training(situation: dict[str, Any]) -> None:
    assert check(EarlyStopping("loss", check_on_train_epoch_end=False), [NAN], stand_in(**situation)) is None


def test_metric_is_read_once_and_only_at_the_check() -> None:
    class Watched(dict[str, torch.Tensor]):
        reads = 0

        def __getitem__(self, key: str) -> torch.Tensor:
            self.reads += 1
            return super().__getitem__(key)

    metrics = Watched(loss=torch.tensor(1.0))
    trainer = stand_in(callback_metrics=metrics)
    callback = EarlyStopping("loss")
    callback.setup(trainer, None, "fit")
    callback.on_validation_end(trainer, None)
    assert metrics.reads == 0
    callback.on_train_epoch_end(trainer, None)
    assert metrics.reads == 1


def test_missing_metric_raises_and_names_what_there_is() -> None:
    trainer = stand_in(callback_metrics={"acc": torch.tensor(1.0), "train_loss": torch.tensor(1.0)})
    callback = EarlyStopping("val_loss", check_on_train_epoch_end=True)
    callback.setup(trainer, None, "fit")
    with pytest.raises(RuntimeError, match=r"`val_loss`.*has not been logged.*`acc`, `train_loss`"):
        callback.on_train_epoch_end(trainer, None)


def test_missing_metric_warns_when_not_strict() -> None:
    trainer = stand_in()
    callback = EarlyStopping("val_loss", strict=False, check_on_train_epoch_end=True)
    callback.setup(trainer, None, "fit")
    with pytest.warns(RuntimeWarning, match=r"`val_loss`.*none; log one"):
        callback.on_train_epoch_end(trainer, None)
    assert callback.wait_count == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "lowest"}, "mode='lowest'.*'min', 'max'"),
        ({"monitor": None}, "monitor=None"),
        ({"patience": -1}, "patience=-1.*0 or more"),
        ({"patience": "3"}, "patience='3'.*a number is needed, got str"),
        ({"min_delta": None}, "min_delta=None"),
        ({"stopping_threshold": "0.1"}, "stopping_threshold='0.1'"),
        ({"divergence_threshold": True}, "divergence_threshold=True"),
    ],
)
def test_wrong_argument_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        EarlyStopping(**{"monitor": "loss", **arguments})


def test_state_survives_a_restart() -> None:
    first = EarlyStopping("loss", patience=2)
    check(first, [1.0, 2.0, 3.0])
    second = EarlyStopping("loss", patience=2)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert check(second, [2.0]) == 0


def test_state_can_be_read_back_as_weights_only() -> None:
    callback = EarlyStopping("loss", patience=2)
    check(callback, [1.0, 2.0, 3.0])
    torch.save(callback.state_dict(), "state.pt")
    assert torch.load("state.pt", weights_only=True) == callback.state_dict()


def test_state_of_an_older_release_is_accepted() -> None:
    callback = EarlyStopping("loss", patience=2)
    callback.load_state_dict({"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(1.0), "patience": 2})
    assert callback.stopping_reason is EarlyStoppingReason.NOT_STOPPED
    assert check(callback, [2.0]) == 0


def test_patience_of_the_checkpoint_is_used_with_a_warning() -> None:
    callback = EarlyStopping("loss", patience=9)
    with pytest.warns(UserWarning, match="patience=9.*patience=2"):
        callback.load_state_dict(EarlyStopping("loss", patience=2).state_dict())
    assert callback.patience == 2


def test_state_keys_tell_instances_apart() -> None:
    assert EarlyStopping("val_loss").state_key == "EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"
    assert EarlyStopping("val_loss").state_key != EarlyStopping("val_loss", mode="max").state_key


def test_messages_are_logged_when_verbose(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.callbacks.early_stopping")
    check(EarlyStopping("loss", patience=1, verbose=True), [3.0, 2.0, 2.0])
    assert caplog.messages == [
        "Metric loss improved. New best score: 3.000",
        "Metric loss improved by 1.000 >= min_delta = 0.0. New best score: 2.000",
        "Monitored metric loss did not improve in the last 1 records. Best score: 2.000. Signaling Trainer to stop.",
    ]


def test_messages_are_not_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.callbacks.early_stopping")
    check(EarlyStopping("loss", patience=1), [3.0, 2.0, 2.0])
    assert not caplog.messages


@pytest.mark.parametrize(("rank", "only_zero", "messages"), [(1, False, 1), (1, True, 0), (0, True, 1)])
def test_messages_of_other_ranks(caplog: pytest.LogCaptureFixture, rank: int, only_zero: bool, messages: int) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.callbacks.early_stopping")
    callback = EarlyStopping("loss", verbose=True, log_rank_zero_only=only_zero)
    check(callback, [3.0], stand_in(global_rank=rank, world_size=2))
    assert len(caplog.messages) == messages
    assert all(message.startswith(f"[rank: {rank}] ") for message in caplog.messages)


def fit(values: list[float], callback: EarlyStopping, where: str = "on_validation_epoch_end", **settings: Any) -> Any:
    """Train with two batches an epoch on a module that logs one of the values at each call of ``where``; the trainer."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    remaining = iter(values)

    class Model(BoringModel):
        pass

    def hook(self: Any) -> None:
        if not self.trainer.sanity_checking:
            self.log("metric", torch.tensor(next(remaining)))

    setattr(Model, where, hook)
    ckpt_path = settings.pop("ckpt_path", None)
    limits = {"max_epochs": len(values), "limit_train_batches": 2, "limit_val_batches": 1}
    trainer = Trainer(callbacks=callback, **{**QUIET, **limits, **settings})
    trainer.fit(Model(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("values", "settings", "epochs", "steps"),
    [
        ([1.0, 2.0, 3.0, 4.0], {}, 3, 6),
        ([1.0, 2.0, 3.0, 4.0, 5.0], {"min_epochs": 4}, 4, 8),
        ([1.0, 2.0, 3.0, 4.0, 5.0], {"min_steps": 7}, 4, 8),
        ([1.0, 2.0, 3.0, 0.5, 0.6, 0.7, 0.8], {"min_epochs": 4}, 6, 12),
        ([1.0, 2.0, 3.0, 0.5, 0.4], {"min_epochs": 4}, 5, 10),
    ],
)
def test_run_ends_after_the_epoch_that_calls_for_it(values: list[float], settings: dict[str, Any], epochs: int, steps: int) -> None:
    callback = EarlyStopping("metric", patience=2)
    trainer = fit(values, callback, **settings)
    assert (trainer.current_epoch, trainer.global_step) == (epochs, steps)
    stopped = epochs < len(values)
    assert callback.stopped_epoch == (epochs - 1 if stopped else 0)
    assert (callback.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED) == stopped


@pytest.mark.parametrize(("interval", "steps"), [(0.5, 6), (2, 6), (0.25, 3)])
def test_run_ends_within_the_epoch_when_validation_calls_for_it(interval: float, steps: int) -> None:
    callback = EarlyStopping("metric", patience=2)
    trainer = fit([1.0, 2.0, 3.0, 4.0], callback, val_check_interval=interval, limit_train_batches=4, max_epochs=3)
    assert trainer.global_step == steps
    assert callback.wait_count == 2


def test_run_can_end_on_a_training_metric() -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Model(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("metric", float(self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = Trainer(callbacks=EarlyStopping("metric", patience=2), max_epochs=9, limit_train_batches=2, limit_val_batches=0, **QUIET)
    trainer.fit(Model())
    assert trainer.current_epoch == 3


def test_run_on_a_missing_metric_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"`val_loss`.*`metric`"):
        fit([1.0, 2.0], EarlyStopping("val_loss"))


def test_fast_dev_run_neither_checks_nor_stops() -> None:
    fit([NAN], EarlyStopping("metric"), fast_dev_run=True)
    fit([1.0], EarlyStopping("val_loss"), fast_dev_run=True)


def test_resumed_run_goes_on_counting() -> None:
    first = EarlyStopping("metric", patience=3)
    trainer = fit([1.0, 2.0], first)
    trainer.save_checkpoint("after-two.ckpt")
    second = EarlyStopping("metric", patience=3)
    trainer = fit([2.0, 2.0, 2.0], second, ckpt_path="after-two.ckpt", max_epochs=9)
    assert trainer.current_epoch == 4
    assert (second.wait_count, second.best_score) == (3, 1.0)
