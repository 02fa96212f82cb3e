"""Going on from a checkpoint: state, other folders, files that must stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:The checkpoint folder .* is not empty")


def names(run: Any) -> list[str]:
    return [name.removesuffix(".ckpt") for name in run.files]


def state(folder: str, **changes: Any) -> dict[str, Any]:
    books = {f"{folder}/a.ckpt": torch.tensor(3.0), f"{folder}/b.ckpt": torch.tensor(1.0), f"{folder}/c.ckpt": torch.tensor(2.0)}
    return {
        "monitor": "vl",
        "dirpath": folder,
        "best_k_models": books,
        "best_model_path": f"{folder}/b.ckpt",
        "best_model_score": torch.tensor(1.0),
        "current_score": torch.tensor(2.0),
        "kth_best_model_path": f"{folder}/a.ckpt",
        "kth_value": torch.tensor(3.0),
        "last_model_path": f"{folder}/last.ckpt",
        **changes,
    }


def test_state_is_taken_over(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="vl", save_top_k=3)
    given = state(str(tmp_path))
    checkpoint.load_state_dict(given)
    assert checkpoint.state_dict() == {**given, "current_score": None}


def test_only_the_best_path_is_taken_over_under_another_dirpath(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "new", monitor="vl", save_top_k=3)
    with pytest.warns(UserWarning, match=r"new'.*'/old'"):
        checkpoint.load_state_dict(state("/old"))
    assert checkpoint.best_model_path == "/old/b.ckpt"
    assert (checkpoint.best_k_models, checkpoint.best_model_score, checkpoint.last_model_path) == ({}, None, "")


def test_state_of_an_unmonitored_callback_without_entries(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path)
    checkpoint.load_state_dict({"dirpath": str(tmp_path), "best_model_path": "x.ckpt"})
    assert (checkpoint.best_model_path, checkpoint.last_model_path, checkpoint.best_k_models) == ("x.ckpt", "", {})


@pytest.mark.parametrize(("mode", "kept"), [("min", ["b.ckpt", "c.ckpt"]), ("max", ["a.ckpt", "c.ckpt"])])
def test_smaller_top_k_forgets_the_worst(tmp_path: Path, mode: str, kept: list[str]) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="vl", save_top_k=2, mode=mode)
    checkpoint.load_state_dict(state(str(tmp_path)))
    assert [Path(path).name for path in checkpoint.best_k_models] == kept
    assert checkpoint.kth_value == 2


def resumable(folder: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, **{"monitor": "vl", "save_top_k": 2, "save_last": True, **arguments})


def test_resumed_run_goes_on_ranking(train: Callable[..., Any], tmp_path: Path) -> None:
    train(resumable(tmp_path / "d"), scores=[3, 2, 1])
    checkpoint = resumable(tmp_path / "d")
    run = train(checkpoint, scores=[0, 9], max_epochs=5, ckpt_path=str(tmp_path / "d/last.ckpt"))
    assert names(run) == ["d/epoch=2-step=12", "d/epoch=3-step=16", "d/last"]
    assert (checkpoint.best_model_score, checkpoint.kth_value) == (0, 1)


def test_resumed_run_under_another_dirpath_keeps_the_old_files(train: Callable[..., Any], tmp_path: Path) -> None:
    old = names(train(resumable(tmp_path / "d"), scores=[3, 2, 1]))
    with pytest.warns(UserWarning, match="old files stay"):
        run = train(resumable(tmp_path / "e"), scores=[0, 9], max_epochs=5, ckpt_path=str(tmp_path / "d/last.ckpt"))
    assert names(run) == [*old, "e/epoch=3-step=16", "e/epoch=4-step=20", "e/last"]


def test_unmonitored_run_under_another_dirpath_keeps_the_old_file(train: Callable[..., Any], tmp_path: Path) -> None:
    arguments = {"monitor": None, "save_top_k": 1}
    train(resumable(tmp_path / "d", **arguments), max_epochs=1)
    with pytest.warns(UserWarning, match="old files stay"):
        run = train(resumable(tmp_path / "e", **arguments), max_epochs=3, ckpt_path=str(tmp_path / "d/last.ckpt"))
    assert names(run) == ["d/epoch=0-step=4", "d/last", "e/epoch=2-step=12", "e/last"]


@pytest.mark.parametrize("arguments", [{"save_last": None}, {"monitor": None, "save_top_k": 1, "save_last": None}])
def test_checkpoint_that_a_run_resumed_from_stays(train: Callable[..., Any], tmp_path: Path, arguments: dict[str, Any]) -> None:
    train(resumable(tmp_path / "d", **arguments), scores=[3, 2], max_epochs=2)
    run = train(resumable(tmp_path / "d", **arguments), scores=[0, 0], max_epochs=4, ckpt_path=str(tmp_path / "d/epoch=1-step=8.ckpt"))
    assert "d/epoch=1-step=8" in names(run)
    assert "d/epoch=3-step=16" in names(run)


def test_target_of_a_link_that_a_run_resumed_from_stays(train: Callable[..., Any], tmp_path: Path) -> None:
    arguments = {"monitor": None, "save_top_k": 1, "save_last": "link"}
    train(resumable(tmp_path / "d", **arguments), max_epochs=1)
    (tmp_path / "start.ckpt").symlink_to(tmp_path / "d/epoch=0-step=4.ckpt")
    run = train(resumable(tmp_path / "d", **arguments), max_epochs=2, ckpt_path=str(tmp_path / "start.ckpt"))
    assert "d/epoch=0-step=4" in names(run)


def test_run_that_has_nothing_left_to_do_saves_nothing(train: Callable[..., Any], tmp_path: Path) -> None:
    arguments = {"monitor": None, "save_top_k": 1, "save_last": None}
    before = names(train(resumable(tmp_path / "d", **arguments), max_epochs=2))
    run = train(
        resumable(tmp_path / "d", **{**arguments, "save_last": True}), max_epochs=2, ckpt_path=str(tmp_path / "d/epoch=1-step=8.ckpt")
    )
    assert names(run) == before


def test_state_that_a_run_resumed_from_is_not_saved_again(train: Callable[..., Any]) -> None:
    train(ModelCheckpoint(dirpath="d", every_n_train_steps=4, save_on_train_epoch_end=False), validate=False, max_epochs=1)
    with pytest.warns(UserWarning, match="callbacks that this trainer does not have"):
        run = train(ModelCheckpoint(dirpath="d"), validate=False, max_epochs=2, ckpt_path="d/epoch=0-step=4.ckpt")
    assert run.saves == [(8, "epoch=1-step=8.ckpt")]


def test_state_that_a_run_resumed_from_is_not_saved_as_last(train: Callable[..., Any]) -> None:
    train(ModelCheckpoint(dirpath="d", every_n_train_steps=4), validate=False, max_epochs=1)
    checkpoint = ModelCheckpoint(dirpath="d", every_n_train_steps=4, save_last=True)
    run = train(checkpoint, validate=False, max_epochs=1, ckpt_path="d/epoch=0-step=4.ckpt")
    assert run.saves == []


@pytest.mark.parametrize("failing", ["configure_optimizers", "training_step"])
def test_run_that_fails_before_it_trains_saves_nothing(train: Callable[..., Any], prepare: Callable[..., Any], failing: str) -> None:
    train(resumable(Path("d")), max_epochs=1)
    run = prepare(resumable(Path("d"), save_on_exception=True), max_epochs=2, ckpt_path="d/epoch=0-step=4.ckpt")
    setattr(run.model, failing, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert run.saves == []


def test_step_that_was_saved_before_is_not_due_again(train: Callable[..., Any], tmp_path: Path) -> None:
    arguments = {"monitor": None, "save_last": None, "save_top_k": -1, "every_n_train_steps": 2}
    train(resumable(tmp_path / "d", **arguments), max_epochs=1)
    # The first batches after the restart take no optimizer step: the global step is still that of the checkpoint.
    run = train(
        resumable(tmp_path / "d", **arguments), max_epochs=2, accumulate_grad_batches=4, ckpt_path=str(tmp_path / "d/epoch=0-step=4.ckpt")
    )
    assert run.saves == []
