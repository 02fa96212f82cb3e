"""A signal anywhere in a run of one process: it stops at the next boundary, is saved once, and goes on to the same weights."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from stopped import BEFORE, ERRORS, LATE, PLACES, Model, files, fit, trainer_of, unwarned

from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever happens, the handlers are those of before, and nobody listens for signals any more."""
    before = [signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)]
    yield
    assert [signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return fit(trainer_of(str(tmp_path_factory.mktemp("whole"))), Model())


def stopped(model: Model, error: type[BaseException], **arguments: Any) -> Any:
    trainer = trainer_of("run", **arguments)
    with pytest.raises(error) as caught:
        fit(trainer, model)
    if error is SIGTERMException:
        assert caught.value.code == 143  # type: ignore[attr-defined]
    return trainer


def error_of(number: int) -> type[BaseException]:
    return KeyboardInterrupt if number == signal.SIGINT else SIGTERMException


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("place", PLACES)
def test_run_stops_is_saved_and_goes_on_to_the_same_weights(place: str, number: int, undisturbed: list[float]) -> None:
    model = Model(place, (number,))
    trainer = stopped(model, error_of(number))
    assert model.sent
    assert trainer.interrupted
    assert trainer.callbacks[0].errors == [ERRORS[number]]  # type: ignore[attr-defined]
    if place in BEFORE:
        assert files("run") == []
        assert trainer.global_step == 0
    else:
        assert "last.ckpt" in files("run")
        saved = torch.load("run/last.ckpt", weights_only=True)
        assert saved["global_step"] == trainer.global_step
    resumed = Model()
    with unwarned():
        weights = fit(trainer_of("run"), resumed, ckpt_path="auto")
    assert weights == undisturbed
    assert resumed.calls["training_step"] == 12 - trainer.global_step


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("place", LATE)
def test_run_that_is_all_but_over_ends_before_the_signal_is_heeded(place: str, number: int, undisturbed: list[float]) -> None:
    trainer, model = trainer_of("run"), Model(place, (number,))
    with pytest.raises(error_of(number)):
        fit(trainer, model)
    weights = [value for parameter in model.parameters() for value in parameter.detach().flatten().tolist()]
    assert weights == undisturbed
    assert files("run") == ["epoch=2-step=12.ckpt"]
    at_once = number == signal.SIGINT and place != "last_epoch_end"  # no boundary comes any more
    assert trainer.interrupted == at_once


@pytest.mark.parametrize("number", SIGNALS)
def test_state_that_was_saved_just_now_is_not_saved_again(number: int, undisturbed: list[float]) -> None:
    stopped(Model("after_a_step", (number,)), error_of(number), callbacks=(ModelCheckpoint("run", every_n_train_steps=1),))
    assert files("run") == ["epoch=1-step=6.ckpt", "last.ckpt"]
    assert os.readlink("run/last.ckpt") == "epoch=1-step=6.ckpt"
    with unwarned():
        weights = fit(trainer_of("run", callbacks=(ModelCheckpoint("run", every_n_train_steps=1),)), Model(), ckpt_path="last")
    assert weights == undisturbed


def test_last_that_was_saved_just_now_is_the_one() -> None:
    callback = ModelCheckpoint("run", every_n_train_steps=2, save_last=True, save_top_k=0)
    stopped(Model("after_a_step", (signal.SIGTERM,)), SIGTERMException, callbacks=(callback,))
    assert files("run") == ["last.ckpt"]
    assert not Path("run/last.ckpt").is_symlink()


def test_last_takes_the_place_of_an_older_one() -> None:
    callback = ModelCheckpoint("run", every_n_train_steps=4, save_last=True)
    stopped(Model("after_a_step", (signal.SIGTERM,)), SIGTERMException, callbacks=(callback,))
    assert files("run") == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == 6
    assert callback.last_model_path == os.path.realpath("run/last.ckpt")


def test_everything_is_saved_where_otherwise_only_weights_are(undisturbed: list[float]) -> None:
    stopped(Model("in_a_step", (signal.SIGTERM,)), SIGTERMException, callbacks=(ModelCheckpoint("run", save_weights_only=True),))
    with unwarned():
        assert fit(trainer_of("run"), Model(), ckpt_path="last") == undisturbed


def test_nothing_is_saved_where_nothing_was_to_be_saved() -> None:
    for arguments in ({"enable_checkpointing": False}, {"callbacks": (ModelCheckpoint("run"),), "fast_dev_run": 8}):
        stopped(Model("first_batch", (signal.SIGTERM,)), SIGTERMException, **{"callbacks": (), **arguments})
    assert not Path("run").exists()


def test_callback_that_saves_on_exceptions_saves_once(undisturbed: list[float]) -> None:
    callback = OnExceptionCheckpoint("run", "broken_off")
    stopped(Model("in_a_step", (signal.SIGTERM,)), SIGTERMException, callbacks=(callback,))
    assert files("run") == ["broken_off.ckpt"]
    assert fit(trainer_of("run", callbacks=(OnExceptionCheckpoint("run", "broken_off"),)), Model(), ckpt_path="last") == undisturbed


def test_gradients_of_half_a_window_are_saved(tmp_path: Path) -> None:
    whole = fit(trainer_of(str(tmp_path / "whole"), accumulate_grad_batches=3), Model())
    stopped(Model("in_a_step", (signal.SIGTERM,)), SIGTERMException, accumulate_grad_batches=3)
    with unwarned():
        assert fit(trainer_of("run", accumulate_grad_batches=3), Model(), ckpt_path="last") == whole


def test_save_in_the_background_is_done_when_the_run_ends(undisturbed: list[float]) -> None:
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    stopped(Model("in_a_step", (signal.SIGTERM,)), SIGTERMException, plugins=[AsyncCheckpointIO()])
    with unwarned():
        assert fit(trainer_of("run"), Model(), ckpt_path="last") == undisturbed


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_other_runs_stop_after_the_batch(entry: str, number: int) -> None:
    taken: list[int] = []

    class Evaluated(Model):
        def step(self, batch: Any, batch_idx: int) -> Any:
            taken.append(batch_idx)
            if batch_idx == 1:
                os.kill(os.getpid(), number)
            return self.net(batch)

        validation_step = test_step = predict_step = step

    from stopped import Pairs
    from torch.utils.data import DataLoader

    trainer = trainer_of("run")
    with pytest.raises(error_of(number)):
        getattr(trainer, entry)(Evaluated(), DataLoader(Pairs(8)))
    assert taken == [0, 1]
    assert files("run") == []


def test_second_interrupt_ends_the_run_in_the_middle_of_a_batch() -> None:
    model = Model("in_a_step", (signal.SIGINT, signal.SIGINT))
    trainer = stopped(model, KeyboardInterrupt)
    assert model.calls["on_train_batch_end"] == 5
    assert trainer.callbacks[0].errors == ["KeyboardInterrupt"]  # type: ignore[attr-defined]
    assert "last.ckpt" not in files("run")


def test_terminations_and_an_interrupt_end_the_run_once() -> None:
    trainer = stopped(Model("in_a_step", (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)), SIGTERMException)
    assert trainer.global_step == 6
    assert trainer.callbacks[0].errors == ["SIGTERMException"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_interrupt_that_others_care_for_is_left_to_them(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        trainer = trainer_of("run")
        fit(trainer, Model("in_a_step", (signal.SIGINT,)))
        assert trainer.state.finished
    finally:
        signal.signal(signal.SIGINT, before)


def test_trainer_can_be_used_again_after_a_signal() -> None:
    trainer = stopped(Model("in_a_step", (signal.SIGTERM,)), SIGTERMException)
    with unwarned():
        fit(trainer, Model())
    assert trainer.state.finished
    assert not trainer.interrupted
