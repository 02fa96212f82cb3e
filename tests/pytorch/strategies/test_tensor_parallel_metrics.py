"""Metrics of torchmetrics in processes that compute one model together: each sample counts once."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from trainers import Vectors, quiet

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy

torchmetrics = pytest.importorskip("torchmetrics", reason="tests Metrics of torchmetrics")

SAMPLES = 6


class Counting(LightningModule):
    """Counts its samples with a Metric that is logged, and with one that is computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 4)
        self.logged, self.by_hand, self.own = (torchmetrics.SumMetric() for _ in range(3))
        self.found: list[float] = []

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], ColwiseParallel())
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        self.own.process_group = None
        self.own.dist_sync_fn = lambda tensor, group=None: [tensor]  # the user's: this process alone

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)
        for metric in (self.logged, self.by_hand, self.own):
            metric.update(float(len(batch)))
        self.log("count", self.logged)

    def on_validation_epoch_end(self) -> None:
        copy.deepcopy(self.by_hand)
        self.found = [float(self.by_hand.compute()), float(self.own.compute())]


def counted(rank: int, size: int, grid: tuple[int, int]) -> Any:
    strategy = ModelParallelStrategy(*grid)
    trainer, model = quiet(strategy=strategy, devices=size), Counting()
    (results,) = trainer.validate(model, DataLoader(Vectors(SAMPLES), batch_size=2), verbose=False)
    assert model.logged.dist_sync_fn is None, "the next run may lay out its processes in another way"
    return [results["count"], *model.found]


@pytest.mark.parametrize(("grid", "own"), [((1, 2), SAMPLES), ((2, 1), SAMPLES / 2)])
def test_samples_count_once_however_many_processes_compute_them_together(grid: tuple[int, int], own: float) -> None:
    assert run(counted, 2, grid) == [[SAMPLES, SAMPLES, own]] * 2
