"""Where the files go: folders from loggers, remote storage, folders in use, the YAML file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
import yaml

from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class Logger(SimpleNamespace):
    def after_save_checkpoint(self, checkpoint: Any) -> None:
        pass


def logger(**attributes: Any) -> Logger:
    return Logger(**{"save_dir": "logs", "name": "run", "version": 3, **attributes})


@pytest.mark.parametrize(
    ("loggers", "folder"),
    [
        ([], "{root}/checkpoints"),
        ([logger()], "logs/run/version_3/checkpoints"),
        ([logger(version="abc")], "logs/run/abc/checkpoints"),
        ([logger(name="")], "logs/version_3/checkpoints"),
        ([logger(save_dir=None)], "{root}/run/version_3/checkpoints"),
        ([logger(save_dir="s3://bucket/logs")], "s3://bucket/logs/run/version_3/checkpoints"),
        ([logger(), logger(save_dir="second")], "logs/run/version_3/checkpoints"),
    ],
)
@pytest.mark.parametrize("stage", [TrainerFn.VALIDATING, TrainerFn.TESTING])
def test_folder_comes_from_the_first_logger_or_the_trainer(
    prepare: Callable[..., Any], loggers: list[Any], folder: str, stage: TrainerFn
) -> None:
    checkpoint = ModelCheckpoint()
    run = prepare(checkpoint, loggers=loggers)
    run.call("setup", stage)
    assert checkpoint.dirpath == folder.format(root=run.root)


def test_given_folder_comes_first(prepare: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "mine")
    prepare(checkpoint, loggers=[logger()]).call("setup", TrainerFn.FITTING)
    assert checkpoint.dirpath == str(tmp_path / "mine")


def test_fast_dev_run_asks_no_logger(prepare: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint()
    run = prepare(checkpoint, loggers=[object()], fast_dev_run=True)
    run.call("setup", TrainerFn.FITTING)
    assert checkpoint.dirpath == f"{run.root}/checkpoints"


@pytest.mark.parametrize(
    ("arguments", "options", "stage", "warns"),
    [
        ({}, {}, TrainerFn.FITTING, True),
        ({"save_top_k": 0}, {}, TrainerFn.FITTING, False),
        ({}, {"fast_dev_run": True}, TrainerFn.FITTING, False),
        ({}, {}, TrainerFn.TESTING, False),
    ],
)
def test_folder_that_holds_files_is_reported_before_fit(
    prepare: Callable[..., Any], tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any], stage: TrainerFn, warns: bool
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").touch()
    run = prepare(ModelCheckpoint(dirpath=tmp_path / "d", **arguments), **options)
    if warns:
        with pytest.warns(UserWarning, match="not empty"):
            run.call("setup", stage)
    else:
        run.call("setup", stage)


def test_empty_folder_is_not_reported(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    prepare(ModelCheckpoint(dirpath=tmp_path / "d")).call("setup", TrainerFn.FITTING)


def test_file_exists(prepare: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    run = prepare(checkpoint)
    (tmp_path / "here").touch()
    assert checkpoint.file_exists(tmp_path / "here", run)
    assert checkpoint.file_exists(str(tmp_path), run)
    assert not checkpoint.file_exists(tmp_path / "not here", run)


def test_remote_folder(prepare: Callable[..., Any], tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    folder = f"memory://{tmp_path.name}"

    def save(path: str, weights_only: bool) -> None:
        with storage.open(path, "w") as file:
            file.write(str(run.global_step))

    checkpoint = ModelCheckpoint(dirpath=folder, monitor="vl", filename="x", save_top_k=2, save_last="link")
    run = prepare(checkpoint, scores=[3, 2, 1])
    run.save_checkpoint = save
    run.strategy.remove_checkpoint = storage.rm
    run.fit()
    files = {path.rpartition("/")[2]: storage.cat(path).decode() for path in storage.find(folder)}
    assert files == {"x.ckpt": "12", "x-v1.ckpt": "8", "last.ckpt": "12"}
    assert checkpoint.file_exists(f"{folder}/x.ckpt", run)
    assert checkpoint._find_last_checkpoints(run) == {f"{folder}/last.ckpt"}
    with pytest.warns(UserWarning, match="not empty"):
        run.call("setup", TrainerFn.FITTING)


def test_yaml_lists_paths_and_scores(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="vl")
    checkpoint.best_k_models = {"a.ckpt": torch.tensor(1.5)}
    checkpoint.to_yaml()
    checkpoint.to_yaml(tmp_path / "other.yaml")
    for name in ("best_k_models.yaml", "other.yaml"):
        assert yaml.safe_load((tmp_path / name).read_text()) == {"a.ckpt": 1.5}


def test_loggers_are_told_of_each_checkpoint(train: Callable[..., Any], tmp_path: Path) -> None:
    told = []

    class Listening(Logger):
        def after_save_checkpoint(self, checkpoint: Any) -> None:
            told.append((Path(checkpoint.best_model_path).name, Path(checkpoint.last_model_path).name))

    train(ModelCheckpoint(save_last=True), loggers=[Listening(save_dir=tmp_path, name="x", version=0)], max_epochs=2)
    first, second = "epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"
    assert told == [(first, ""), (first, "last.ckpt"), (second, "last.ckpt"), (second, "last.ckpt")]
