"""Missing metrics, saves that fail, exceptions that end training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.model_checkpoint import BOOKS, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {}),
        ({"save_on_train_epoch_end": False}, {}),
        ({}, {"val_check_interval": 0.5}),
        ({"save_last": True}, {}),
    ],
)
def test_unknown_monitor_is_an_error_once_validation_has_run(
    prepare: Callable[..., Any], arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    run = prepare(ModelCheckpoint(monitor="nope", **arguments), **options)
    with pytest.raises(MisconfigurationException, match=r"'nope'.*\['vl', 'epoch', 'step'\]"):
        run.fit()
    assert run.files == []
    assert run.trainer.global_step <= 4


def test_unknown_monitor_of_steps_warns_after_validation_and_fails_after_the_epoch(prepare: Callable[..., Any]) -> None:
    run = prepare(ModelCheckpoint(monitor="nope", every_n_train_steps=1), val_check_interval=2)
    with pytest.warns(UserWarning, match="'nope'"), pytest.raises(MisconfigurationException, match="'nope'"):
        run.fit()
    assert run.trainer.global_step == 4


@pytest.mark.parametrize("arguments", [{}, {"every_n_train_steps": 2}])
def test_unknown_monitor_warns_once_without_validation(train: Callable[..., Any], arguments: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"'nope'.*\['epoch', 'step'\]") as caught:
        run = train(ModelCheckpoint(monitor="nope", **arguments), validate=False)
    assert len(caught) == 1
    assert run.files == []


def test_metric_that_validation_has_yet_to_log_is_no_error(train: Callable[..., Any]) -> None:
    run = train(ModelCheckpoint(monitor="vl", every_n_train_steps=3), check_val_every_n_epoch=2)
    assert run.saves == [(8, "epoch=1-step=8.ckpt")]


def test_metric_that_was_due_and_never_came_is_reported_at_the_end(train: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="'vl'"):
        train(ModelCheckpoint(monitor="vl", every_n_train_steps=3), check_val_every_n_epoch=5)


def test_unknown_monitor_does_not_matter_where_nothing_is_kept(train: Callable[..., Any]) -> None:
    assert train(ModelCheckpoint(monitor="nope", save_top_k=0)).files == []


# ---- saves that fail -------------------------------------------------------------------------------------------------


def fail_at(n: int) -> Callable[[str], None]:
    count = iter(range(1, 100))

    def before_save(path: str) -> None:
        if next(count) == n:
            raise OSError("disk full")

    return before_save


@pytest.mark.parametrize(
    ("arguments", "n", "files"),
    [
        ({}, 2, ["epoch=0-step=4.ckpt"]),
        ({"monitor": "vl"}, 2, ["epoch=0-step=4.ckpt"]),
        ({"monitor": "vl", "save_top_k": 2}, 3, ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]),
        ({"monitor": "vl", "save_last": True}, 3, ["epoch=0-step=4.ckpt", "last.ckpt"]),
        ({"save_last": "link"}, 2, ["epoch=0-step=4.ckpt", "last.ckpt -> epoch=0-step=4.ckpt"]),
    ],
)
def test_failed_save_raises_and_changes_nothing(prepare: Callable[..., Any], arguments: dict[str, Any], n: int, files: list[str]) -> None:
    checkpoint = ModelCheckpoint(**arguments)
    kept: dict[str, Any] = {}

    def before_save(path: str) -> None:
        if path not in (checkpoint.best_model_path, checkpoint.last_model_path) and path not in checkpoint.best_k_models:
            raise AssertionError("the books do not hold the file that is being written")
        fail(path)

    fail = fail_at(n)
    run = prepare(checkpoint, scores=[3, 2, 1], before_save=before_save)
    save = run.trainer.save_checkpoint

    def remember(path: str, *arguments: Any) -> None:
        save(path, *arguments)
        kept.update({name: getattr(checkpoint, name) for name in BOOKS})

    run.trainer.save_checkpoint = remember
    with pytest.raises(OSError, match="disk full"):
        run.fit()
    assert [name.removeprefix("checkpoints/") for name in run.files] == files
    after = {name: getattr(checkpoint, name) for name in BOOKS}
    kept["last_model_path"] = after["last_model_path"]  # a link is made after the last save
    assert after == kept


def test_failed_copy_leaves_the_checkpoint_in_the_books(prepare: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(save_last=True, monitor="vl")
    run = prepare(checkpoint, before_save=fail_at(2))
    with pytest.raises(OSError, match="disk full"):
        run.fit()
    assert run.files == ["checkpoints/epoch=0-step=4.ckpt"]
    assert checkpoint.best_model_path.endswith("epoch=0-step=4.ckpt")
    assert checkpoint.last_model_path == ""


def test_old_file_goes_after_the_new_one_is_there(train: Callable[..., Any], prepare: Callable[..., Any]) -> None:
    run = prepare(ModelCheckpoint())
    present = []
    remove = run.trainer.strategy.remove_checkpoint
    run.trainer.strategy.remove_checkpoint = lambda path: (present.append(run.files), remove(path))
    run.fit()
    assert present[0] == ["checkpoints/epoch=0-step=4.ckpt", "checkpoints/epoch=1-step=8.ckpt"]


def test_file_that_is_saved_stays_in_the_books_if_a_logger_fails(prepare: Callable[..., Any]) -> None:
    class Failing(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            raise ConnectionError("no network")

    checkpoint = ModelCheckpoint(dirpath="d")
    run = prepare(checkpoint, logger=Failing("logs"), log_every_n_steps=1)
    with pytest.warns(UserWarning, match="no network"):
        run.fit()
    assert (run.root / checkpoint.best_model_path).is_file()


# ---- exceptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "crash_at", "saved"),
    [
        ({}, 6, [(4, "epoch=0-step=4.ckpt"), (6, "epoch=1-step=6.ckpt")]),
        ({}, 4, [(4, "epoch=0-step=4.ckpt")]),
        ({}, 0, []),
        ({"save_top_k": 0}, 6, [(6, "epoch=1-step=6.ckpt")]),
        ({"monitor": "vl"}, 6, [(4, "epoch=0-step=4.ckpt"), (6, "epoch=1-step=6.ckpt")]),
        ({"save_last": True, "filename": "{vl}"}, 6, [(4, "vl=4.0.ckpt"), (4, "last.ckpt"), (6, "vl=4.0-v1.ckpt"), (6, "last.ckpt")]),
    ],
)
def test_exception_saves_the_state_beside_the_best(
    prepare: Callable[..., Any], arguments: dict[str, Any], crash_at: int, saved: list[tuple[int, str]]
) -> None:
    checkpoint = ModelCheckpoint(save_on_exception=True, **arguments)
    run = prepare(checkpoint, crash_at=crash_at)
    with pytest.raises(RuntimeError, match="crash"):
        run.fit()
    assert run.saves == saved
    assert "step=6" not in checkpoint.best_model_path
    assert len(run.files) == len(set(saved)) - (saved.count((4, "last.ckpt")))


def test_exception_saves_nothing_unless_asked_to(prepare: Callable[..., Any]) -> None:
    run = prepare(ModelCheckpoint(), crash_at=6)
    with pytest.raises(RuntimeError, match="crash"):
        run.fit()
    assert run.saves == [(4, "epoch=0-step=4.ckpt")]


def test_failure_to_save_does_not_hide_the_exception(prepare: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    run = prepare(ModelCheckpoint(save_on_exception=True), crash_at=2, before_save=fail_at(1))
    with pytest.raises(RuntimeError, match="crash"):
        run.fit()
    assert "disk full" in caplog.text
    assert run.files == []


def test_scores_are_copies(train: Callable[..., Any]) -> None:
    checkpoint = ModelCheckpoint(monitor="vl")
    run = train(checkpoint, max_epochs=1)
    run.trainer.callback_metrics["vl"].fill_(9)
    assert checkpoint.best_k_models == {checkpoint.best_model_path: torch.tensor(4.0)}
