"""Gathering from all processes in hooks of evaluation, whose processes may have different batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from trainers import Numbers, Stream, Weight, joined

TASKS = {"validation": "validate", "test": "test", "predict": "predict"}


class Gathers(Weight):
    """Gathers in one hook of evaluation, and notes the shapes that come back."""

    def __init__(self, hook: str, how: str = "all_gather") -> None:
        super().__init__()
        self.how = how
        self.shapes: list[list[int]] = []
        setattr(self, hook, self.gather)

    def setup(self, stage: str) -> None:
        self.trainer.strategy.side_channel.grace = 2.0  # type: ignore[attr-defined]  # for a process that hangs in a collective

    def gather(self, batch: Any = None, *_: Any) -> Any:
        value = batch if isinstance(batch, Tensor) else torch.zeros(2 + self.global_rank if self.how == "by rank" else 2)
        found = self.trainer.strategy.reduce(value.sum()) if self.how == "reduce" else self.all_gather(value)
        self.shapes.append(list(found.shape))
        return value

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None

    def test_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return batch


def gathered(rank: int, size: int, hook: str, how: str, count: int, batch_size: int, **arguments: Any) -> list[list[int]]:
    model = Gathers(hook, how)
    name = next(name for name in TASKS if name in hook)
    dataset: Any = Stream(count) if how == "stream" else Numbers(count)
    sampler = DistributedSampler(dataset, size, rank, shuffle=False) if how == "repeated" else None
    getattr(joined(**arguments), TASKS[name])(model, DataLoader(dataset, batch_size=batch_size, sampler=sampler))
    return model.shapes


def in_fit(rank: int, size: int) -> list[list[int]]:
    model = Gathers("validation_step")
    loader = DataLoader(Numbers(5), batch_size=1)
    joined(num_sanity_val_steps=2).fit(model, DataLoader(Numbers(2)), loader)
    return model.shapes


@pytest.mark.parametrize("hook", ["validation_step", "test_step", "predict_step"])
def test_processes_with_as_many_batches_gather_in_their_steps(hook: str) -> None:
    assert run(gathered, 2, hook, "all_gather", 8, 2) == [[[2, 2, 1]] * 2] * 2


@pytest.mark.parametrize("hook", ["validation_step", "predict_step", "on_test_batch_end"])
@pytest.mark.parametrize("count", [5, 1])  # 3 and 2 batches; 1 and none
def test_gathering_in_batches_of_different_numbers_is_an_error_that_says_what_to_do(hook: str, count: int) -> None:
    outcomes = run_to_end(gathered, 2, hook, "all_gather", count, 1)
    told = next(outcome for outcome in outcomes if outcome.error == "MisconfigurationException")
    name = next(name for name in TASKS if name in hook)
    assert f"{(count + 1) // 2} on rank 0, {count // 2} on rank 1" in told.message
    assert f"`on_{name}_epoch_end`" in told.message
    assert all(outcome.error for outcome in outcomes) or hook == "predict_step"  # whose end waits for nobody
    assert max(outcome.seconds for outcome in outcomes) < 30


def test_reducing_in_batches_of_different_numbers_is_the_same_error() -> None:
    outcomes = run_to_end(gathered, 2, "validation_step", "reduce", 5, 1)
    assert {outcome.error for outcome in outcomes} == {"MisconfigurationException"}


def test_sanity_check_may_gather_where_all_have_as_many_batches_and_validation_says_that_they_do_not() -> None:
    outcomes = run_to_end(in_fit, 2)
    assert {outcome.error for outcome in outcomes} == {"MisconfigurationException"}
    assert "batches of validation" in outcomes[0].message


def limited_in_fit(rank: int, size: int) -> list[list[int]]:
    return gathered(rank, size, "validation_step", "all_gather", 5, 1, limit_val_batches=2)


def test_a_limit_that_all_processes_reach_makes_their_numbers_equal() -> None:
    assert run(limited_in_fit, 2) == [[[2, 1, 1]] * 2] * 2


@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "on_validation_epoch_start"])
def test_hooks_of_the_epoch_gather_whatever_the_batches_are(hook: str) -> None:
    assert run(gathered, 2, hook, "all_gather", 5, 1) == [[[2, 2]]] * 2


@pytest.mark.parametrize(("hook", "how", "count", "shown"), [
    ("validation_step", "all_gather", 5, "(3, 1) of torch.float32 on rank 0, (2, 1) of torch.float32 on rank 1"),
    ("on_validation_epoch_end", "by rank", 6, "(2,) of torch.float32 on rank 0, (3,) of torch.float32 on rank 1"),
])  # fmt: skip
def test_tensors_of_different_shapes_are_an_error_in_every_process(hook: str, how: str, count: int, shown: str) -> None:
    outcomes = run_to_end(gathered, 2, hook, how, count, 3)
    assert [outcome.error for outcome in outcomes] == ["MisconfigurationException"] * 2
    assert all(shown in outcome.message for outcome in outcomes)


def test_sampler_that_repeats_samples_and_streams_of_unknown_length_may_be_gathered_from() -> None:
    assert run(gathered, 2, "validation_step", "repeated", 5, 1) == [[[2, 1, 1]] * 3] * 2
    assert run(gathered, 2, "validation_step", "stream", 4, 2) == [[[2, 2, 1]] * 2] * 2


def fraction(rank: int, size: int, stage: str) -> None:
    """Half a batch on rank 1 alone."""
    loader = DataLoader(Numbers(4 if rank == 0 else 1))
    arguments: dict[str, Any] = {f"limit_{stage}_batches": 0.5, "use_distributed_sampler": False}
    if stage == "train":
        joined(**arguments).fit(Weight(), loader)
    else:
        joined(**arguments).validate(Gathers("on_validation_start"), loader)


@pytest.mark.parametrize("stage", ["train", "val"])
def test_fraction_that_comes_to_nothing_in_one_process_is_an_error_in_all(stage: str) -> None:
    outcomes = run_to_end(fraction, 2, stage)
    assert [outcome.error for outcome in outcomes] == ["MisconfigurationException"] * 2
    assert all(f"limit_{stage}_batches=0.5 of 1 batches" in each.message and "on rank 1" in each.message for each in outcomes)


def loaders_by_rank(rank: int, size: int) -> None:
    joined().validate(Gathers("on_validation_start"), [DataLoader(Numbers(2))] * (rank + 1))


def test_different_numbers_of_loaders_are_an_error_in_every_process() -> None:
    outcomes = run_to_end(loaders_by_rank, 2)
    assert [outcome.error for outcome in outcomes] == ["MisconfigurationException"] * 2
    assert "different numbers of loaders: 1 on rank 0, 2 on rank 1" in outcomes[0].message
