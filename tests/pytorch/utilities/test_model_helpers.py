"""What a module, datamodule or callback overrides."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
from torch import nn

from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.utilities.model_helpers import get_torchvision_model, is_overridden


class Base(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_train_start(self) -> None: ...


class Derived(Base):
    @classmethod
    def on_fit_start(cls) -> None: ...

    @staticmethod
    def on_fit_end() -> None: ...

    @functools.wraps(LightningModule.on_train_epoch_start)
    def on_train_epoch_start(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("training_step", True),
        ("on_train_start", True),
        ("on_fit_start", True),
        ("on_fit_end", True),
        ("on_train_epoch_start", True),
        ("on_train_end", False),
        ("validation_step", False),
        ("state_dict", False),
        ("no_such_method", False),
    ],
)
def test_methods_of_a_module(name: str, expected: bool) -> None:
    assert is_overridden(name, Derived()) is expected


def test_method_set_on_the_instance_counts() -> None:
    module = Base()
    module.on_train_end = lambda: None  # type: ignore[method-assign]
    module.on_fit_start = functools.partial(print)  # type: ignore[method-assign]
    assert is_overridden("on_train_end", module)
    assert is_overridden("on_fit_start", module)
    assert not is_overridden("on_train_end", Base())


def test_mocked_method_counts_while_it_is_mocked() -> None:
    module = Base()
    with mock.patch.object(module, "on_train_end", wraps=module.on_train_end):
        assert is_overridden("on_train_end", module)
    with mock.patch.object(Base, "on_train_end"):
        assert is_overridden("on_train_end", module)
    assert not is_overridden("on_train_end", module)


@pytest.mark.parametrize("make", [mock.Mock, mock.MagicMock])
def test_mock_in_place_of_a_callback_overrides_every_hook(make: Any) -> None:
    assert is_overridden("on_train_start", make(spec=Callback))
    assert not is_overridden("no_such_method", make(spec=Callback))


def test_callbacks_and_datamodules_have_parents_of_their_own() -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> list[int]:
            return [1]

    class Hooks(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None: ...

    assert is_overridden("train_dataloader", Data())
    assert not is_overridden("val_dataloader", Data())
    assert is_overridden("on_fit_start", Hooks())
    assert not is_overridden("on_fit_end", Hooks())


def test_parent_can_be_given() -> None:
    class Layer(nn.Linear):
        def extra_repr(self) -> str:
            return ""

    assert is_overridden("extra_repr", Layer(1, 1), nn.Linear)
    assert not is_overridden("forward", Layer(1, 1), nn.Linear)
    assert is_overridden("on_train_start", Derived(), LightningModule)
    assert not is_overridden("on_train_start", Derived(), Base)


def test_nothing_overrides_nothing() -> None:
    assert not is_overridden("on_fit_start", None)
    assert not is_overridden("on_fit_start")


def test_object_of_another_kind_needs_a_parent() -> None:
    with pytest.raises(ValueError, match="object is no LightningModule, LightningDataModule or Callback"):
        is_overridden("on_fit_start", object())


def test_parent_without_the_method_raises() -> None:
    with pytest.raises(ValueError, match="class Callback has no such method"):
        is_overridden("training_step", Base(), Callback)


def test_torchvision_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchvision"):
        get_torchvision_model("resnet18")
