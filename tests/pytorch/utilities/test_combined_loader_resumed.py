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


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
@pytest.mark.parametrize("lengths", [(8, 3), (3, 8), (4, 4)])
@pytest.mark.parametrize("limits", [None, [2, 1]])
def test_the_epoch_after_the_resumed_one_is_whole(mode: Any, lengths: tuple[int, int], limits: Any) -> None:
    def make() -> CombinedLoader:
        each = [DataLoader(range(n), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(n)) for n in lengths]  # type: ignore[arg-type]
        loader = CombinedLoader([ResumableLoader(one) for one in each], mode)
        loader.limits = limits
        return loader

    loader, saved, whole = make(), [], []
    for epoch in range(3):
        whole.append([])
        for row in loader:
            whole[epoch].append(str(row))
            saved.append((epoch, len(whole[epoch]), loader.state_dict()))
    for epoch, count, state in saved:
        resumed = make()
        resumed.load_state_dict(state)
        rest = whole[epoch][count:]
        if not rest:
            continue  # whether the samplers are asked for more is up to the loop
        assert list(map(str, resumed)) == rest, (epoch, count)
        if epoch < 2:
            assert list(map(str, resumed)) == whole[epoch + 1], (epoch, count)
