"""Trainers, models and data for tests of the Trainer in several processes.

A run in the processes of ``processes.run`` and one alone see the same global batches: :func:`loader` gives each process a
part of the samples of a global batch, and a single process all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy


def quiet(**arguments: Any) -> Trainer:
    """A trainer on one CPU device of each process, without anything that talks or writes, unless ``arguments`` say otherwise."""
    silent: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(**{**silent, **arguments})


def joined(ddp: dict[str, Any] | None = None, **arguments: Any) -> Trainer:
    """The same over all processes that have met, as those of one machine.

    Args:
        ddp: arguments of DDPStrategy.
        arguments: of the Trainer.
    """
    return quiet(**{"strategy": DDPStrategy(**(ddp or {})), "devices": torch.distributed.get_world_size(), **arguments})


class Numbers(Dataset[Tensor]):
    """The samples ``[0.0], [1.0], ...``: a batch tells which samples it holds."""

    def __init__(self, count: int, start: int = 0) -> None:
        self.count, self.start = count, start

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(self.start + index)])

    def __len__(self) -> int:
        return self.count


class Stream(IterableDataset[Tensor]):
    """The same samples from a dataset that does not know its length."""

    def __init__(self, count: int, start: int = 0) -> None:
        self.count, self.start = count, start

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(self.start + index)]) for index in range(self.count))


class Vectors(Dataset[Tensor]):
    """Random vectors of 5 numbers, the same in every process."""

    def __init__(self, count: int) -> None:
        self.samples = torch.randn(count, 5, generator=torch.Generator().manual_seed(5))

    def __getitem__(self, index: int) -> Tensor:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


def loader(dataset: Any, global_batch: int, size: int, **arguments: Any) -> DataLoader[Any]:
    """A shuffled loader that the trainer shares out among ``size`` processes; for one process, one that gives the same global batches."""
    if size > 1:
        return DataLoader(dataset, batch_size=global_batch // size, shuffle=True, **arguments)
    return DataLoader(dataset, batch_size=global_batch, sampler=DistributedSampler(dataset, 1, 0, shuffle=True), **arguments)


class Weight(LightningModule):
    """One weight, SGD of rate 1, and a loss whose gradient is the mean of the batch: the weight tells which batches were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[float]] = []  # the samples of each training batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append(batch.flatten().tolist())
        return self.weight * batch.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Evaluated(Weight):
    """The same with the steps of evaluation and prediction, which note their samples; evaluation logs their mean."""

    sync = True

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[list[float]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.evaluated.append(batch.flatten().tolist())
        self.log("val", batch.mean(), sync_dist=self.sync)

    def test_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.evaluated.append(batch.flatten().tolist())
        self.log("test", batch.mean(), sync_dist=self.sync)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return batch + self.weight


class Regression(LightningModule):
    """Learns the sum of vectors, and notes its losses."""

    def __init__(self, normalises: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        norm = nn.BatchNorm1d(7) if normalises else nn.Identity()
        self.net = nn.Sequential(nn.Linear(5, 7), norm, nn.Tanh(), nn.Linear(7, 1))
        self.losses: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Rows(Logger):
    """Remembers the rows that it gets, and how it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.finalized: list[str] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def finalize(self, status: str) -> None:
        self.finalized.append(status)

    def of(self, name: str) -> list[tuple[int | None, float]]:
        """The values of one key with their steps."""
        return [(step, row[name]) for step, row in self.rows if name in row]
