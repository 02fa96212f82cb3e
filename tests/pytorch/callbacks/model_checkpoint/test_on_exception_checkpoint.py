"""OnExceptionCheckpoint: what is saved when training fails, and when the file goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.callbacks.on_exception_checkpoint import OnExceptionCheckpoint

FILE = "on_exception.ckpt"


def crash(prepare: Callable[..., Any], folder: Path, **options: Any) -> Any:
    run = prepare(OnExceptionCheckpoint(folder), **{"crash_at": 6, "enable_checkpointing": True, **options})
    with pytest.raises(RuntimeError, match="crash"):
        run.fit()
    return run


def test_path_is_made_of_folder_and_name() -> None:
    callback = OnExceptionCheckpoint("d")
    assert isinstance(callback, Checkpoint)
    assert callback.ckpt_path == "d/on_exception.ckpt"
    assert OnExceptionCheckpoint("s3://bucket/d", filename="x{epoch}").ckpt_path == "s3://bucket/d/x{epoch}.ckpt"
    assert callback.state_key == "OnExceptionCheckpoint"


def test_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="filename=''"):
        OnExceptionCheckpoint("d", filename="")


def test_exception_in_training_saves(prepare: Callable[..., Any], tmp_path: Path) -> None:
    run = crash(prepare, tmp_path)
    assert run.files == [FILE]
    assert run.steps_in(FILE) == 6


def test_interrupt_saves(prepare: Callable[..., Any], tmp_path: Path) -> None:
    run = prepare(OnExceptionCheckpoint(tmp_path, filename="mine"))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    run.model.validation_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert run.steps_in("mine.ckpt") == 4


def test_run_that_ends_well_saves_nothing(prepare: Callable[..., Any], tmp_path: Path) -> None:
    assert prepare(OnExceptionCheckpoint(tmp_path)).fit().files == []


def test_exception_in_the_sanity_check_leaves_an_earlier_file_alone(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("of an earlier run")
    run = prepare(OnExceptionCheckpoint(tmp_path), num_sanity_val_steps=1)
    run.model.validation_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert (tmp_path / FILE).read_text() == "of an earlier run"


def test_exception_in_fast_dev_run_leaves_an_earlier_file_alone(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("of an earlier run")
    crash(prepare, tmp_path, fast_dev_run=True, crash_at=0)
    assert (tmp_path / FILE).read_text() == "of an earlier run"


def test_exception_in_validation_alone_leaves_an_earlier_file_alone(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("of an earlier run")
    run = prepare(OnExceptionCheckpoint(tmp_path))
    run.model.validation_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.trainer.validate(run.model, run.loaders[1])
    assert (tmp_path / FILE).read_text() == "of an earlier run"


def test_failure_to_save_is_logged_and_hides_nothing(prepare: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Blocking(Callback):
        def on_train_start(self, *args: Any) -> None:
            (tmp_path / "folder").touch()

    run = prepare([OnExceptionCheckpoint(tmp_path / "folder"), Blocking()], crash_at=6, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="crash"):
        run.fit()
    assert "No checkpoint of the interrupted run could be saved" in caplog.text


def test_folder_that_cannot_be_written_is_an_error_before_the_first_step(prepare: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = prepare(OnExceptionCheckpoint(tmp_path / "file" / "folder"), enable_checkpointing=True)
    with pytest.raises(NotADirectoryError, match="since this is no folder"):
        run.fit()
    assert run.trainer.global_step == 0


def test_weights_that_are_no_numbers_are_not_saved(prepare: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Spoiling(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            with torch.no_grad():
                next(iter(pl_module.parameters())).fill_(torch.nan)

    run = prepare([OnExceptionCheckpoint(tmp_path / "folder"), Spoiling()], crash_at=6, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="crash"):
        run.fit()
    assert "'weight' holds NaN or infinity, so the state of the interrupted run is not saved" in caplog.text
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("ckpt_path", [FILE, "last"])
def test_file_goes_after_a_run_that_resumed_from_it_and_ended_well(prepare: Callable[..., Any], tmp_path: Path, ckpt_path: str) -> None:
    crash(prepare, tmp_path)
    run = prepare(OnExceptionCheckpoint(tmp_path), ckpt_path=ckpt_path)
    run.fit()
    assert run.model.weight == 12
    assert run.files == []


def test_file_stays_after_a_resumed_run_that_failed_again(prepare: Callable[..., Any], tmp_path: Path) -> None:
    crash(prepare, tmp_path)
    run = crash(prepare, tmp_path, ckpt_path=FILE, crash_at=9)
    assert run.steps_in(FILE) == 9


def test_file_stays_after_another_run(prepare: Callable[..., Any], tmp_path: Path) -> None:
    crash(prepare, tmp_path)
    run = prepare(OnExceptionCheckpoint(tmp_path)).fit()
    assert run.steps_in(FILE) == 6
    run.trainer.validate(run.model, run.loaders[1], verbose=False)
    run.trainer.validate(run.model, run.loaders[1], verbose=False, ckpt_path=FILE)
    assert run.steps_in(FILE) == 6


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("crash_at", [0, 1, 3, 4, 6])
def test_resumed_run_ends_where_one_without_the_exception_does(
    Weight: Any, make_trainer: Any, numbers: Any, tmp_path: Path, crash_at: int, accumulate: int
) -> None:
    class Crashing(Weight):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(self.seen) == crash_at:
                raise RuntimeError("crash")
            return super().training_step(batch, batch_idx)

    def run(model: Any, **options: Any) -> Any:
        callback = OnExceptionCheckpoint(tmp_path)
        trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=callback, enable_checkpointing=True)
        trainer.fit(model, numbers(4, start=1), **options)
        return model

    whole, crashed, resumed = run(Weight()), Crashing(), Weight()
    with pytest.raises(RuntimeError, match="crash"):
        run(crashed)
    run(resumed, ckpt_path=tmp_path / FILE)
    assert crashed.seen + resumed.seen == whole.seen
    assert resumed.weight == whole.weight
    assert not (tmp_path / FILE).exists()


def test_tilde_leads_home(Weight: Any, make_trainer: Any, numbers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing(Weight):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("crash")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(RuntimeError, match="crash"):
        make_trainer(callbacks=OnExceptionCheckpoint("~/runs"), enable_checkpointing=True).fit(Crashing(), numbers(1))
    assert [path.name for path in (tmp_path / "home/runs").iterdir()] == [FILE]
    assert not Path("~").exists()
    trainer = make_trainer()
    trainer.fit(Weight(), numbers(1), ckpt_path="~/runs/on_exception.ckpt")
    trainer.save_checkpoint("~/mine.ckpt")
    assert (tmp_path / "home/mine.ckpt").is_file()
