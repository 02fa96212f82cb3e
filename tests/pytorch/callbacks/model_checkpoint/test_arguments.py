"""Arguments of ModelCheckpoint: what is accepted, refused, and made of them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint

SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_top_k": -2},
        {"save_top_k": 2},
        {"save_top_k": 1.5},
        {"save_top_k": None},
        {"monitor": 3},
        {"mode": "auto"},
        {"save_last": "copy"},
        {"every_n_train_steps": -1},
        {"every_n_train_steps": 1.5},
        {"every_n_epochs": -1},
        {"train_time_interval": 5},
        {"train_time_interval": -SECOND},
        {"filename": 3},
    ],
)
def test_wrong_argument_is_named(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(MisconfigurationException) as error:
        ModelCheckpoint(**arguments)
    assert f"{name}={value!r}" in str(error.value)


def test_dirpath_that_is_no_path_is_refused() -> None:
    with pytest.raises(TypeError, match="dirpath=3"):
        ModelCheckpoint(dirpath=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_n_train_steps": 1, "every_n_epochs": 1},
        {"every_n_train_steps": 1, "train_time_interval": SECOND},
        {"every_n_epochs": 1, "train_time_interval": SECOND},
    ],
)
def test_schedules_exclude_each_other(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="exclude each other"):
        ModelCheckpoint(**arguments)


@pytest.mark.parametrize(
    ("arguments", "every_n_epochs"),
    [
        ({}, 1),
        ({"every_n_epochs": 3}, 3),
        ({"every_n_epochs": 0}, 0),
        ({"every_n_train_steps": 2}, 0),
        ({"every_n_train_steps": 0}, 0),
        ({"every_n_train_steps": 0, "every_n_epochs": 2}, 2),
        ({"train_time_interval": SECOND}, 0),
    ],
)
def test_epochs_count_unless_another_schedule_is_given(arguments: dict[str, Any], every_n_epochs: int) -> None:
    assert ModelCheckpoint(**arguments).every_n_epochs == every_n_epochs


def test_attributes_before_a_run() -> None:
    checkpoint = ModelCheckpoint(mode="max")
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.state_dict() == {
        "monitor": None,
        "best_model_score": None,
        "best_model_path": "",
        "current_score": None,
        "dirpath": None,
        "best_k_models": {},
        "kth_best_model_path": "",
        "kth_value": torch.tensor(-torch.inf),
        "last_model_path": "",
    }


def test_state_key_tells_instances_apart() -> None:
    assert ModelCheckpoint(monitor="x", mode="max", every_n_train_steps=3).state_key == (
        "ModelCheckpoint{'monitor': 'x', 'mode': 'max', 'every_n_train_steps': 3, 'every_n_epochs': 0, 'train_time_interval': None}"
    )


def test_local_dirpath_is_absolute_and_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ModelCheckpoint(dirpath="rel").dirpath == str(tmp_path / "rel")
    assert ModelCheckpoint(dirpath=Path("rel")).dirpath == str(tmp_path / "rel")
    assert ModelCheckpoint(dirpath=tmp_path / "link" / "x").dirpath == str(tmp_path / "real" / "x")
    assert ModelCheckpoint(dirpath="~/x").dirpath == str(tmp_path / "home" / "x")
    assert ModelCheckpoint(dirpath=f"file://{tmp_path}/x").dirpath == str(tmp_path / "x")
    assert ModelCheckpoint(dirpath="s3://bucket/x").dirpath == "s3://bucket/x"
