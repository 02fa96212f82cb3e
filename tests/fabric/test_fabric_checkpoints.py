"""What Fabric saves comes back: modules, optimizers, other objects with a state, and plain values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning.fabric import Fabric
from lightning.fabric.plugins.io import TorchCheckpointIO


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Keeping(DataLoader[Any], Counter):
    """A loader that knows where it is."""

    count = 0


@dataclass
class Settings:
    lr: float
    folder: Path


def trained(fabric: Fabric, steps: int = 1) -> tuple[Any, Any]:
    torch.manual_seed(steps)
    module = nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.1 * (steps + 1)))
    for _ in range(steps):
        fabric.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
    return model, optimizer


def test_objects_get_back_their_states_and_values_are_replaced(fabric: Fabric, tmp_path: Path) -> None:
    model, optimizer = trained(fabric, steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = fabric.setup_dataloaders(Keeping([1]))
    loader._dataloader.count = 5
    settings = Settings(0.1, Path("x"))
    state = {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "counter": Counter(3), "epoch": 7,
        "settings": settings, "unasked": [1],
    }  # fmt: skip
    fabric.save(tmp_path / "deep" / "a.ckpt", state)
    assert os.listdir(tmp_path / "deep") == ["a.ckpt"]

    other_model, other_optimizer = trained(fabric, steps=0)
    other_loader = fabric.setup_dataloaders(Keeping([1]))
    others: dict[str, Any] = {
        "model": other_model, "optimizer": other_optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(other_optimizer, 9),
        "loader": other_loader, "counter": Counter(), "epoch": 0, "settings": None,
    }  # fmt: skip
    assert fabric.load(tmp_path / "deep" / "a.ckpt", others) == {"unasked": [1]}
    assert torch.equal(other_model.weight, model.weight)
    assert others["model"] is other_model
    assert others["optimizer"] is other_optimizer
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert torch.equal(other_optimizer.state[other_model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert others["scheduler"].step_size == 1
    assert other_loader._dataloader.count == 5
    assert others["counter"].count == 3
    assert (others["epoch"], others["settings"]) == (7, settings)


def test_file_holds_plain_data_that_torch_reads(fabric: Fabric) -> None:
    model, optimizer = trained(fabric)
    fabric.save("a.ckpt", {"model": model, "optimizer": optimizer.optimizer, "raw": model.module, "epoch": 1})
    saved = torch.load("a.ckpt", weights_only=True)
    assert list(saved["model"]) == list(saved["raw"]) == ["weight", "bias"]
    assert list(saved["optimizer"]) == ["state", "param_groups"]
    assert fabric.load("a.ckpt")["epoch"] == 1
    assert fabric.load("a.ckpt", {})["epoch"] == 1


def test_compiled_modules_are_saved_under_the_names_of_the_module(fabric: Fabric) -> None:
    module = nn.Linear(2, 1)
    model = fabric.setup(torch.compile(module, backend="eager"))
    fabric.save("a.ckpt", {"model": model, "again": torch.compile(model, backend="eager")})
    saved = fabric.load("a.ckpt")
    assert list(saved["model"]) == list(saved["again"]) == ["weight", "bias"]
    with torch.no_grad():
        module.weight.zero_()
    fabric.load("a.ckpt", {"model": model}, strict=False)
    assert module.weight.abs().sum() > 0


def test_filters_choose_what_of_an_object_is_saved(fabric: Fabric) -> None:
    model, optimizer = trained(fabric)
    keep = {"model": lambda key, value: "bias" in key and value.numel() == 1, "optimizer": lambda key, value: key != "state"}
    fabric.save("a.ckpt", {"model": model, "optimizer": optimizer, "epoch": 1}, filter=keep)
    saved = fabric.load("a.ckpt")
    assert list(saved["model"]) == ["bias"]
    assert list(saved["optimizer"]) == ["param_groups"]
    fabric.load("a.ckpt", {"model": model}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        fabric.load("a.ckpt", {"model": model})


@pytest.mark.parametrize(
    ("state", "filter", "error", "said"),
    [
        ([1], None, TypeError, "state is a list"),
        ({"a": 1}, [1], TypeError, r"filter=\[1\] is a list"),
        ({"a": 1}, {"b": lambda key, value: True}, ValueError, "filter has 'b', and `state` has only 'a'"),
        ({"a": 1}, {"a": 3}, TypeError, r"filter\['a'\] is 3"),
        ({"a": lambda: None}, None, TypeError, "a of type builtins.function can't be stored"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(
    fabric: Fabric, state: Any, filter: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fabric.save("a.ckpt", state, filter=filter)
    assert not Path("a.ckpt").exists()


def test_missing_names_are_an_error_before_anything_is_loaded(fabric: Fabric) -> None:
    model, _ = trained(fabric)
    fabric.save("a.ckpt", {"model": nn.Linear(2, 1), "epoch": 3})
    before = model.weight.detach().clone()
    state: dict[str, Any] = {"model": model, "epoch": 0, "other": 1}
    with pytest.raises(KeyError, match="holds no 'other', only 'model', 'epoch'"):
        fabric.load("a.ckpt", state)
    assert torch.equal(model.weight, before)
    assert fabric.load("a.ckpt", state, strict=False) == {}
    assert not torch.equal(model.weight, before)
    assert (state["epoch"], state["other"]) == (3, 1)


def test_weights_that_do_not_fit_are_an_error(fabric: Fabric) -> None:
    fabric.save("a.ckpt", {"model": nn.Linear(2, 1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fabric.load("a.ckpt", {"model": fabric.setup(nn.Linear(3, 1))})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fabric.load("a.ckpt", {"model": fabric.setup(nn.Linear(2, 1, bias=False))})
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        fabric.load("b.ckpt", {"model": nn.Linear(2, 1)})
    with pytest.raises(TypeError, match="state is a Linear"):
        fabric.load("a.ckpt", nn.Linear(2, 1))  # type: ignore[arg-type]


def test_modules_inside_of_collections_need_trust(fabric: Fabric) -> None:
    model, _ = trained(fabric)
    fabric.save("a.ckpt", {"models": [model], "epoch": 1})
    assert fabric.load("a.ckpt", {"epoch": 0}, strict=False).keys() == {"models"}
    with pytest.raises(UnpicklingError, match=r"'models\[0\]' in the checkpoint is <Opaque torch.nn.modules.linear.Linear"):
        fabric.load("a.ckpt", {"models": None})
    state: dict[str, Any] = {"models": None}
    fabric.load("a.ckpt", state, weights_only=False)
    assert torch.equal(state["models"][0].weight, model.weight)


def test_raw_files_are_loaded_into_one_object(fabric: Fabric) -> None:
    model, optimizer = trained(fabric, steps=2)
    torch.save(model.state_dict(), "model.pt")
    torch.save(optimizer.state_dict(), "optimizer.pt")
    for wrapped in (True, False):
        other_model, other_optimizer = trained(fabric, steps=0)
        fabric.load_raw("model.pt", other_model if wrapped else other_model.module)
        fabric.load_raw("optimizer.pt", other_optimizer if wrapped else other_optimizer.optimizer)
        assert torch.equal(other_model.weight, model.weight)
        assert other_optimizer.state_dict()["state"][0]["step"] == 2
    torch.save({"weight": torch.zeros(1, 2)}, "part.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        fabric.load_raw("part.pt", model)
    fabric.load_raw("part.pt", model, strict=False)
    assert model.weight.abs().sum() == 0
    with pytest.raises(TypeError, match="a module or an optimizer is needed, not a Counter"):
        fabric.load_raw("part.pt", Counter())  # type: ignore[arg-type]


class Elsewhere(TorchCheckpointIO):
    def __init__(self) -> None:
        self.paths: list[Any] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.paths.append(path)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_checkpoints_go_through_the_plugin() -> None:
    plugin = Elsewhere()
    fabric = Fabric(accelerator="cpu", plugins=[plugin])
    fabric.save("a.ckpt", {"epoch": 1})
    assert plugin.paths == ["a.ckpt"]
    assert fabric.load("a.ckpt") == {"epoch": 1}


def test_training_goes_on_where_it_was_saved(fabric: Fabric) -> None:
    model, optimizer = trained(fabric, steps=2)
    fabric.save("a.ckpt", {"model": model, "optimizer": optimizer})

    def go_on(model: Any, optimizer: Any) -> torch.Tensor:
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(1, 2)).square().sum())
        optimizer.step()
        return model.weight.detach().clone()  # type: ignore[no-any-return]

    expected = go_on(model, optimizer)
    other_model, other_optimizer = trained(fabric, steps=0)
    fabric.load("a.ckpt", {"model": other_model, "optimizer": other_optimizer})
    assert torch.equal(go_on(other_model, other_optimizer), expected)
