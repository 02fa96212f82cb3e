"""OnExceptionCheckpoint: what is saved when training fails, and when the file goes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


def stand_in(**attributes: Any) -> SimpleNamespace:
    """What the callback asks of a trainer."""
    return SimpleNamespace(
        **{
            "fast_dev_run": False,
            "sanity_checking": False,
            "ckpt_path": None,
            "state": SimpleNamespace(fn=TrainerFn.FITTING),
            "strategy": SimpleNamespace(remove_checkpoint=os.remove),
            "save_checkpoint": lambda path: Path(path).write_text("state"),
            **attributes,
        }
    )


def test_path_is_made_of_folder_and_name() -> None:
    callback = OnExceptionCheckpoint("d")
    assert isinstance(callback, Checkpoint)
    assert callback.ckpt_path == "d/on_exception.ckpt"
    assert OnExceptionCheckpoint("s3://bucket/d", filename="x{epoch}").ckpt_path == "s3://bucket/d/x{epoch}.ckpt"
    assert callback.state_key == "OnExceptionCheckpoint"


def test_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="filename=''"):
        OnExceptionCheckpoint("d", filename="")


@pytest.mark.parametrize("exception", [RuntimeError("x"), KeyboardInterrupt()])
def test_exception_in_training_saves(tmp_path: Path, exception: BaseException) -> None:
    OnExceptionCheckpoint(tmp_path).on_exception(stand_in(), None, exception)
    assert (tmp_path / "on_exception.ckpt").read_text() == "state"


@pytest.mark.parametrize(
    "attributes", [{"fast_dev_run": 1}, {"sanity_checking": True}, {"state": SimpleNamespace(fn=TrainerFn.VALIDATING)}]
)
def test_exception_outside_of_training_leaves_an_earlier_file_alone(tmp_path: Path, attributes: dict[str, Any]) -> None:
    (tmp_path / "on_exception.ckpt").write_text("of an earlier run")
    callback = OnExceptionCheckpoint(tmp_path)
    trainer = stand_in(**attributes)
    callback.on_exception(trainer, None, RuntimeError("x"))
    callback.teardown(trainer, None, "fit")
    assert (tmp_path / "on_exception.ckpt").read_text() == "of an earlier run"


def test_failure_to_save_is_logged_and_hides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    OnExceptionCheckpoint(tmp_path / "no such folder").on_exception(stand_in(), None, RuntimeError("x"))
    assert "No such file or directory" in caplog.text


def test_file_stays_after_the_run_that_failed(tmp_path: Path) -> None:
    callback = OnExceptionCheckpoint(tmp_path)
    trainer = stand_in(ckpt_path=callback.ckpt_path)
    callback.setup(trainer, None, "fit")
    callback.on_exception(trainer, None, RuntimeError("x"))
    callback.teardown(trainer, None, "fit")
    assert (tmp_path / "on_exception.ckpt").exists()


@pytest.mark.parametrize(("resumed", "stays"), [(True, False), (False, True)])
def test_file_goes_after_a_run_that_resumed_from_it_and_ended_well(tmp_path: Path, resumed: bool, stays: bool) -> None:
    callback = OnExceptionCheckpoint(tmp_path)
    callback.on_exception(stand_in(), None, RuntimeError("x"))
    trainer = stand_in(ckpt_path=str(tmp_path / "." / "on_exception.ckpt") if resumed else None)
    callback.setup(trainer, None, "fit")
    callback.teardown(trainer, None, "fit")
    assert (tmp_path / "on_exception.ckpt").exists() is stays


def test_run_that_ends_well_without_a_file_needs_none(tmp_path: Path) -> None:
    callback = OnExceptionCheckpoint(tmp_path)
    trainer = stand_in(ckpt_path=callback.ckpt_path)
    callback.setup(trainer, None, "fit")
    callback.teardown(trainer, None, "fit")
    assert list(tmp_path.iterdir()) == []
