"""How many Python calls into the package a step costs, counted: the same on every machine, where timings are not.

A call is one into a function of ``lightning``, or a generator of it that goes on; what torch and the user's code call
among themselves is not counted. Only the middle of a run counts, where everything is bound and nothing is due.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

PACKAGE = str(Path(lightning.__file__).parent)
STEPS = 40
STEADY = slice(10, 30)  # of the steps: neither the first ones nor the end of the epoch

# What was measured when this was written, and one or two more. The requirement is 30 bare, and 5 for each logged value.
BARE = 18
ONE_LOG = 4  # each more
ONE_LOG_WITH_EPOCH = 4  # each more, the first one infers the batch's size
VALIDATION = 6
VALIDATION_LOG = 4  # each more
PREDICTION = 5
STREAM = 10  # of an iterator over predictions


class Model(LightningModule):
    """A model that does next to nothing, and logs what it is told to."""

    def __init__(self, logs: int = 0, **options: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.names = [f"metric_{i}" for i in range(logs)]
        self.options = options

    def step(self, batch: Tensor) -> Tensor:
        loss = self.layer(batch).sum()
        for name in self.names:
            self.log(name, loss, **self.options)
        return loss  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validating(Model):
    """The same with validation."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.step(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.step(batch)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(batch)


class Counter:
    """A profile function that counts calls into the package from one step to the next."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.calls: list[str] = []
        self.per_step: list[list[str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            self.calls.append(f"{code.co_filename[len(PACKAGE) + 1 :]}:{code.co_name}")
        elif code.co_name == self.step and code.co_filename == __file__:
            self.per_step.append(self.calls)
            self.calls = []


def trainer(**arguments: Any) -> Trainer:
    plain: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(**{**plain, **arguments})


def batches() -> Any:
    return DataLoader([torch.ones(3, 2)] * STEPS, batch_size=None)  # type: ignore[arg-type]


def counted(step: str, run: Callable[[], Any]) -> list[list[str]]:
    """The calls of each steady step."""
    counter = Counter(step)
    outer = sys.getprofile()
    sys.setprofile(counter)
    try:
        run()
    finally:
        sys.setprofile(outer)
    steady = counter.per_step[STEADY]
    assert len(steady) == 20
    return steady


def training(model: LightningModule | None = None, **arguments: Any) -> list[list[str]]:
    """The calls of each steady training step."""
    chosen = Model() if model is None else model
    return counted("training_step", lambda: trainer(**arguments).fit(chosen, batches()))


def validation(model: LightningModule | None = None, **arguments: Any) -> list[list[str]]:
    """The calls of each steady validation step."""
    chosen = Validating() if model is None else model
    return counted("validation_step", lambda: trainer(**arguments).validate(chosen, batches(), verbose=False))


def evaluation(entry: str, model: LightningModule | None = None, **arguments: Any) -> list[list[str]]:
    """The calls of each steady step of ``"test"``, ``"predict"`` or ``"predict_stream"``, of which nothing is kept."""
    chosen = Validating() if model is None else model

    def run() -> None:
        runner = trainer(**arguments)
        if entry == "test":
            runner.test(chosen, batches(), verbose=False)
        elif entry == "predict":
            runner.predict(chosen, batches(), return_predictions=False)
        else:
            for _ in runner.predict_stream(chosen, batches()):
                pass

    return counted("test_step" if entry == "test" else "predict_step", run)


def cost(steps: list[list[str]]) -> int:
    """The calls of the dearest step."""
    return max(len(calls) for calls in steps)


def within(steps: list[list[str]], budget: int) -> bool:
    """Whether each step keeps to the budget; shows what was called where not."""
    dearest = max(steps, key=len)
    assert len(dearest) <= budget, f"{len(dearest)} calls, {budget} are allowed:\n" + "\n".join(dearest)
    return True


def test_a_bare_training_step_keeps_to_its_budget() -> None:
    assert within(training(), BARE)


def test_every_step_costs_the_same() -> None:
    assert len({len(calls) for calls in training()}) == 1


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, ONE_LOG),
        ({"prog_bar": True}, ONE_LOG),
        ({"on_step": True, "on_epoch": True}, ONE_LOG_WITH_EPOCH),
        ({"on_step": False, "on_epoch": True, "reduce_fx": "max"}, ONE_LOG_WITH_EPOCH),
        ({"on_step": True, "on_epoch": True, "batch_size": 3}, ONE_LOG_WITH_EPOCH),
    ],
    ids=str,
)
def test_each_more_logged_value_keeps_to_its_budget(options: dict[str, Any], budget: int) -> None:
    one, five = cost(training(Model(1, **options))), cost(training(Model(5, **options)))
    assert five - one <= 4 * budget
    assert one <= BARE + 6


def test_inferring_the_size_of_the_batch_costs_once_for_all_values() -> None:
    inferred = cost(training(Model(5, on_step=True, on_epoch=True)))
    told = cost(training(Model(5, on_step=True, on_epoch=True, batch_size=3)))
    assert inferred - told <= 2


def test_a_callback_that_overrides_nothing_costs_nothing() -> None:
    class Idle(Callback):
        pass

    class NotInSteps(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pass

    assert cost(training(callbacks=[Idle(), NotInSteps(), Idle.__new__(Idle)])) == cost(training())


def test_a_hook_that_nobody_overrides_costs_nothing_in_validation() -> None:
    class NotInSteps(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            pass

    assert cost(validation(callbacks=NotInSteps())) == cost(validation())


def test_an_overridden_hook_keeps_to_its_budget() -> None:
    class Listening(Model):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    class Listener(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pass

    bare = cost(training())
    assert cost(training(Listening())) <= bare + 1
    assert cost(training(callbacks=Listener())) <= bare + 2
    assert cost(training(Listening(), callbacks=Listener())) <= bare + 2


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [
        ({"accumulate_grad_batches": 4}, 20),
        ({"gradient_clip_val": 1.0}, 27),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, 29),
        ({"precision": "bf16-mixed"}, 29),
        ({"precision": "bf16-mixed", "gradient_clip_val": 1.0}, 37),
        ({"precision": "64-true"}, 26),
    ],
    ids=str,
)
def test_a_training_step_with_options_keeps_to_its_budget(arguments: dict[str, Any], budget: int) -> None:
    assert within(training(**arguments), budget)


def test_a_batch_without_an_update_costs_less_than_a_bare_step() -> None:
    lengths = sorted(len(calls) for calls in training(accumulate_grad_batches=4))
    assert lengths[len(lengths) * 3 // 4 - 1] < BARE


def test_a_scheduler_for_each_step_keeps_to_its_budget() -> None:
    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    assert within(training(Scheduled()), BARE + 3)


def test_a_manual_step_keeps_to_its_budget() -> None:
    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()

    assert within(training(Manual()), 40)


def test_a_logger_costs_nothing_between_two_rows() -> None:
    with_logger = training(Model(1), logger=CSVLogger("."), log_every_n_steps=STEPS)
    assert cost(with_logger) == cost(training(Model(1)))


def test_a_checkpoint_callback_keeps_to_its_budget() -> None:
    assert within(training(callbacks=ModelCheckpoint(dirpath="."), enable_checkpointing=True), BARE + 3)


def test_a_progress_bar_that_is_not_redrawn_keeps_to_its_budget() -> None:
    assert within(training(callbacks=TQDMProgressBar(refresh_rate=STEPS), enable_progress_bar=True), BARE + 3)


def test_validation_steps_keep_to_their_budget() -> None:
    assert within(validation(), VALIDATION)
    one, five = cost(validation(Validating(1))), cost(validation(Validating(5)))
    assert five - one <= 4 * VALIDATION_LOG
    assert one <= VALIDATION + 5


def test_steps_of_a_test_keep_to_the_budget_of_validation() -> None:
    assert within(evaluation("test"), VALIDATION)
    one, five = cost(evaluation("test", Validating(1))), cost(evaluation("test", Validating(5)))
    assert five - one <= 4 * VALIDATION_LOG
    assert one <= VALIDATION + 5


def test_predictions_keep_to_their_budget() -> None:
    assert within(evaluation("predict"), PREDICTION)
    assert within(evaluation("predict_stream"), STREAM)


@pytest.mark.parametrize("entry", ["test", "predict", "predict_stream"])
def test_a_hook_that_nobody_overrides_costs_nothing_in_evaluation(entry: str) -> None:
    class NotInSteps(Callback):
        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            pass

        def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
            pass

    assert cost(evaluation(entry, callbacks=NotInSteps())) == cost(evaluation(entry))


def test_a_prediction_that_is_kept_costs_one_call_more() -> None:
    kept = counted("predict_step", lambda: trainer().predict(Validating(), batches()))
    assert cost(kept) <= PREDICTION + 2


def frames_above(step: str) -> list[str]:
    """The package's frames between a call of fit and a step, outermost first."""
    found: list[str] = []

    def look(self: Model, batch: Tensor, batch_idx: int) -> Tensor:
        frame: FrameType | None = sys._getframe()
        found.clear()
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                found.append(frame.f_code.co_name)
            frame = frame.f_back
        return self.step(batch)

    looking = type("Looking", (Validating,), {step: look})
    trainer(limit_train_batches=2, limit_val_batches=2, num_sanity_val_steps=0).fit(looking(), batches(), batches())
    return found[::-1]


def test_seven_frames_lead_from_fit_to_the_training_step() -> None:
    frames = frames_above("training_step")
    assert frames[0] == "fit"
    assert len(frames) <= 7, frames


def test_eight_frames_lead_from_fit_to_the_validation_step() -> None:
    frames = frames_above("validation_step")
    assert frames[0] == "fit"
    assert len(frames) <= 8, frames
