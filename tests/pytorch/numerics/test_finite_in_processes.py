"""Losses and gradients that are not finite in one process of several: all of them do the same."""

from __future__ import annotations

import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from sharded import fsdp
from trainers import joined, quiet

from lightning.fabric.strategies.sharding import local_tensor
from lightning.pytorch import LightningModule, Trainer

NAN, INF = float("nan"), float("inf")


class Net(LightningModule):
    """Its loss, or one gradient, is not finite at a step of one rank."""

    def __init__(self, what: str, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.root = nn.Parameter(torch.zeros(2))
        self.what = what
        self.automatic_optimization = not manual
        self.copies: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.last(self.first(batch)).square().mean() + self.root.sum()
        if self.trainer.global_rank == 1 and batch_idx == 2:
            # A constant that is infinite leaves the gradients themselves finite.
            loss = loss + ((self.root * 0).square().sum().sqrt() if self.what == "gradient" else float(self.what))
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.copies.append([local_tensor(parameter).tolist() for parameter in self.parameters()])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trainer_of(kind: str, size: int, **arguments: Any) -> Trainer:
    arguments["use_distributed_sampler"] = False
    return joined(**arguments) if kind == "ddp" else quiet(strategy=fsdp(size), devices=size, **arguments)


def batches(rank: int, count: int = 5) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(rank)
    return DataLoader([torch.randn(4, 3, generator=generator) for _ in range(count)], batch_size=None)  # type: ignore[arg-type]


def skipped(rank: int, size: int, kind: str, what: str, manual: bool, accumulate: int) -> Any:
    module = Net(what, manual)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(kind, size, on_nonfinite="skip", accumulate_grad_batches=accumulate, gradient_clip_val=None if manual else 1.0).fit(
            module, batches(rank)
        )
    told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    return [module.copies, told]


@pytest.mark.parametrize(("manual", "accumulate"), [(False, 1), (False, 3), (True, 1)])
@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_processes_leave_out_the_same_update(kind: str, what: str, manual: bool, accumulate: int) -> None:
    (copies, told), (others, told_by_the_other) = run(skipped, 2, kind, what, manual, accumulate, timeout=20)
    for held in (copies, others):  # all weights under DDP, a part of them under FSDP
        changed = [first != second for first, second in pairwise(held)]
        assert changed == ([True, False, True, True] if accumulate == 1 else [False, False, False, True])
    assert kind == "fsdp" or copies == others
    assert len(told) == 1
    assert "The update is left out." in told[0]
    if not manual:
        assert told_by_the_other == []
        assert ("Rank 1: The loss is not finite" in told[0]) == (what != "gradient")


def stopped(rank: int, size: int, kind: str, what: str) -> None:
    trainer_of(kind, size, on_nonfinite="error").fit(Net(what), batches(rank))


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_processes_raise_the_same_error(kind: str, what: str) -> None:
    first, second = run_to_end(stopped, 2, kind, what, timeout=20)
    assert (first.error, second.error) == ("NonFiniteError", "NonFiniteError"), first.trace + second.trace
    assert first.message == second.message
    expected = "the gradient of `root` is not" if what == "gradient" else f"Rank 1: The loss is not finite ({what})"
    assert expected in first.message
    assert "in epoch 0, batch 2 (global step 2)" in first.message


def stopped_by_a_batch(rank: int, size: int, kind: str) -> None:
    data = list(batches(rank).dataset)
    if rank == 1:
        data[3][0, 0] = NAN
    trainer_of(kind, size, on_nonfinite="error").fit(Net("0"), DataLoader(data, batch_size=None))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_batch_of_one_process_is_named_in_all(kind: str) -> None:
    first, second = run_to_end(stopped_by_a_batch, 2, kind, timeout=20)
    assert first.message == second.message
    assert "Rank 1: The loss is not finite (nan) in epoch 0, batch 3" in first.message, first.trace
    assert "The batch itself holds values that are not finite." in first.message


def warned(rank: int, size: int, kind: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(kind, size, on_nonfinite="warn").fit(Net("inf"), batches(rank))
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def test_the_process_whose_loss_it_is_warns() -> None:
    quiet_one, other = run(warned, 2, "ddp", timeout=20)
    assert quiet_one == []  # a constant that is infinite leaves its gradients finite
    assert len(other) == 1
    assert "Rank 1: The loss is not finite (inf)" in other[0]


def test_sharded_processes_warn_once() -> None:
    first, second = run(warned, 2, "fsdp", timeout=20)
    assert len(first) == 1
    assert "Rank 1: The loss is not finite (inf) in epoch 0, batch 2" in first[0]
    assert second == []
