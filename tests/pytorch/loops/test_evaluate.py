"""``validate`` and ``test``: what they run, what they return, and what state they leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

BOTH = pytest.mark.parametrize("task", ["validate", "test"])


def step_of(task: str) -> str:
    return "validation_step" if task == "validate" else "test_step"


# ---- what is returned -----------------------------------------------------------------------------------------------


@BOTH
def test_one_loader_gives_one_dict_of_floats(Evaluated: Any, make_trainer: Any, numbers: Any, task: str) -> None:
    results = getattr(make_trainer(), task)(Evaluated(), numbers(4), verbose=False)
    assert results == [{"val" if task == "validate" else "test": 1.5}]
    assert all(type(value) is float for value in results[0].values())


@BOTH
@pytest.mark.parametrize("form", [list, tuple, lambda loaders: dict(zip("ab", loaders))], ids=["list", "tuple", "dict"])
def test_several_loaders_give_a_dict_each(Weight: Any, make_trainer: Any, numbers: Any, task: str, form: Any) -> None:
    def step(self: Any, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        self.log("x", batch.mean())
        self.log(f"only {dataloader_idx}", 1.0, add_dataloader_idx=False)

    def epoch_end(self: Any) -> None:
        self.log("all", 7.0)

    hook = "on_validation_epoch_end" if task == "validate" else "on_test_epoch_end"
    model = type("Model", (Weight,), {step_of(task): step, hook: epoch_end})()
    results = getattr(make_trainer(), task)(model, form([numbers(2), numbers(3, start=5)]), verbose=False)
    assert results == [
        {"x/dataloader_idx_0": 0.5, "only 0": 1.0, "all": 7.0},
        {"x/dataloader_idx_1": 6.0, "only 1": 1.0, "all": 7.0},
    ]


@BOTH
def test_step_and_epoch_values_return_the_epoch_value(Weight: Any, make_trainer: Any, numbers: Any, task: str) -> None:
    def step(self: Any, batch: Tensor, batch_idx: int) -> None:
        self.log("x", batch.mean(), on_step=True, on_epoch=True)
        self.log("step only", batch.mean(), on_step=True, on_epoch=False)

    model = type("Model", (Weight,), {step_of(task): step})()
    assert getattr(make_trainer(), task)(model, numbers(3), verbose=False) == [{"x_epoch": 1.0}]


@BOTH
def test_nothing_logged_gives_an_empty_dict_and_no_batches_an_empty_list(Weight: Any, make_trainer: Any, numbers: Any, task: str) -> None:
    model = type("Model", (Weight,), {step_of(task): lambda self, batch, batch_idx: None})()
    assert getattr(make_trainer(), task)(model, numbers(2), verbose=False) == [{}]
    limit = "limit_val_batches" if task == "validate" else "limit_test_batches"
    assert getattr(make_trainer(**{limit: 0}), task)(model, numbers(2), verbose=False) == []


@pytest.mark.parametrize(("limit", "expected"), [(3, 1.0), (0.5, 2.0), (1.0, 4.5), (100, 4.5), (None, 4.5)])
def test_limits_are_counts_or_fractions(Evaluated: Any, make_trainer: Any, numbers: Any, limit: Any, expected: float) -> None:
    assert make_trainer(limit_val_batches=limit).validate(Evaluated(), numbers(10), verbose=False) == [{"val": expected}]


def test_table_is_printed_only_where_wanted(Evaluated: Any, make_trainer: Any, numbers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    trainer.validate(Evaluated(), numbers(2), verbose=False)
    assert capsys.readouterr().out == ""
    trainer.validate(Evaluated(), numbers(2))
    assert "val" in capsys.readouterr().out


def test_step_value_that_is_new_in_a_later_batch_goes_to_the_loggers(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("epoch", 0.0)
            if batch_idx > 0:
                self.log("late", batch.mean(), on_step=True, on_epoch=False)

    logger = Rows()
    make_trainer(logger=logger).validate(Model(), numbers(3), verbose=False)
    assert logger.of("late") == [(1, 1.0), (2, 2.0)]


# ---- how steps are called -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "taken"),
    [
        (lambda self, batch: self.note(batch.item()), [0.0, 1.0]),
        (lambda self, x, i: self.note((x.item(), i)), [(0.0, 0), (1.0, 1)]),
        (lambda self, x, i, dataloader_idx=0: self.note((x.item(), i, dataloader_idx)), [(0.0, 0, 0), (1.0, 1, 0)]),
        (lambda self, *args: self.note(len(args)), [2, 2]),
    ],
    ids=["batch", "batch and index", "default loader", "anything"],
)
def test_step_with_one_loader_may_take_what_it_likes(Weight: Any, make_trainer: Any, numbers: Any, step: Any, taken: Any) -> None:
    seen: list[Any] = []
    model = type("Model", (Weight,), {"test_step": step, "note": lambda self, value: seen.append(value)})()
    make_trainer().test(model, numbers(2), verbose=False)
    assert seen == taken


@pytest.mark.parametrize(
    ("step", "taken"),
    [
        (lambda self, batch, dataloader_idx: self.note((batch.item(), dataloader_idx)), [(0.0, 0), (5.0, 1)]),
        (lambda self, x, i, which: self.note((x.item(), i, which)), [(0.0, 0, 0), (5.0, 0, 1)]),
        (lambda self, *args: self.note(len(args)), [3, 3]),
    ],
    ids=["without index", "any name", "anything"],
)
def test_step_with_several_loaders_is_told_which(Weight: Any, make_trainer: Any, numbers: Any, step: Any, taken: Any) -> None:
    seen: list[Any] = []
    model = type("Model", (Weight,), {"test_step": step, "note": lambda self, value: seen.append(value)})()
    make_trainer().test(model, [numbers(1), numbers(1, start=5)], verbose=False)
    assert seen == taken


def test_step_that_does_not_fit_the_number_of_loaders_is_refused(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    one = type("Model", (Weight,), {"test_step": lambda self, batch, batch_idx: None})()
    with pytest.raises(RuntimeError, match="does not take `dataloader_idx`"):
        make_trainer().test(one, [numbers(1), numbers(1)], verbose=False)
    several = type("Model", (Weight,), {"test_step": lambda self, batch, batch_idx, dataloader_idx: None})()
    with pytest.raises(RuntimeError, match="there is only one loader"):
        make_trainer().test(several, numbers(1), verbose=False)


def test_outputs_reach_the_hooks_as_they_are(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    returned, seen = [torch.zeros(()), {"a": 1}, None, 1.5, [2]], []

    class Look(Callback):
        def on_test_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            seen.append(outputs)

    model = type("Model", (Weight,), {"test_step": lambda self, batch, batch_idx: returned[batch_idx]})()
    make_trainer(callbacks=[Look()]).test(model, numbers(5), verbose=False)
    assert all(a is b for a, b in zip(returned, seen, strict=True))


def test_combined_loader_of_batches_side_by_side_is_one_loader(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[Any] = []

    def step(self: Any, batch: Any, batch_idx: int) -> None:
        seen.append([None if part is None else part.item() for part in batch])

    model = type("Model", (Weight,), {"test_step": step})()
    make_trainer().test(model, CombinedLoader([numbers(3), numbers(2, start=5)], "max_size"), verbose=False)
    assert seen == [[0.0, 5.0], [1.0, 6.0], [2.0, None]]
    seen.clear()
    make_trainer(limit_test_batches=1).test(model, CombinedLoader([numbers(3), numbers(2, start=5)], "min_size"), verbose=False)
    assert seen == [[0.0, 5.0]]


# ---- which mode, which gradients ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("inference_mode", [True, False])
def test_steps_run_in_evaluation_mode_without_gradients(
    Weight: Any, make_trainer: Any, numbers: Any, task: str, inference_mode: bool
) -> None:
    seen: set[tuple[bool, ...]] = set()

    def step(self: Any, batch: Tensor, batch_idx: int) -> None:
        seen.add((self.training, self.part.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    model = type("Model", (Weight,), {step_of(task): step})()
    model.part = nn.Dropout()
    getattr(make_trainer(inference_mode=inference_mode), task)(model, numbers(1), verbose=False)
    assert seen == {(False, False, False, inference_mode)}
    assert model.training
    assert model.part.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@BOTH
def test_modes_and_gradients_are_restored_after_an_error(Weight: Any, make_trainer: Any, numbers: Any, task: str) -> None:
    def step(self: Any, batch: Tensor, batch_idx: int) -> None:
        raise RuntimeError("boom")

    model = type("Model", (Weight,), {step_of(task): step})()
    model.part = nn.Dropout().eval()
    trainer = make_trainer()
    with pytest.raises(RuntimeError, match="boom"):
        getattr(trainer, task)(model, numbers(1), verbose=False)
    assert (model.training, model.part.training) == (True, False)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert trainer.interrupted


def test_gradients_may_be_turned_on_in_a_step_without_inference_mode(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    def step(self: Any, batch: Tensor, batch_idx: int) -> None:
        with torch.enable_grad():
            (self.weight * 2).backward()

    model = type("Model", (Weight,), {"test_step": step})()
    make_trainer(inference_mode=False).test(model, numbers(1), verbose=False)
    assert model.weight.grad.item() == 2.0


# ---- which model, which data ----------------------------------------------------------------------------------------


def test_model_of_the_last_run_is_evaluated_where_none_is_given(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer()
    with pytest.raises(TypeError, match="needs a model"):
        trainer.validate(dataloaders=numbers(1))
    trainer.fit(Evaluated(), numbers(1), numbers(3))
    assert trainer.test(dataloaders=numbers(3), verbose=False) == [{"test": 1.0}]


def test_evaluation_does_not_touch_the_progress_of_training(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    model, trainer = Evaluated(), make_trainer(max_epochs=2)
    trainer.fit(model, numbers(3), numbers(1))
    trainer.validate(model, numbers(5), verbose=False)
    trainer.test(model, numbers(5), verbose=False)
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, numbers(3), numbers(1))
    assert (trainer.current_epoch, trainer.global_step) == (3, 9)


def test_datamodule_gives_the_loaders(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Data(LightningDataModule):
        def val_dataloader(self) -> Any:
            return numbers(3)

        def test_dataloader(self) -> Any:
            return numbers(5)

    trainer = make_trainer()
    assert trainer.validate(Evaluated(), datamodule=Data(), verbose=False) == [{"val": 1.0}]
    assert trainer.test(Evaluated(), Data(), verbose=False) == [{"test": 2.0}]


def test_every_run_asks_for_the_loader_anew(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    asked: list[str] = []

    class Model(Weight):  # type: ignore[misc]
        def test_dataloader(self) -> Any:
            asked.append("test")
            return numbers(1)

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

    model, trainer = Model(), make_trainer()
    trainer.test(model, verbose=False)
    trainer.test(model, verbose=False)
    assert asked == ["test", "test"]


def test_stream_that_gives_nothing_is_told(Evaluated: Any, make_trainer: Any, stream: Any) -> None:
    with pytest.warns(UserWarning, match="gave no batch"):
        assert make_trainer().validate(Evaluated(), stream(0), verbose=False) == [{}]
