"""What all scenarios share: the register of them, a quiet trainer, countable data, and facts as plain data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning.pytorch import Callback, LightningModule, Trainer

SCENARIOS: dict[str, Callable[[], Any]] = {}

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    """Enter a scenario under the name of its function."""
    SCENARIOS[function.__name__] = function
    return function


def trainer(**arguments: Any) -> Trainer:
    """A trainer on one CPU without bars, summaries, loggers or checkpoints, unless ``arguments`` say otherwise."""
    return Trainer(**{**QUIET, **arguments})


def plain(value: Any) -> Any:
    """``value`` as data that JSON can hold and that compares exactly after a round trip."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return type(value).__name__


def attempt(action: Callable[[], Any]) -> str:
    """The name of the type of the exception that ``action`` raises, or "no error"."""
    try:
        action()
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return type(error).__name__
    return "no error"


# Speed advice of the reference about loaders, sampling intervals and hardware: no facts about what a run does.
_ADVICE = ("workers", "log_every_n_steps", "litlogger", "GPU", "isinstance(treespec")


@contextmanager
def warned() -> Iterator[list[str]]:
    """Collect the categories of the warnings inside, without advice on speed and without torch's own."""
    categories: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield categories
    shown = (w for w in caught if not any(word in str(w.message) for word in _ADVICE) and "/torch/" not in w.filename)
    categories.extend(w.category.__name__ for w in shown)
    categories.sort()


class Numbered(Dataset[Tensor]):
    """Samples ``[k, 1]`` for ``k`` from ``start``: a batch tells which samples it holds."""

    def __init__(self, count: int, start: int = 0) -> None:
        self.count, self.start = count, start

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError(index)
        return torch.tensor([self.start + index, 1.0])

    def __len__(self) -> int:
        return self.count


class Stream(IterableDataset[Tensor]):
    """The same samples from a dataset that hides its length."""

    def __init__(self, count: int, start: int = 0) -> None:
        self.count, self.start = count, start

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.count):
            yield torch.tensor([self.start + index, 1.0])


def loader(count: int, start: int = 0, batch_size: int = 1, **arguments: Any) -> DataLoader[Tensor]:
    """A loader of ``count`` samples numbered from ``start``."""
    return DataLoader(Numbered(count, start), batch_size=batch_size, **arguments)


def stream(count: int, start: int = 0) -> DataLoader[Tensor]:
    """The same loader without a length."""
    return DataLoader(Stream(count, start))


class Plain(LightningModule):
    """Two weights, a loss that is linear in them, SGD: every number of a run can be told by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, -0.25]))

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            batch = list(batch.values())
        if isinstance(batch, (list, tuple)):
            batch = torch.cat([part for part in batch if part is not None])
        return (batch * self.weights).sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": 0.1 * self(batch).mean()}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"x": self(batch).mean()}

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch).mean()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class At(Callback):
    """Calls a function with trainer and module at one hook."""

    def __init__(self, hook: str, action: Callable[[Trainer, LightningModule], Any]) -> None:
        self.hook, self.action = hook, action
        setattr(self, hook, self._act)

    def _act(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.action(trainer, pl_module)
