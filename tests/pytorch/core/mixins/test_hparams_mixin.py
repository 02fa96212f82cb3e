"""save_hyperparameters: which arguments are kept, under which names, through class hierarchies."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import AttributeDict


class Everything(LightningModule):
    def __init__(self, a: Any, b: Any = 2, *args: Any, c: Any = 3, **kwargs: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


class Chosen(LightningModule):
    def __init__(self, a: Any, b: Any = 2, how: tuple[Any, ...] = (), ignore: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(*how, ignore=ignore)


def test_all_arguments_are_kept_and_kwargs_spread_out() -> None:
    model = Everything(1, 2, "dropped", c=5, d=6)
    assert model.hparams == {"a": 1, "b": 2, "c": 5, "d": 6}
    assert (type(model.hparams), model.hparams.d, model._hparams_name) == (AttributeDict, 6, "kwargs")


def test_named_arguments_only_are_kept() -> None:
    assert Chosen(1, 5, how=("b",)).hparams == {"b": 5}


@pytest.mark.parametrize("ignore", ["how", ["how", "b"], ("how", "absent")])
def test_ignored_arguments_are_left_out(ignore: Any) -> None:
    hparams = Chosen(1, ignore=ignore).hparams
    assert "how" not in hparams
    assert ("b" in hparams) is ("b" not in ignore)


def test_ignore_counts_for_names_and_containers_too() -> None:
    assert Chosen(1, how=("a", "b"), ignore="b").hparams == {"a": 1}
    assert Chosen(1, how=({"x": 1, "y": 2},), ignore=["y"]).hparams == {"x": 1}
    assert Chosen(1, how=(OmegaConf.create({"x": 1, "y": 2}),), ignore=["y"]).hparams == {"x": 1}


def test_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"'nope'.*\['a', 'b', 'how', 'ignore'\]"):
        Chosen(1, how=("nope",))


@dataclasses.dataclass
class Config:
    x: int = 1


@pytest.mark.parametrize(
    "container",
    [{"x": 1}, collections.OrderedDict(x=1), argparse.Namespace(x=1), AttributeDict(x=1), Config(), OmegaConf.create({"x": 1})],
    ids=lambda c: type(c).__name__,
)
def test_container_is_spread_out_and_the_argument_that_held_it_noted(container: Any) -> None:
    model = Chosen(container, how=(container,))
    assert model.hparams == {"x": 1}
    assert model.hparams.x == 1
    assert model._hparams_name == "a"
    assert isinstance(model.hparams, (AttributeDict, DictConfig))


@pytest.mark.parametrize(
    "value", [5, 1.5, True, [1], torch.nn.Linear(1, 1), object()], ids=lambda value: type(value).__name__ + str(value)[:1]
)
def test_value_that_is_no_container_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=type(value).__name__):
        Chosen(1, how=(value,))
    with pytest.raises(ValueError, match=type(value).__name__):
        Chosen(1, how=("b", value))


@pytest.mark.parametrize("empty", [None, {}, argparse.Namespace(), []], ids=str)
def test_empty_container_saves_nothing(empty: Any) -> None:
    assert Chosen(1, how=(empty,)).hparams == {}


def test_names_and_containers_together_are_all_kept() -> None:
    assert Chosen({"x": 1}, 5, how=({"x": 1}, "b")).hparams == {"x": 1, "b": 5}
    assert Chosen(1, how=({"x": 1}, argparse.Namespace(y=2))).hparams == {"x": 1, "y": 2}


class Base(LightningModule):
    def __init__(self, lr: float, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()


class Child(Base):
    def __init__(self, depth: int, lr: float = 0.1, **kwargs: Any) -> None:
        super().__init__(lr=lr * 2, **kwargs)


class SavingChild(Child):
    def __init__(self, extra: str, **kwargs: Any) -> None:
        super().__init__(3, **kwargs)
        self.save_hyperparameters(ignore="width")


def test_call_in_the_base_class_keeps_the_arguments_of_the_subclass() -> None:
    # what the subclass was given counts: load_from_checkpoint passes it to the subclass again
    assert Child(3, width=9).hparams == {"depth": 3, "lr": 0.1, "width": 9}


def test_second_call_adds_and_its_ignore_removes() -> None:
    model = SavingChild("x", width=9)
    assert model.hparams == {"depth": 3, "lr": 0.1, "extra": "x"}
    assert model.hparams_initial == model.hparams


def test_container_saved_first_stays_the_argument_that_gets_all_back() -> None:
    class Model(LightningModule):
        def __init__(self, conf: Any, extra: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters(conf)
            self.save_hyperparameters("extra")

    model = Model({"x": 1})
    assert model.hparams == {"x": 1, "extra": 4}
    assert model._hparams_name == "conf"


def test_omegaconf_container_and_a_name_are_both_kept() -> None:
    class Model(LightningModule):
        def __init__(self, conf: Any, extra: Any) -> None:
            super().__init__()
            self.save_hyperparameters(conf)
            self.save_hyperparameters("extra")

    assert Model(OmegaConf.create({"x": 1}), torch.float16).hparams == {"x": 1, "extra": torch.float16}


def test_module_made_inside_another_keeps_its_own_arguments_only() -> None:
    class Outer(LightningModule):
        def __init__(self, a: int, size: int = 9) -> None:
            super().__init__()
            self.inner = Everything(7)
            self.save_hyperparameters()

    model = Outer(1)
    assert model.hparams == {"a": 1, "size": 9}
    assert model.inner.hparams == {"a": 7, "b": 2, "c": 3}


def test_call_from_a_method_or_function_below_init_finds_the_arguments() -> None:
    class Model(LightningModule):
        def __init__(self, a: int) -> None:
            super().__init__()
            self.prepare(5)

        def prepare(self, z: int) -> None:
            save(self)

    def save(module: LightningModule, q: int = 1) -> None:
        module.save_hyperparameters()

    assert Model(1).hparams == {"a": 1}


def test_frame_of_init_can_be_given() -> None:
    frames: list[Any] = []

    class Model(LightningModule):
        def __init__(self, a: int) -> None:
            super().__init__()
            frames.append(inspect.currentframe())

    model = Model(4)
    model.save_hyperparameters(frame=frames[0])
    assert model.hparams == {"a": 4}


def test_init_without_super_call_or_usual_names_is_found() -> None:
    class Model(LightningModule):
        def __init__(this, a: int, /, b: int, *, c: int) -> None:
            LightningModule.__init__(this)
            this.save_hyperparameters()
            del b

    assert Model(1, 2, c=3).hparams == {"a": 1, "b": 2, "c": 3}


def test_dataclass_module_keeps_its_fields() -> None:
    @dataclasses.dataclass(eq=False)
    class Model(LightningModule):
        a: int = 1
        layers: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

        def __post_init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert Model(5).hparams == {"a": 5, "layers": [1, 2]}


def test_save_before_super_init_survives_it() -> None:
    class Model(LightningModule):
        def __init__(self, a: int) -> None:
            self.save_hyperparameters(logger=False)
            super().__init__()

    model = Model(1)
    assert (model.hparams, model._log_hyperparams) == ({"a": 1}, False)


def test_datamodule_and_plain_class_have_it_too() -> None:
    class Data(LightningDataModule):
        def __init__(self, batch_size: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Plain(HyperparametersMixin):
        def __init__(self, a: int) -> None:
            self.save_hyperparameters()

    assert Data(3).hparams == {"batch_size": 3}
    assert Plain(3).hparams == {"a": 3}


def test_call_outside_of_init_takes_containers() -> None:
    model = LightningModule()
    model.save_hyperparameters({"a": 1})
    model.hparams.b = 2
    model.save_hyperparameters({"a": 5, "z": 1})
    assert model.hparams == {"a": 5, "b": 2, "z": 1}


@pytest.mark.parametrize("logger", [True, False])
def test_logger_argument_is_kept_for_the_loggers(logger: bool) -> None:
    model = LightningModule()
    assert not model._log_hyperparams
    model.save_hyperparameters({"a": 1}, logger=logger)
    assert model._log_hyperparams is logger


def test_changes_show_in_hparams_and_not_in_hparams_initial() -> None:
    layers = [1]
    model = Everything(layers)
    layers.append(2)
    model.hparams.new = 4
    assert model.hparams.a is layers
    assert model.hparams_initial == {"a": [1], "b": 2, "c": 3}
    model.hparams_initial["a"].append(3)
    assert model.hparams_initial["a"] == [1]


def test_hparams_can_not_be_replaced_and_are_empty_at_first() -> None:
    model = LightningModule()
    assert (model.hparams, model.hparams_initial) == ({}, {})
    with pytest.raises(AttributeError):
        model.hparams = {"a": 1}


def test_module_among_them_gets_a_warning_and_is_not_copied() -> None:
    net = torch.nn.Linear(1, 1)
    with pytest.warns(UserWarning, match=r"'a' is an `nn.Module`.*ignore=\['a'\]"):
        model = Everything(net)
    assert model.hparams_initial["a"] is net


def test_value_that_can_not_be_copied_is_kept_as_it_is() -> None:
    lock = threading.Lock()
    assert Everything(lock).hparams_initial["a"] is lock


def test_remove_ignored_hparams_takes_them_out() -> None:
    model = Everything(1)
    model.remove_ignored_hparams(["b", "absent"])
    assert model.hparams == model.hparams_initial == {"a": 1, "c": 3}


def test_module_with_hyperparameters_can_be_copied_and_pickled() -> None:
    model = Everything(1, d=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.hparams == model.hparams
        assert other.hparams is not model.hparams
