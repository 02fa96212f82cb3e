"""What the trainer is doing."""

from __future__ import annotations

import pytest

from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus


@pytest.mark.parametrize(
    ("function", "name"), [("FITTING", "fit"), ("VALIDATING", "validate"), ("TESTING", "test"), ("PREDICTING", "predict")]
)
def test_functions_equal_the_names_of_the_entry_points(function: str, name: str) -> None:
    member = TrainerFn[function]
    assert member == name
    assert member.value == name
    assert str(member) == name


@pytest.mark.parametrize(
    ("stage", "prefix", "evaluating"),
    [
        (RunningStage.TRAINING, "train", False),
        (RunningStage.SANITY_CHECKING, "val", True),
        (RunningStage.VALIDATING, "val", True),
        (RunningStage.TESTING, "test", True),
        (RunningStage.PREDICTING, "predict", False),
    ],
)
def test_a_stage_knows_its_loader_and_whether_it_evaluates(stage: RunningStage, prefix: str, evaluating: bool) -> None:
    assert stage.dataloader_prefix == prefix
    assert stage.evaluating is evaluating


@pytest.mark.parametrize(
    ("status", "stopped", "finished"),
    [
        (TrainerStatus.INITIALIZING, False, False),
        (TrainerStatus.RUNNING, False, False),
        (TrainerStatus.FINISHED, True, True),
        (TrainerStatus.INTERRUPTED, True, False),
    ],
)
def test_a_state_says_how_the_call_ended(status: TrainerStatus, stopped: bool, finished: bool) -> None:
    state = TrainerState(status=status)
    assert (status.stopped, state.stopped, state.finished) == (stopped, stopped, finished)


def test_a_new_state_has_neither_function_nor_stage() -> None:
    state = TrainerState()
    assert (state.status, state.fn, state.stage) == (TrainerStatus.INITIALIZING, None, None)
