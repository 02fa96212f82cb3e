"""Checkpoints that Lightning 2.6.6 wrote (``checkpoints/``: a module with a Path and a Namespace among its hyperparameters)."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint.io import load
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.migration import migrate_checkpoint

FOLDER = Path(__file__).parent / "checkpoints"
NAMES = ["epoch_end", "mid_epoch", "after_fit", "weights_only", "manual"]


class Model(LightningModule):
    def __init__(self, lr: float, folder: Path = Path("data"), options: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())


class Data(LightningDataModule):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.state: Any = None

    def val_dataloader(self) -> Any:
        return [torch.ones(self.hparams.size, 4)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


@pytest.mark.parametrize("name", NAMES)
def test_file_of_lightning_is_read_without_trust(name: str) -> None:
    path = FOLDER / f"{name}.ckpt"
    model = Model.load_from_checkpoint(path)
    assert (model.hparams.lr, model.hparams.folder) == (0.1, Path("data"))
    assert model.hparams.options == (None if name == "manual" else argparse.Namespace(depth=2))
    assert torch.equal(model.layer.weight, load(path)["state_dict"]["layer.weight"])
    data = Data.load_from_checkpoint(path)
    assert (data.hparams.size, data.state) == (12, {"seen": 3})


@pytest.mark.filterwarnings("ignore:The checkpoint holds the state of callbacks")
@pytest.mark.parametrize("name", NAMES)
def test_file_of_lightning_can_be_evaluated(name: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    expected = Model.load_from_checkpoint(FOLDER / f"{name}.ckpt").layer(torch.ones(1, 4)).square().mean().item()
    (result,) = trainer.validate(Model(0.5), datamodule=Data(), ckpt_path=FOLDER / f"{name}.ckpt", verbose=False)
    assert result["val_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_of_today_is_kept_as_it_is(name: str) -> None:
    checkpoint = load(FOLDER / f"{name}.ckpt")
    migrated = migrate_checkpoint(checkpoint)
    assert migrated.keys() == checkpoint.keys()
    assert migrated["loops"] == checkpoint["loops"]
    assert migrated["state_dict"] is checkpoint["state_dict"]


def test_documented_keys_are_those_in_the_files() -> None:
    checkpoint = load(FOLDER / "mid_epoch.ckpt")
    documented = migrate_checkpoint.__globals__["__doc__"]
    for key in [*checkpoint, *checkpoint["loops"], *checkpoint["loops"]["fit_loop"]]:
        assert key in documented or key == "Data", key
    progress = checkpoint["loops"]["fit_loop"]
    assert progress["epoch_progress"]["current"] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    assert progress["epoch_loop.batch_progress"]["current"] == {"ready": 3, "started": 3, "processed": 3, "completed": 2}


def test_names_of_earlier_versions_are_translated_and_the_input_is_not_changed() -> None:
    old = {
        "pytorch-lightning_version": "1.9.5",
        "state_dict": {"w": 1},
        "native_amp_scaling_state": {"scale": 2.0},
        "callbacks": {Model: {"a": 1}, "Timer": {"b": 2}},
        "loops": {
            "fit_loop": {
                "epoch_loop.batch_loop.optimizer_loop.optim_progress": 1,
                "epoch_loop.batch_loop.manual_loop.optim_step_progress": 2,
                "epoch_loop.val_loop.epoch_loop.batch_progress": 3,
                "epoch_progress": 4,
            }
        },
    }
    before = copy.deepcopy(old)
    migrated = migrate_checkpoint(old)
    assert old == before
    assert migrated["MixedPrecision"] == {"scale": 2.0}
    assert migrated["callbacks"] == {"Model": {"a": 1}, "Timer": {"b": 2}}
    assert migrated["loops"]["fit_loop"] == {
        "epoch_loop.automatic_optimization.optim_progress": 1,
        "epoch_loop.manual_optimization.optim_step_progress": 2,
        "epoch_loop.val_loop.batch_progress": 3,
        "epoch_progress": 4,
    }


def test_checkpoint_of_a_later_major_version_gets_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"version 3\.0\.0 of Lightning"):
        migrate_checkpoint({"pytorch-lightning_version": "3.0.0", "state_dict": {}})


@pytest.mark.parametrize(
    "checkpoint", [{}, {"callbacks": None, "loops": 3, "pytorch-lightning_version": None}, {"loops": {"fit_loop": None}}]
)
def test_odd_checkpoints_pass_through(checkpoint: dict[str, Any]) -> None:
    assert migrate_checkpoint(checkpoint) == checkpoint
