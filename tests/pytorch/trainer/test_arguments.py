"""Arguments that the trainer does not have."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.arguments import REPLACEMENTS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpus", "Use `accelerator='gpu', devices=...` instead"),
        ("tpu_cores", "Use `accelerator='tpu', devices=...` instead"),
        ("resume_from_checkpoint", r"Use `trainer.fit\(..., ckpt_path=...\)` instead"),
        ("checkpoint_callback", "Use `enable_checkpointing=...`"),
        ("ipus", "Leave it out"),
        ("max_epoch", r"Did you mean `max_epochs`\?"),
        ("limit_training_batches", r"Did you mean `limit_train_batches`\?"),
        ("xyz", "It has: accelerator, strategy, .*uneven_inputs"),
    ],
)
def test_unknown_argument_is_named_with_what_takes_its_place(name: str, hint: str) -> None:
    arguments: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=f"`Trainer` has no argument `{name}`.*{hint}"):
        Trainer(**arguments)


def test_all_unknown_arguments_are_named() -> None:
    arguments: dict[str, Any] = {"gpus": 1, "max_epoch": 1, "devices": 1}
    with pytest.raises(TypeError, match=r"`gpus`.*`max_epoch`"):
        Trainer(**arguments)


def test_arguments_without_a_name_are_refused() -> None:
    with pytest.raises(TypeError, match=r"no positional arguments.*got \('cpu',\)"):
        Trainer("cpu")  # type: ignore[misc]


def test_replaced_arguments_are_none_that_the_trainer_has() -> None:
    assert not REPLACEMENTS.keys() & inspect.signature(Trainer).parameters.keys()


def test_signature_is_that_of_the_arguments() -> None:
    parameters = inspect.signature(Trainer).parameters
    assert len(parameters) == 50
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_class_derived_from_it_may_have_arguments_of_its_own() -> None:
    class Mine(Trainer):
        def __init__(self, mine: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.mine = mine

    assert Mine(1, accelerator="cpu", logger=False).mine == 1
    with pytest.raises(TypeError, match="max_epochs"):
        Mine(1, max_epoch=1)
