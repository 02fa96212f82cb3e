"""What the tests of the Trainer's parts share: a quiet trainer, a model of one weight, countable data, a logger that remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger


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


class Weight(LightningModule):
    """One weight, SGD of rate 1, and a loss whose gradient is the mean of the batch: the weight tells which batches were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[float]] = []  # the samples of each training batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append(batch.flatten().tolist())
        return self.weight * batch.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Evaluated(Weight):
    """The same with the steps of evaluation, which log the mean of the batch, and prediction."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("val", batch.mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("test", batch.mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return batch + self.weight


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


def make_trainer(**arguments: Any) -> Trainer:
    """A trainer on the CPU without anything that talks or writes, unless ``arguments`` say otherwise."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(**{**quiet, **arguments})


def numbers(count: int = 4, start: int = 0, batch_size: int = 1, **arguments: Any) -> DataLoader[Tensor]:
    """A loader of ``count`` numbers."""
    return DataLoader(Numbers(count, start), batch_size=batch_size, **arguments)


def stream(count: int = 4, start: int = 0, **arguments: Any) -> DataLoader[Tensor]:
    """The same without a length."""
    return DataLoader(Stream(count, start), **arguments)


@pytest.fixture(name="Weight")
def weight_fixture() -> type[Weight]:
    """See :class:`Weight`."""
    return Weight


@pytest.fixture
def Logging(Weight: Any) -> Any:
    """A model that logs the number of each training batch as ``x``."""

    class Logging(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", float(batch_idx))
            return self.weight * 1.0

    return Logging


@pytest.fixture(name="Evaluated")
def evaluated_fixture() -> type[Evaluated]:
    """See :class:`Evaluated`."""
    return Evaluated


@pytest.fixture(name="Rows")
def rows_fixture() -> type[Rows]:
    """See :class:`Rows`."""
    return Rows


@pytest.fixture(name="Numbers")
def numbers_class_fixture() -> type[Numbers]:
    """See :class:`Numbers`."""
    return Numbers


@pytest.fixture(name="Stream")
def stream_class_fixture() -> type[Stream]:
    """See :class:`Stream`."""
    return Stream


@pytest.fixture(name="make_trainer")
def make_trainer_fixture() -> Callable[..., Any]:
    """See :func:`make_trainer`."""
    return make_trainer


@pytest.fixture(name="numbers")
def numbers_fixture() -> Callable[..., Any]:
    """See :func:`numbers`."""
    return numbers


@pytest.fixture(name="stream")
def stream_fixture() -> Callable[..., Any]:
    """See :func:`stream`."""
    return stream
