"""Arguments of ``__init__`` and attribute look-up."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import pytest

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.utilities.parsing import (
    clean_namespace,
    collect_init_args,
    get_init_args,
    is_picklable,
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
    parse_class_init_keys,
    save_hyperparameters,
)


class Model(LightningModule):
    def __init__(self, a: Any, b: Any = 2, *rest: Any, c: Any, **more: Any) -> None:
        super().__init__()
        frame = inspect.currentframe()
        assert frame is not None
        self.own = get_init_args(frame)
        self.all = collect_init_args(frame, [])
        self.none = collect_init_args(frame, [], classes=(BoringModel,))


class Child(Model):
    def __init__(self, q: Any, **more: Any) -> None:
        super().__init__(q, c=5, **more)


def test_arguments_are_collected_from_the_inner_to_the_outer_class() -> None:
    model = Child(1, z=4)
    assert model.own == {"a": 1, "b": 2, "c": 5, "z": 4}
    assert model.all == [{"a": 1, "b": 2, "c": 5, "z": 4}, {"q": 1, "z": 4}]
    assert model.none == []


def test_frame_that_is_no_init_has_no_arguments() -> None:
    frame = inspect.currentframe()
    assert frame is not None
    assert get_init_args(frame) == {}


def test_names_of_instance_and_variable_arguments_are_found() -> None:
    assert parse_class_init_keys(Model) == ("self", "rest", "more")
    assert parse_class_init_keys(BoringModel) == ("self", None, None)


def test_given_hparams_take_the_place_of_the_arguments_of_init() -> None:
    model = BoringModel()
    save_hyperparameters(model, given_hparams={"a": 1, "b": 2}, ignore="b")
    assert model.hparams == {"a": 1}


def test_what_can_not_be_pickled_is_removed_with_a_warning() -> None:
    hparams = {"a": 1, "f": lambda: 1, "g": len}
    with pytest.warns(UserWarning, match="'f' was removed"):
        clean_namespace(hparams)
    assert hparams == {"a": 1, "g": len}


def test_is_picklable_never_raises() -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            raise ValueError

    assert is_picklable(argparse.Namespace())
    assert not is_picklable(Hostile())


@pytest.fixture
def model() -> BoringModel:
    model = BoringModel()
    model.save_hyperparameters({"both": 1, "batch_size": 8, "nested": {"lr": 1}})
    model.both = 50
    model.own = 3
    return model


def test_attribute_is_found_on_the_module_and_in_its_hyperparameters(model: BoringModel) -> None:
    assert [lightning_hasattr(model, name) for name in ("own", "batch_size", "absent", "lr")] == [True, True, False, False]
    assert (lightning_getattr(model, "own"), lightning_getattr(model, "batch_size")) == (3, 8)
    assert lightning_getattr(model, "both") == 1


def test_attribute_is_set_wherever_it_exists(model: BoringModel) -> None:
    lightning_setattr(model, "both", 7)
    lightning_setattr(model, "own", 4)
    assert (model.both, model.hparams.both, model.own) == (7, 7, 4)
    assert "own" not in model.hparams


def test_attribute_of_the_datamodule_counts_most(model: BoringModel) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1, enable_checkpointing=False, enable_progress_bar=False)
    datamodule = BoringDataModule()
    datamodule.both = 70
    datamodule.save_hyperparameters({"data_lr": 1})
    model.trainer = trainer
    trainer.datamodule = datamodule
    assert lightning_getattr(model, "both") == 70
    assert lightning_getattr(model, "data_lr") == 1
    lightning_setattr(model, "both", 9)
    assert (model.both, model.hparams.both, datamodule.both) == (9, 9, 9)


def test_absent_attribute_is_named(model: BoringModel) -> None:
    for action in (lambda: lightning_getattr(model, "absent"), lambda: lightning_setattr(model, "absent", 1)):
        with pytest.raises(AttributeError, match="'absent' is neither an attribute nor a hyperparameter of BoringModel"):
            action()
