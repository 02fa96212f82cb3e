"""Several loaders side by side: interrupted anywhere, each goes on bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from interrupted_loaders import Augmented, collate

from lightning.fabric.utilities.loader_state import ResumableLoader
from lightning.fabric.utilities.seed import collect_rng_states, seed_everything, set_rng_states
from lightning.pytorch.utilities import CombinedLoader


def combined(mode: Any, wrapped: bool = True) -> CombinedLoader:
    loaders: list[Any] = [
        DataLoader(Augmented(8), batch_size=2, shuffle=True, collate_fn=collate),
        DataLoader(Augmented(3), batch_size=2, shuffle=True, collate_fn=collate, num_workers=1),
    ]
    return CombinedLoader([ResumableLoader(loader) for loader in loaders] if wrapped else loaders, mode)


def flat(row: Any) -> torch.Tensor:
    batches, batch_idx, _ = row
    parts = [torch.zeros(0) if batch is None else batch.flatten() for batch in batches]
    return torch.cat([*parts, torch.tensor([batch_idx]), torch.rand(1)])


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_the_rest_of_the_run_is_the_same_after_every_batch(mode: str) -> None:
    seed_everything(3)
    wanted = [[flat(row) for row in loader] for loader in [combined(mode, wrapped=False)] for _ in range(2)]
    seed_everything(3)
    loader, saved, whole = combined(mode), [], []
    for epoch in range(2):
        whole.append([])
        for k, row in enumerate(loader):
            whole[epoch].append(flat(row))
            saved.append((epoch, k + 1, loader.state_dict(), collect_rng_states()))
    for got, expected in zip(whole, wanted, strict=True):
        assert all(map(torch.equal, got, expected))
    for epoch, k, state, rng in saved:
        resumed = combined(mode)
        resumed.load_state_dict(state)
        set_rng_states(rng)
        rest = [flat(row) for row in resumed] if k < len(wanted[epoch]) else []
        assert len(rest) == len(wanted[epoch]) - k
        assert all(map(torch.equal, rest, wanted[epoch][k:])), (epoch, k)
