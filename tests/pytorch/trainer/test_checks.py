"""What must fit together before a run starts, and what the errors say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.checks import check_model, check_state_keys, migrated

MakeTrainer = Callable[..., Any]


class Bare(LightningModule):
    """A module without any step."""


class Trains(Bare):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return batch.sum()


def run(trainer: Any, function: str, model: Any, loader: Any) -> Any:
    return getattr(trainer, function)(model, loader)


# ---- the model ---------------------------------------------------------------------------------------------------------

FUNCTIONS = ("fit", "validate", "test", "predict")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), r"got Linear\(.*\), a torch\.nn\.modules\.linear\.Linear\. Derive your model's class from"),
        ("model", r"got 'model', a builtins\.str\. Derive"),
        (Trains, r"got <class .*a builtins\.type\. Pass an instance of the class, such as `Trains\(\)`"),
        (type("Old", (), {"__module__": "pytorch_lightning.core"})(), r"got .* Derive .* of this package, not from `pytorch_lightning`"),
    ],
)
def test_what_is_no_lightning_module_is_refused(function: str, model: Any, message: str, make_trainer: MakeTrainer, numbers: Any) -> None:
    with pytest.raises(TypeError, match=rf"`Trainer\.{function}\(model=\.\.\.\)` needs a LightningModule; {message}"):
        run(make_trainer(), function, model, numbers(1))


def test_fit_needs_a_model(make_trainer: MakeTrainer, numbers: Any) -> None:
    with pytest.raises(TypeError, match=r"got None, a builtins\.NoneType"):
        make_trainer().fit(None, numbers(1))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_module_is_taken_and_another_compiled_one_refused() -> None:
    module = Trains()
    assert check_model(torch.compile(module), "fit") is module
    with pytest.raises(TypeError, match="needs a LightningModule"):
        check_model(torch.compile(nn.Linear(1, 1)), "fit")


def test_a_long_model_is_shortened_in_the_error() -> None:
    with pytest.raises(TypeError) as error:
        check_model(nn.Sequential(*[nn.Linear(1, 1) for _ in range(50)]), "fit")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


# ---- its methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "model", "message"),
    [
        ("fit", Bare, r"`Trainer\.fit` needs `training_step`: add `def training_step\(self, batch, batch_idx\)` to Bare"),
        ("fit", Trains, r"`Trainer\.fit` needs `configure_optimizers`: add it to Trains, and return an optimizer from it"),
        ("validate", Trains, r"`Trainer\.validate` needs `validation_step`, and Trains does not define it: add `def validation_step\("),
        ("test", Trains, r"`Trainer\.test` needs `test_step`, and Trains does not define it: add `def test_step\("),
        ("predict", Trains, r"`Trainer\.predict` needs `predict_step`, or `forward`, and Trains defines neither"),
    ],
)
def test_a_missing_method_is_named(function: str, model: type, message: str, make_trainer: MakeTrainer, numbers: Any) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run(make_trainer(), function, model(), numbers(1))


def test_for_prediction_forward_is_enough(make_trainer: MakeTrainer, numbers: Any) -> None:
    class Forward(LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    assert [x.item() for x in make_trainer().predict(Forward(), numbers(2))] == [1, 2]


def test_methods_set_on_the_instance_count(make_trainer: MakeTrainer, numbers: Any) -> None:
    model = Bare()
    weight = nn.Parameter(torch.ones(1))
    model.training_step = lambda batch, batch_idx: weight.sum()  # type: ignore[method-assign]
    model.configure_optimizers = lambda: torch.optim.SGD([weight], lr=1.0)  # type: ignore[method-assign]
    make_trainer().fit(model, numbers(2))
    assert weight.item() == -1


def test_validation_without_step_or_without_loader_warns(make_trainer: MakeTrainer, Weight: Any, Evaluated: Any, numbers: Any) -> None:
    with pytest.warns(
        PossibleUserWarning, match="There is a validation loader, and Weight has no `validation_step`: fit will not validate"
    ):
        make_trainer().fit(Weight(), numbers(1), numbers(1))
    message = "Evaluated has a `validation_step`, and there is no validation loader: fit will not validate"
    with pytest.warns(PossibleUserWarning, match=message):
        make_trainer().fit(Evaluated(), numbers(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer().fit(Weight(), numbers(1))
        make_trainer().fit(Evaluated(), numbers(1), numbers(1))


def test_overrides_that_accumulation_calls_less_often_are_told(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(optimizer_closure)

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="are called once for each accumulation window, not once for each batch"):
        make_trainer(accumulate_grad_batches=2).fit(Model(), numbers(2))


def test_everything_is_refused_before_data_are_prepared(make_trainer: MakeTrainer, numbers: Any) -> None:
    calls: list[str] = []

    class Model(Trains):
        def prepare_data(self) -> None:
            calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            calls.append("setup")

    for function in ("fit", "validate", "test", "predict"):
        with pytest.raises(MisconfigurationException):
            run(make_trainer(), function, Model(), numbers(1))
    assert calls == []


# ---- callbacks and hyperparameters -----------------------------------------------------------------------------------------


class Stateful(Callback):
    def __init__(self, key: str = "same") -> None:
        self.key = key

    @property
    def state_key(self) -> str:
        return self.key

    def state_dict(self) -> dict[str, Any]:
        return {"key": self.key}


def test_callbacks_with_a_state_need_keys_of_their_own() -> None:
    with pytest.raises(RuntimeError, match=r"Two callbacks of type Stateful have the same state_key 'same'.* override the property"):
        check_state_keys([Stateful(), Callback(), Stateful()])
    check_state_keys([Stateful("a"), Stateful("b"), Callback(), Callback()])


def test_callbacks_of_the_model_are_checked_with_the_trainers(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    class Other(Stateful):
        pass

    class Model(Weight):  # type: ignore[misc]
        def configure_callbacks(self) -> Any:
            return [Other()]

    with pytest.raises(RuntimeError, match="the same state_key 'same'"):
        make_trainer(callbacks=[Stateful()]).fit(Model(), numbers(1))


class WithHparams(Trains):
    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_a_hyperparameter_that_no_checkpoint_holds_is_found_before_training(make_trainer: MakeTrainer, numbers: Any) -> None:
    def model() -> WithHparams:
        return WithHparams({"deep": [1, lambda: None]})

    trainer = make_trainer(callbacks=[ModelCheckpoint()], enable_checkpointing=True)
    message = r"The hyperparameter `hparams.*deep.*` of WithHparams is a builtins\.function, which no checkpoint can hold: .*ignore=\["
    with pytest.raises(TypeError, match=message):
        trainer.fit(model(), numbers(1))
    assert trainer.global_step == 0
    make_trainer().fit(model(), numbers(1))  # nothing will be saved


# ---- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"epoch": 1, "weights": 2}, r"a dict with the keys \['epoch', 'weights'\]"),
        ([1, 2], "a list"),
        (None, "a NoneType"),
    ],
)
def test_a_file_that_holds_something_else_is_described(content: Any, held: str) -> None:
    message = rf"The file at here\.ckpt is no checkpoint of a trainer: it holds {held}\. A checkpoint is a dict with"
    with pytest.raises(ValueError, match=message):
        migrated(content, "here.ckpt")
