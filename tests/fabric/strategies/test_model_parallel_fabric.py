"""Fabric over a grid of processes: a loop of one's own, with the function that divides the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from processes import run
from test_model_parallel import TOLERANCE, Network, alone, by_data, by_tensor, full
from training import batches, largest_difference, part

from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy

GRIDS = {(1, 2): by_tensor, (2, 1): by_data}


def trained(rank: int, size: int, grid: tuple[int, int], path: str) -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(*grid, parallelize_fn=GRIDS[grid]))
    fabric.launch()
    original = Network()
    model, optimizer = fabric.setup(original, torch.optim.SGD(original.parameters(), lr=0.1, momentum=0.9))
    for batch in batches():
        samples = part(batch, rank // grid[1], grid[0])
        for index, piece in enumerate(samples.split(len(samples) // 3)):
            with fabric.no_backward_sync(model, enabled=index < 2):
                fabric.backward((model(piece) - piece.sum(1, keepdim=True)).square().mean() / 3)
        fabric.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
    weights = full(original)
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 4})
    for parameter in original.parameters():
        nn.init.zeros_(parameter)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(path, state)
    assert state["step"] == 4
    assert full(original) == weights
    return weights


@pytest.mark.parametrize("grid", list(GRIDS))
def test_loop_of_ones_own_gives_the_weights_of_one_process_and_loads_what_it_saved(grid: tuple[int, int], tmp_path: Path) -> None:
    for weights in run(trained, 2, grid, str(tmp_path / "checkpoint")):
        assert largest_difference(weights, alone(0.3)) < TOLERANCE
    assert (tmp_path / "checkpoint").is_dir()
