"""Where the files go: folders from loggers, remote storage, folders in use, the YAML file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn


class Recorder(Logger):
    """A logger of which the folder is known; it records what it is told of checkpoints."""

    def __init__(self, save_dir: str | None = "logs", name: str = "run", version: int | str = 3) -> None:
        super().__init__()
        self._attributes = save_dir, name, version
        self.told: list[tuple[str, str]] = []

    @property
    def save_dir(self) -> str | None:
        return self._attributes[0]

    @property
    def name(self) -> str:
        return self._attributes[1]

    @property
    def version(self) -> int | str:
        return self._attributes[2]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.told.append((Path(checkpoint_callback.best_model_path).name, Path(checkpoint_callback.last_model_path).name))


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (False, "{root}/checkpoints"),
        (Recorder(), "logs/run/version_3/checkpoints"),
        (Recorder(version="abc"), "logs/run/abc/checkpoints"),
        (Recorder(name=""), "logs/version_3/checkpoints"),
        (Recorder(save_dir=None), "{root}/run/version_3/checkpoints"),
        (Recorder(save_dir="s3://bucket/logs"), "s3://bucket/logs/run/version_3/checkpoints"),
        ([Recorder(), Recorder(save_dir="second")], "logs/run/version_3/checkpoints"),
    ],
)
@pytest.mark.parametrize("stage", [TrainerFn.VALIDATING, TrainerFn.TESTING])
def test_folder_comes_from_the_first_logger_or_the_trainer(prepare: Callable[..., Any], logger: Any, folder: str, stage: TrainerFn) -> None:
    checkpoint = ModelCheckpoint()
    run = prepare(checkpoint, logger=logger)
    run.setup(stage)
    assert checkpoint.dirpath == folder.format(root=run.root)


def test_given_folder_comes_first(prepare: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "mine")
    prepare(checkpoint, logger=Recorder()).setup(TrainerFn.FITTING)
    assert checkpoint.dirpath == str(tmp_path / "mine")


def test_fast_dev_run_asks_no_logger(prepare: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint()
    run = prepare(checkpoint, logger=Recorder(), fast_dev_run=True)
    run.setup(TrainerFn.FITTING)
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
            run.setup(stage)
    else:
        run.setup(stage)


def test_empty_folder_is_not_reported(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    prepare(ModelCheckpoint(dirpath=tmp_path / "d")).setup(TrainerFn.FITTING)


def test_file_exists(prepare: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    trainer = prepare(checkpoint).trainer
    (tmp_path / "here").touch()
    assert checkpoint.file_exists(tmp_path / "here", trainer)
    assert checkpoint.file_exists(str(tmp_path), trainer)
    assert not checkpoint.file_exists(tmp_path / "not here", trainer)


def test_remote_folder(train: Callable[..., Any], tmp_path: Path) -> None:
    storage, folder = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"
    checkpoint = ModelCheckpoint(dirpath=folder, monitor="vl", filename="x", save_top_k=2, save_last="link")
    run = train(checkpoint, scores=[3, 2, 1])
    steps = {}
    for path in storage.find(folder):
        with storage.open(path, "rb") as file:
            steps[path.rpartition("/")[2]] = int(torch.load(file, weights_only=True)["state_dict"]["weight"])
    assert steps == {"x.ckpt": 12, "x-v1.ckpt": 8, "last.ckpt": 12}
    assert checkpoint.file_exists(f"{folder}/x.ckpt", run.trainer)
    assert checkpoint._find_last_checkpoints(run.trainer) == {f"{folder}/last.ckpt"}
    with pytest.warns(UserWarning, match="not empty"):
        run.setup(TrainerFn.FITTING)


def test_yaml_lists_paths_and_scores(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="vl")
    checkpoint.best_k_models = {"a.ckpt": torch.tensor(1.5)}
    checkpoint.to_yaml()
    checkpoint.to_yaml(tmp_path / "other.yaml")
    for name in ("best_k_models.yaml", "other.yaml"):
        assert yaml.safe_load((tmp_path / name).read_text()) == {"a.ckpt": 1.5}


def test_loggers_are_told_of_each_checkpoint(train: Callable[..., Any]) -> None:
    logger = Recorder()
    train(ModelCheckpoint(dirpath="d", save_last=True), logger=logger, log_every_n_steps=1, max_epochs=2)
    first, second = "epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"
    assert logger.told == [(first, ""), (first, "last.ckpt"), (second, "last.ckpt"), (second, "last.ckpt")]
