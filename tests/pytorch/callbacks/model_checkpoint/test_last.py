"""``save_last``: a copy or a link of the latest checkpoint under a fixed name."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint


def names(run: Any) -> list[str]:
    return [name.removeprefix("checkpoints/") for name in run.files]


def test_last_is_a_copy_of_the_latest(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last=True)
    run = train(checkpoint)
    assert names(run) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert run.steps_in("checkpoints/last.ckpt") == 12
    assert checkpoint.last_model_path == str(run.root / "checkpoints/last.ckpt")


def test_last_goes_with_the_files_of_epochs(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(save_last=True, monitor="vl"), scores=[2, 1, 3])
    assert names(run) == ["epoch=1-step=8.ckpt", "last.ckpt"]
    assert run.steps_in("checkpoints/last.ckpt") == 8


def test_last_is_saved_at_each_due_step_whatever_the_score(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(save_last=True, monitor="tl", every_n_train_steps=5), log_train=True)
    assert names(run) == ["epoch=1-step=5.ckpt", "last.ckpt"]
    assert run.steps_in("checkpoints/last.ckpt") == 10


def test_last_holds_its_own_path(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last=True)
    run = train(checkpoint)
    state = torch.load(run.root / "checkpoints/last.ckpt", weights_only=True)["callbacks"][checkpoint.state_key]
    assert state["last_model_path"] == checkpoint.last_model_path


@pytest.mark.parametrize("arguments", [{"save_top_k": 0}, {"every_n_epochs": 0}, {"save_top_k": 0, "save_last": "link"}])
def test_last_alone_is_saved_at_each_epoch(train: Callable[..., Any], arguments: dict[str, Any]) -> None:
    run = train(ModelCheckpoint(**{"save_last": True, **arguments}))
    assert names(run) == ["last.ckpt"]
    assert run.saves == [(4, "last.ckpt"), (8, "last.ckpt"), (12, "last.ckpt")]


def test_last_alone_is_there_after_a_crash(prepare: Callable[..., Any]) -> None:
    run = prepare(ModelCheckpoint(save_last=True, save_top_k=0), crash_at=6)
    with pytest.raises(RuntimeError, match="crash"):
        run.fit()
    assert run.steps_in("checkpoints/last.ckpt") == 4


@pytest.mark.parametrize(
    "arguments", [{"every_n_train_steps": 50}, {"train_time_interval": timedelta(hours=1)}, {"every_n_epochs": 50}, {"monitor": "tl"}]
)
def test_last_is_saved_at_the_end_if_nothing_was_due_before(train: Callable[..., Any], arguments: dict[str, Any]) -> None:
    arguments = {"every_n_train_steps": 50, **arguments} if "monitor" in arguments else arguments
    run = train(ModelCheckpoint(save_last=True, **arguments), log_train=True)
    assert run.saves == [(12, "last.ckpt")]


def test_last_of_earlier_steps_stays_at_the_end(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(save_last=True, every_n_train_steps=5))
    assert run.steps_in("checkpoints/last.ckpt") == 10


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"fast_dev_run": True}])
def test_no_last_without_training(train: Callable[..., Any], options: dict[str, Any]) -> None:
    assert train(ModelCheckpoint(save_last=True), **options).files == []


def test_name_of_last_may_be_a_template(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last=True)
    checkpoint.CHECKPOINT_NAME_LAST = "{epoch}-last"
    assert names(train(checkpoint)) == ["epoch=2-last.ckpt", "epoch=2-step=12.ckpt"]


def test_link_is_relative_and_leads_to_the_latest_file(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last="link")
    run = train(checkpoint)
    assert names(run) == ["epoch=2-step=12.ckpt", "last.ckpt -> epoch=2-step=12.ckpt"]
    assert checkpoint.last_model_path == str(run.root / "checkpoints/last.ckpt")
    assert [name for _, name in run.saves] == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]


def test_link_leads_into_folders(train: Callable[..., Any]) -> None:
    assert names(train(ModelCheckpoint(save_last="link", filename="a/{epoch}"), max_epochs=1)) == [
        "a/epoch=0.ckpt",
        "last.ckpt -> a/epoch=0.ckpt",
    ]


def test_link_stays_where_no_better_file_comes(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(save_last="link", monitor="tl", every_n_train_steps=2), log_train=True)
    assert names(run) == ["epoch=0-step=2.ckpt", "last.ckpt -> epoch=0-step=2.ckpt"]


def test_link_never_leads_nowhere(prepare: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last="link")
    run = prepare(checkpoint)
    remove, removed = run.trainer.strategy.remove_checkpoint, []

    def check(path: str) -> None:
        remove(path)
        removed.append(path)
        assert os.path.exists(checkpoint.last_model_path)

    run.trainer.strategy.remove_checkpoint = check
    run.fit()
    assert len(removed) == 2


def test_link_with_a_template_leaves_the_target_alone(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last="link", save_top_k=-1)
    checkpoint.CHECKPOINT_NAME_LAST = "{epoch}-last"
    run = train(checkpoint, max_epochs=2)
    assert names(run) == ["epoch=0-step=4.ckpt", "epoch=1-last.ckpt -> epoch=1-step=8.ckpt", "epoch=1-step=8.ckpt"]


def test_link_to_a_folder_goes_without_the_folder(prepare: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last="link", save_top_k=-1)
    checkpoint.CHECKPOINT_NAME_LAST = "{epoch}-last"
    run = prepare(checkpoint, max_epochs=2)
    run.trainer.save_checkpoint = lambda path, weights_only: os.makedirs(path)
    run.fit()
    assert sorted(os.listdir(run.root / "checkpoints")) == ["epoch=0-step=4.ckpt", "epoch=1-last.ckpt", "epoch=1-step=8.ckpt"]


def test_link_takes_the_place_of_a_folder(train: Callable[..., Any], tmp_path: Path) -> None:
    shard = tmp_path / "checkpoints" / "last.ckpt" / "shard"
    shard.parent.mkdir(parents=True)
    shard.touch()
    with pytest.warns(UserWarning, match="not empty"):
        run = train(ModelCheckpoint(save_last="link", enable_version_counter=False), max_epochs=1)
    assert names(run) == ["epoch=0-step=4.ckpt", "last.ckpt -> epoch=0-step=4.ckpt"]


def test_copy_where_links_are_not_possible(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    run = train(ModelCheckpoint(save_last="link"))
    assert names(run) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert run.steps_in("checkpoints/last.ckpt") == 12


def test_copy_replaces_an_earlier_link_and_not_its_target(train: Callable[..., Any], tmp_path: Path) -> None:
    train(ModelCheckpoint(save_last="link"), max_epochs=1)
    with pytest.warns(UserWarning, match="not empty"):
        run = train(ModelCheckpoint(save_last=True, filename="other", enable_version_counter=False), max_epochs=2)
    assert names(run) == ["epoch=0-step=4.ckpt", "last.ckpt", "other.ckpt"]
    assert run.steps_in("checkpoints/epoch=0-step=4.ckpt") == 4


def test_last_checkpoints_of_earlier_runs_are_found(train: Callable[..., Any], prepare: Callable[..., Any], tmp_path: Path) -> None:
    train(ModelCheckpoint(save_last=True), max_epochs=1)
    with pytest.warns(UserWarning, match="not empty"):
        train(ModelCheckpoint(save_last="link"), max_epochs=1)
    checkpoint = ModelCheckpoint()
    found = checkpoint._find_last_checkpoints(prepare(checkpoint).trainer)
    assert found == {str(tmp_path / "checkpoints" / name) for name in ("last.ckpt", "last-v1.ckpt")}


def test_no_last_checkpoint_is_found_where_there_is_no_folder(prepare: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "nowhere")
    assert checkpoint._find_last_checkpoints(prepare(checkpoint).trainer) == set()
