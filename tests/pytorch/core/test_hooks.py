"""The lists of hooks hold every hook there is, and hooks do what they say when called by hand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.core.hooks import (
    DATA_HOOKS,
    EVENT_HOOKS,
    MODULE_HOOKS,
    REMOVED_HOOKS,
    CheckpointHooks,
    DataHooks,
    ModelHooks,
)

STATE = {"state_dict", "load_state_dict", "on_save_checkpoint", "on_load_checkpoint", "state_key"}


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


# ---- the lists -----------------------------------------------------------------------------------------------------------


def test_no_hook_is_listed_twice() -> None:
    names = [*EVENT_HOOKS, *MODULE_HOOKS, *DATA_HOOKS]
    assert len(names) == len(set(names))
    assert not set(names) & set(REMOVED_HOOKS)


def test_callbacks_hear_of_every_event_and_of_nothing_else() -> None:
    assert public(Callback) - {"setup", "teardown", "on_exception"} - STATE == set(EVENT_HOOKS)


def test_the_mixins_hold_no_hook_that_is_not_listed() -> None:
    listed = {*EVENT_HOOKS, *MODULE_HOOKS, *DATA_HOOKS}
    assert public(ModelHooks) | public(DataHooks) | public(CheckpointHooks) <= listed | {"configure_sharded_model"}
    assert all(hasattr(LightningModule, name) for name in listed if "sanity_check" not in name)
    assert all(hasattr(LightningDataModule, name) for name in DATA_HOOKS)


@pytest.mark.parametrize("name", EVENT_HOOKS)
def test_callbacks_get_trainer_and_module_before_what_the_module_gets(name: str) -> None:
    theirs = list(inspect.signature(getattr(Callback, name)).parameters)
    assert theirs[:3] == ["self", "trainer", "pl_module"]
    if hasattr(LightningModule, name):
        assert theirs[3:] == list(inspect.signature(getattr(LightningModule, name)).parameters)[1:]


@pytest.mark.parametrize("owner", [Callback, LightningModule, LightningDataModule, ModelHooks, DataHooks, CheckpointHooks])
def test_every_hook_is_documented(owner: Any) -> None:
    hooks = [name for name in dir(owner) if name in {*EVENT_HOOKS, *MODULE_HOOKS, *DATA_HOOKS}]
    assert [name for name in hooks if not inspect.getdoc(getattr(owner, name))] == []
    assert hooks


# ---- what they do ----------------------------------------------------------------------------------------------------------


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


def test_hooks_that_change_the_mode_do_so() -> None:
    model = Model()
    for task in ("validation", "test", "predict"):
        model.train()
        getattr(model, f"on_{task}_model_eval")()
        assert not model.training
        assert not model.layer.training
    for task in ("validation", "test"):
        getattr(model, f"on_{task}_model_train")()
        assert model.layer.training
        model.eval()


def test_gradients_are_freed_before_validation() -> None:
    model = Model()
    model.layer(torch.ones(1, 1)).sum().backward()
    model.on_validation_model_zero_grad()
    assert model.layer.weight.grad is None


def test_hooks_that_nobody_overrides_return_what_changes_nothing() -> None:
    model = Model()
    batch = object()
    assert model.on_before_batch_transfer(batch, 0) is model.on_after_batch_transfer(batch, 0) is batch
    assert model.on_train_batch_start(batch, 0) is None
    moved = model.transfer_batch_to_device({"x": torch.ones(1)}, torch.device("meta"), 0)
    assert moved["x"].device.type == "meta"
    given: dict[str, Any] = {"state_dict": {}}
    model.on_save_checkpoint(given)
    model.on_load_checkpoint(given)
    assert given == {"state_dict": {}}


def test_modules_prepare_their_data_on_each_node() -> None:
    model = Model()
    assert model.prepare_data_per_node is True
    assert model.allow_zero_length_dataloader_with_multiple_devices is False
