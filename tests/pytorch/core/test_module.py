"""The module itself: with and without a trainer, copied, frozen, printing, gathering."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

MakeTrainer = Callable[..., Any]


class Model(LightningModule):
    """Does ``action(model)`` in its first training step; defined here, so that it can be pickled."""

    def __init__(self, action: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.action = action

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.action is not None and batch_idx == 0:
            self.action(self)
        return self(batch).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count: int = 2) -> DataLoader[Tensor]:
    return DataLoader(torch.ones(count, 1))  # type: ignore[arg-type]


def do(make_trainer: MakeTrainer, action: Callable[[Any], Any], **arguments: Any) -> Any:
    """What ``action`` returns when it is called in a training step."""
    results: list[Any] = []
    make_trainer(**arguments).fit(Model(lambda model: results.append(action(model))), data())
    (result,) = results
    return result


# ---- without a trainer -----------------------------------------------------------------------------------------------


def test_without_a_trainer_attributes_have_neutral_values() -> None:
    model = Model()
    assert (model.current_epoch, model.global_step, model.global_rank, model.local_rank) == (0, 0, 0, 0)
    assert (model.logger, model.loggers, model.fabric, model.device_mesh, model.example_input_array) == (None, [], None, None, None)
    assert (model.automatic_optimization, model.strict_loading, model.on_gpu) == (True, True, False)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.trainer,
        lambda m: m.optimizers(),
        lambda m: m.lr_schedulers(),
        lambda m: m.print("x"),
        lambda m: m.all_gather(torch.ones(1)),
        lambda m: m.toggle_optimizer(torch.optim.SGD(m.parameters(), lr=1.0)),
        lambda m: m.clip_gradients(torch.optim.SGD(m.parameters(), lr=1.0)),
    ],
)
def test_what_needs_a_trainer_says_so(use: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"Model is not attached to a `Trainer`: `self\.trainer` exists once the module was passed"):
        use(Model())


def test_steps_and_optimizers_that_nobody_defined_warn_or_do_nothing() -> None:
    model = LightningModule()
    with pytest.warns(UserWarning, match="`training_step` must be implemented"):
        assert model.training_step(None, 0) is None
    with pytest.warns(UserWarning, match="`configure_optimizers` must be implemented"):
        assert model.configure_optimizers() is None
    assert model.validation_step(None, 0) is None
    assert model.test_step(None, 0) is None
    assert model.configure_callbacks() == []
    with pytest.raises(NotImplementedError):
        model(1)


@pytest.mark.parametrize(
    ("stage", "function", "argument"),
    [("train", "fit", "train_dataloaders"), ("val", "validate", "dataloaders"), ("test", "test", "dataloaders")],
)
def test_a_missing_loader_says_who_needs_it_and_how_to_give_it(stage: str, function: str, argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"`Trainer\.{function}` needs data: pass `{argument}=` to it, or a `datamodule=`"):
        getattr(Model(), f"{stage}_dataloader")()


def test_prediction_calls_the_module_with_the_batch() -> None:
    model = Model()
    batch = torch.ones(1, 1)
    assert model.predict_step(batch, 0) == model(batch)
    assert model.predict_step(batch=batch, batch_idx=0) == model(batch)


def test_logging_without_a_trainer_warns() -> None:
    with pytest.warns(UserWarning, match=r"`self\.log\('loss', \.\.\.\)` was called on a Model that no Trainer runs"):
        Model().log("loss", 1.0)


def test_backward_and_zero_grad_can_be_called_by_hand() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.backward(model(torch.ones(1, 1)).sum())
    assert model.layer.weight.grad is not None
    model.optimizer_step(0, 0, optimizer)
    model.optimizer_zero_grad(0, 0, optimizer)
    assert model.layer.weight.grad is None


def test_settings_can_be_set_and_read() -> None:
    model = Model()
    model.automatic_optimization = False
    model.strict_loading = False
    model.example_input_array = torch.ones(1, 1)
    assert (model.automatic_optimization, model.strict_loading) == (False, False)
    assert torch.equal(model.example_input_array, torch.ones(1, 1))


@pytest.mark.parametrize("arguments", [((1,), {}), ((), {"foo": 1})])
def test_init_takes_no_arguments(arguments: Any) -> None:
    args, kwargs = arguments
    with pytest.raises(TypeError):
        LightningModule(*args, **kwargs)


def test_setting_an_attribute_before_init_fails_as_in_torch() -> None:
    class Late(LightningModule):
        def __init__(self) -> None:
            self.layer = nn.Linear(1, 1)
            super().__init__()

    with pytest.raises(AttributeError, match="cannot assign module before"):
        Late()


# ---- attached --------------------------------------------------------------------------------------------------------


def test_in_a_run_attributes_are_the_trainers(make_trainer: MakeTrainer) -> None:
    seen: list[Any] = []

    class Noting(Model):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append((self.current_epoch, self.global_step, self.global_rank, self.local_rank, self.logger, self.loggers))

    logger = CSVLogger("logs")
    trainer = make_trainer(max_epochs=2, logger=logger)
    model = Noting()
    trainer.fit(model, data(1))
    assert seen == [(0, 1, 0, 0, logger, [logger]), (1, 2, 0, 0, logger, [logger])]
    assert model.trainer is trainer
    assert trainer.lightning_module is model


def test_another_trainer_takes_over(make_trainer: MakeTrainer) -> None:
    model, first, second = Model(), make_trainer(), make_trainer()
    first.fit(model, data())
    second.fit(model, data(1))
    assert model.trainer is second
    assert model.global_step == 1


class Nested(Model):
    """Another LightningModule inside a plain container, which logs in its forward."""

    class Part(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.log("inner", 3.0)
            return self.layer(x)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Nested.Part()])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x)  # type: ignore[no-any-return]


def test_modules_in_modules_have_the_trainer_and_log(make_trainer: MakeTrainer) -> None:
    model, trainer = Nested(), make_trainer()
    trainer.fit(model, data())
    assert trainer.callback_metrics["inner"] == 3
    assert model.parts[0].trainer is trainer


def test_a_stand_in_can_be_the_trainer_in_somebodys_tests() -> None:
    model = Nested()
    model.trainer = SimpleNamespace(current_epoch=3, global_step=7)  # type: ignore[assignment]
    assert (model.current_epoch, model.parts[0].global_step) == (3, 7)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_dtype_is_that_of_the_runs_precision(precision: str, dtype: torch.dtype, make_trainer: MakeTrainer) -> None:
    model = Nested()
    seen = []
    model.on_train_start = lambda: seen.append((model.dtype, model.parts[0].dtype, model.parts[0].layer.weight.dtype))  # type: ignore
    make_trainer(precision=precision).fit(model, data(1))
    assert seen == [(dtype, dtype, dtype)]


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_of_an_attached_module_stand_alone(make_trainer: MakeTrainer) -> None:
    model, trainer = Nested(), make_trainer()
    trainer.fit(model, data())
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), duplicate.state_dict().values()))
        for module in (duplicate, duplicate.parts[0]):
            with pytest.raises(RuntimeError, match="not attached"):
                module.trainer  # noqa: B018
        with pytest.warns(UserWarning, match="no Trainer runs"):
            duplicate.log("a", 1.0)
    assert model.trainer is trainer


def test_a_copy_made_in_mid_run_leaves_the_run_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    copies: list[Any] = []
    trainer.fit(Model(lambda model: copies.append(copy.deepcopy(model))), data())
    assert trainer.global_step == 2
    other = make_trainer()
    other.fit(copies[0], data(1))
    assert other.global_step == 1


# ---- freezing --------------------------------------------------------------------------------------------------------


def test_freezing_turns_off_gradients_and_training_mode_and_unfreezing_turns_them_on() -> None:
    model = Nested()
    model.freeze()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    model.unfreeze()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


# ---- print and all_gather --------------------------------------------------------------------------------------------


def test_print_prints_once(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    do(make_trainer, lambda model: model.print("epoch", model.current_epoch, sep="-"))
    assert capsys.readouterr().out == "epoch-0\n"


@pytest.mark.parametrize("enabled", [True, False])
def test_print_goes_through_the_progress_bar_that_is_on(enabled: bool, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[Any] = []
    bar = TQDMProgressBar(refresh_rate=int(enabled))
    monkeypatch.setattr(bar, "print", lambda *args, **kwargs: printed.append((args, kwargs)))
    do(make_trainer, lambda model: model.print("x", end=""), callbacks=[bar], enable_progress_bar=True)
    assert printed == ([(("x",), {"end": ""})] if enabled else [])


def test_all_gather_on_one_device_gives_tensors_of_the_same_shape(make_trainer: MakeTrainer) -> None:
    given = {"tensor": torch.ones(2, 3), "list": [1, 2.5, True], "array": np.ones(2, dtype=np.float32), "text": "x", "none": None}
    result = do(make_trainer, lambda model: model.all_gather(given))
    assert result["tensor"].tolist() == [[1] * 3] * 2
    assert [(type(value), value.item()) for value in result["list"]] == [(Tensor, 1), (Tensor, 2.5), (Tensor, True)]
    assert result["array"].tolist() == [1, 1]
    assert (result["text"], result["none"]) == ("x", None)


@pytest.mark.parametrize("sync_grads", [True, False])
def test_gradients_flow_through_all_gather_on_one_device(sync_grads: bool, make_trainer: MakeTrainer) -> None:
    x = torch.ones(2, requires_grad=True)
    assert do(make_trainer, lambda model: model.all_gather(x, sync_grads=sync_grads)).requires_grad
