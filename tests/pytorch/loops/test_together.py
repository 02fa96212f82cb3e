"""Epochs that `on_train_batch_start` ends, in several processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from trainers import Numbers, Weight, joined

from lightning.pytorch.loops import together


class Ends(Weight):
    """Ends each epoch at a batch, in some processes only."""

    def __init__(self, at: int, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.at, self.ranks = at, ranks

    def setup(self, stage: str) -> None:
        self.trainer.strategy.side_channel.grace = 2.0  # type: ignore[attr-defined]  # for a process that hangs in a collective

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.at and self.global_rank in self.ranks else None


def trained(rank: int, size: int, at: int, ranks: tuple[int, ...]) -> list[Any]:
    together.PATIENCE = 3.0
    model, trainer = Ends(at, ranks), joined(max_epochs=2)
    trainer.fit(model, DataLoader(Numbers(8)))
    return [len(model.seen), trainer.current_epoch, trainer.global_step]


@pytest.mark.parametrize("at", [0, 2])
def test_epoch_ends_early_where_all_processes_end_it(at: int) -> None:
    assert run(trained, 2, at, (0, 1)) == [[2 * at, 2, 2 * at]] * 2


def test_one_process_that_ends_its_epoch_alone_is_an_error_that_names_it_and_ends_all() -> None:
    outcomes = run_to_end(trained, 2, 1, (1,))
    assert outcomes[1].error == "RuntimeError"
    assert "returned -1 for batch 1 of epoch 0 on rank 1, and within 3 s not on rank 0." in outcomes[1].message
    assert outcomes[0].error in ("PeerFailure", "Died")  # in a collective it hears nothing, and is ended after a while
