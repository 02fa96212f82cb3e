"""Which checkpoints are kept, under which names, and what the books say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint

nan, inf = float("nan"), float("inf")


def names(run: Any) -> list[str]:
    return [name.removeprefix("checkpoints/").removesuffix(".ckpt") for name in run.files]


@pytest.mark.parametrize(
    ("arguments", "scores", "kept", "best"),
    [
        ({}, [3, 1, 2], ["epoch=1-step=8"], 1),
        ({"mode": "max"}, [3, 1, 2], ["epoch=0-step=4"], 3),
        ({"mode": "max", "save_top_k": 2, "filename": "{epoch}-{vl:.1f}"}, [3, 1, 2], ["epoch=0-vl=3.0", "epoch=2-vl=2.0"], 3),
        ({"save_top_k": -1, "filename": "{epoch}-{vl:.1f}"}, [3, 1, 2], ["epoch=0-vl=3.0", "epoch=1-vl=1.0", "epoch=2-vl=2.0"], 1),
        ({}, [1, 1, 1], ["epoch=0-step=4"], 1),
        ({"save_top_k": 2}, [1, 1, 1], ["epoch=0-step=4", "epoch=1-step=8"], 1),
        ({"save_top_k": 2}, [1, 1, 0], ["epoch=1-step=8", "epoch=2-step=12"], 0),
        ({}, [nan, 1, 2], ["epoch=1-step=8"], 1),
        ({"mode": "max"}, [nan, 1, 2], ["epoch=2-step=12"], 2),
        ({}, [nan, nan, nan], ["epoch=0-step=4"], inf),
        ({}, [2, nan, 1], ["epoch=2-step=12"], 1),
        ({"mode": "max", "save_top_k": 2}, [2, nan, 1], ["epoch=0-step=4", "epoch=2-step=12"], 2),
        ({}, [inf, inf, inf], ["epoch=0-step=4"], inf),
        ({"filename": "{vl:.2f}"}, [nan, nan, nan], ["vl=nan"], inf),
    ],
)
def test_monitored_checkpoints_are_ranked(
    train: Callable[..., Any], arguments: dict[str, Any], scores: list[float], kept: list[str], best: float
) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", **arguments)
    run = train(checkpoint, scores=scores)
    assert names(run) == kept
    assert checkpoint.best_model_score == best
    assert sorted(checkpoint.best_k_models) == [str(run.root / file) for file in run.files]
    assert checkpoint.best_k_models[checkpoint.best_model_path] == best


@pytest.mark.parametrize(("arguments", "kept"), [({}, ["epoch=2-step=12"]), ({"save_top_k": 0}, [])])
def test_unmonitored_checkpoint_is_the_latest(train: Callable[..., Any], arguments: dict[str, Any], kept: list[str]) -> None:
    checkpoint = ModelCheckpoint(**arguments)
    run = train(checkpoint)
    assert names(run) == kept
    assert checkpoint.best_model_path == "".join(str(run.root / file) for file in run.files)
    assert checkpoint.best_model_score is None
    assert checkpoint.best_k_models == {}


def test_all_unmonitored_checkpoints_are_kept_with_top_k_of_minus_one(train: Callable[..., Any]) -> None:
    assert names(train(ModelCheckpoint(save_top_k=-1))) == ["epoch=0-step=4", "epoch=1-step=8", "epoch=2-step=12"]


def test_books_of_a_full_list(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", mode="max", save_top_k=2)
    run = train(checkpoint, scores=[3, 1, 2])
    first, third = (str(run.root / f"checkpoints/{name}.ckpt") for name in ("epoch=0-step=4", "epoch=2-step=12"))
    assert checkpoint.best_k_models == {first: torch.tensor(3.0), third: torch.tensor(2.0)}
    assert (checkpoint.best_model_path, checkpoint.kth_best_model_path) == (first, third)
    assert (checkpoint.best_model_score, checkpoint.kth_value, checkpoint.current_score) == (3.0, 2.0, 2.0)


def test_books_of_a_list_that_is_not_full(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", save_top_k=5)
    train(checkpoint, scores=[3, 1, 2])
    assert len(checkpoint.best_k_models) == 3
    assert (checkpoint.kth_best_model_path, checkpoint.kth_value) == ("", inf)


def test_current_score_is_that_of_the_latest_file(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl")
    train(checkpoint, scores=[3, 1, 2])
    assert checkpoint.current_score == 1


def test_file_lists_itself_among_the_best(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl")
    run = train(checkpoint, scores=[3, 1, 2])
    state = torch.load(checkpoint.best_model_path, weights_only=True)["callbacks"][checkpoint.state_key]
    assert state["best_model_path"] == checkpoint.best_model_path
    assert list(state["best_k_models"]) == [checkpoint.best_model_path]
    assert run.steps_in("checkpoints/epoch=1-step=8.ckpt") == 8


def test_check_monitor_top_k(prepare: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl")
    run = prepare(checkpoint, scores=[1.0], max_epochs=1)
    assert not checkpoint.check_monitor_top_k(run.trainer)
    assert checkpoint.check_monitor_top_k(run.trainer, torch.tensor(1.0))
    run.fit()
    assert not checkpoint.check_monitor_top_k(run.trainer, torch.tensor(1.0))
    assert checkpoint.check_monitor_top_k(run.trainer, torch.tensor(0.5))


@pytest.mark.parametrize("monitor", ["epoch", "step"])
def test_epoch_and_step_can_be_monitored(train: Callable[..., Any], monitor: str) -> None:
    checkpoint = ModelCheckpoint(monitor=monitor, mode="max")
    assert names(train(checkpoint)) == ["epoch=2-step=12"]


@pytest.mark.parametrize(
    ("arguments", "scores", "kept"),
    [
        ({"save_top_k": 1}, [3, 2, 1], {"x": 12}),
        ({"save_top_k": 2}, [3, 2, 1], {"x-v1": 8, "x": 12}),
        ({"save_top_k": 3}, [5, 4, 3, 2, 1], {"x-v1": 20, "x-v2": 12, "x": 16}),
        ({"save_top_k": 2}, [3, 2, 2, 1], {"x-v1": 16, "x": 12}),
        ({"save_top_k": 2, "enable_version_counter": False}, [3, 2, 1], {"x": 12}),
    ],
)
def test_equal_names_get_versions(train: Callable[..., Any], arguments: dict[str, Any], scores: list[float], kept: dict[str, int]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", filename="x", **arguments)
    run = train(checkpoint, scores=list(scores), max_epochs=len(scores))
    assert {name: run.steps_in(f"checkpoints/{name}.ckpt") for name in names(run)} == kept
    assert len(checkpoint.best_k_models) == len(kept)


def test_overwritten_file_counts_once(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl", filename="{epoch}", save_top_k=2, enable_version_counter=False)
    run = train(checkpoint, scores=[4, 3, 2, 1], max_epochs=2, val_check_interval=2)
    assert names(run) == ["epoch=0", "epoch=1"]
    assert [score.item() for score in checkpoint.best_k_models.values()] == [3, 1]


def test_latest_of_one_name_replaces_itself(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(filename="x"))
    assert names(run) == ["x"]
    assert run.steps_in("checkpoints/x.ckpt") == 12


def test_all_of_one_name_are_kept_as_versions(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(filename="x", save_top_k=-1))
    assert {name: run.steps_in(f"checkpoints/{name}.ckpt") for name in names(run)} == {"x": 4, "x-v1": 8, "x-v2": 12}


def test_second_run_in_the_same_folder_touches_no_file_of_the_first(train: Callable[..., Any]) -> None:
    train(ModelCheckpoint(save_last=True))
    with pytest.warns(UserWarning, match="not empty"):
        run = train(ModelCheckpoint(save_last=True))
    assert names(run) == ["epoch=2-step=12-v1", "epoch=2-step=12", "last-v1", "last"]


def test_second_run_without_version_counter_overwrites(train: Callable[..., Any]) -> None:
    train(ModelCheckpoint(save_last=True))
    with pytest.warns(UserWarning, match="overwritten"):
        run = train(ModelCheckpoint(save_last=True, enable_version_counter=False), max_epochs=3)
    assert names(run) == ["epoch=2-step=12", "last"]


def test_two_callbacks_in_one_folder_do_not_touch_each_others_files(train: Callable[..., Any]) -> None:
    run = train([ModelCheckpoint(), ModelCheckpoint(every_n_epochs=2, save_top_k=-1)], max_epochs=4)
    assert names(run) == ["epoch=1-step=8-v1", "epoch=3-step=16-v1", "epoch=3-step=16"]


def test_slashes_make_folders(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(filename="a/{epoch}-{val/x:.2f}", save_top_k=1), max_epochs=2)
    assert names(run) == ["a/epoch=1-val/x=0.00"]


def test_weights_only_is_passed_on(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_weights_only=True)
    train(checkpoint, max_epochs=1)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert "state_dict" in saved
    assert "optimizer_states" not in saved


def test_verbose_says_what_is_saved(train: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        train(ModelCheckpoint(monitor="vl", verbose=True), scores=[3, 4], max_epochs=2)
    first, second = (message for message in caplog.messages if "global step" in message)
    assert "Epoch 0, global step 4: 'vl' = 3.00000, saved at" in first
    assert "Epoch 1, global step 8: 'vl' = 4.00000 is not among the best 1" in second
