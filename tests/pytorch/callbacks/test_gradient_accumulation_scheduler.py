"""GradientAccumulationScheduler: its schedule, and what it refuses."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler


def boring(*overrides: str, automatic: bool = True) -> Any:
    """A module of which the named hooks are overridden."""
    from lightning.pytorch.core.module import LightningModule

    module = type("Module", (LightningModule,), {name: lambda self, *args, **kwargs: None for name in overrides})()
    module.automatic_optimization = automatic
    return module


@pytest.mark.parametrize(
    ("scheduling", "factors", "accumulates"),
    [
        ({0: 2}, [2, 2, 2, 2, 2], True),
        ({2: 4}, [1, 1, 4, 4, 4], True),
        ({3: 4, 1: 2}, [1, 2, 2, 4, 4], True),
        ({0: 8, 1: 1}, [8, 1, 1, 1, 1], True),
        ({1: 1}, [1, 1, 1, 1, 1], False),
    ],
)
def test_factor_holds_from_its_epoch_on(scheduling: dict[int, int], factors: list[int], accumulates: bool) -> None:
    given = dict(scheduling)
    callback = GradientAccumulationScheduler(scheduling)
    assert [callback.get_accumulate_grad_batches(epoch) for epoch in range(5)] == factors
    assert callback.going_to_accumulate_grad_batches() is accumulates
    assert scheduling == given


@pytest.mark.parametrize("scheduling", [{}, None, [1, 2], 5])
def test_schedule_of_another_type_is_refused(scheduling: Any) -> None:
    with pytest.raises(TypeError, match="a dict of at least one entry"):
        GradientAccumulationScheduler(scheduling)


@pytest.mark.parametrize(
    ("scheduling", "said"),
    [
        ({"0": 2}, "epoch must be an integer >= 0, got '0'"),
        ({-1: 2}, "got -1"),
        ({0.5: 2}, "got 0.5"),
        ({0: "2"}, "number of batches must be an integer >= 1, got '2'"),
        ({0: 0}, "got 0"),
        ({0: 2.0}, "got 2.0"),
    ],
)
def test_schedule_with_a_wrong_entry_is_refused(scheduling: Any, said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        GradientAccumulationScheduler(scheduling)


def test_trainer_gets_the_factor_of_each_epoch() -> None:
    callback = GradientAccumulationScheduler({1: 2, 3: 4})
    trainer = SimpleNamespace(accumulate_grad_batches=1, current_epoch=0)
    callback.on_train_start(trainer, boring())
    seen = []
    for trainer.current_epoch in range(4):
        callback.on_train_epoch_start(trainer, None)
        seen.append(trainer.accumulate_grad_batches)
    assert seen == [1, 2, 2, 4]
    # A second fit finds what the first one left behind.
    callback.on_train_start(trainer, boring())


def test_run_that_resumes_within_an_epoch_gets_its_factor() -> None:
    trainer = SimpleNamespace(accumulate_grad_batches=1, current_epoch=3)
    GradientAccumulationScheduler({1: 2, 3: 4}).on_train_start(trainer, boring())
    assert trainer.accumulate_grad_batches == 4


def test_trainer_that_accumulates_itself_is_refused() -> None:
    trainer = SimpleNamespace(accumulate_grad_batches=2, current_epoch=0)
    with pytest.raises(ValueError, match=r"Trainer\(accumulate_grad_batches=2\)"):
        GradientAccumulationScheduler({1: 2}).on_train_start(trainer, boring())


def test_manual_optimization_is_refused() -> None:
    trainer = SimpleNamespace(accumulate_grad_batches=1, current_epoch=0)
    with pytest.raises(RuntimeError, match="automatic optimization"):
        GradientAccumulationScheduler({1: 2}).on_train_start(trainer, boring(automatic=False))


@pytest.mark.parametrize("overrides", [("optimizer_step",), ("optimizer_zero_grad",), ("optimizer_step", "optimizer_zero_grad")])
def test_overridden_optimizer_hooks_are_warned_about(overrides: tuple[str, ...]) -> None:
    trainer = SimpleNamespace(accumulate_grad_batches=1, current_epoch=0)
    with pytest.warns(UserWarning, match=f"overrides {' and '.join(f'`{name}`' for name in overrides)}: .*once per optimizer step"):
        GradientAccumulationScheduler({1: 2}).on_train_start(trainer, boring(*overrides))


def test_overridden_optimizer_hooks_are_fine_without_accumulation() -> None:
    trainer = SimpleNamespace(accumulate_grad_batches=1, current_epoch=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradientAccumulationScheduler({1: 1}).on_train_start(trainer, boring("optimizer_step"))


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(callback: GradientAccumulationScheduler, ckpt_path: str | None = None, **settings: Any) -> Any:
    """Train with four batches an epoch; the trainer."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = Trainer(callbacks=callback, **{"max_epochs": 5, "limit_train_batches": 4, "limit_val_batches": 0, **settings}, **QUIET)
    trainer.fit(BoringModel(), ckpt_path=ckpt_path)
    return trainer


def test_run_takes_the_steps_of_the_schedule() -> None:
    assert fit(GradientAccumulationScheduler({1: 2, 3: 4})).global_step == 4 + 2 + 2 + 1 + 1


def test_run_can_be_repeated_with_the_same_trainer() -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = fit(GradientAccumulationScheduler({1: 2}), max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(BoringModel())
    assert trainer.global_step == 4 + 2 + 2


def test_run_that_resumes_keeps_the_schedule() -> None:
    fit(GradientAccumulationScheduler({1: 2}), max_epochs=2).save_checkpoint("two.ckpt")
    assert fit(GradientAccumulationScheduler({1: 2}), max_epochs=3, ckpt_path="two.ckpt").global_step == 4 + 2 + 2


def test_trainer_refuses_two_ways_to_accumulate() -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        fit(GradientAccumulationScheduler({1: 2}), accumulate_grad_batches=2)
