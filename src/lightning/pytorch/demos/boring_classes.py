"""The smallest models and data with which everything can be tried, and on which a bug is easily shown.

The data is random noise and the models learn nothing of use; subclass them and override what you want to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT

__all__ = [
    "BoringDataModule",
    "BoringDataModuleNoLen",
    "BoringModel",
    "DemoModel",
    "IterableBoringDataModule",
    "ManualOptimBoringModel",
    "Net",
    "RandomDataset",
    "RandomDictDataset",
    "RandomIterableDataset",
    "RandomIterableDatasetWithLen",
]


class RandomDataset(Dataset[Tensor]):
    """``length`` samples of ``size`` normal numbers each, drawn once when the dataset is made.

    Args:
        size: numbers in a sample.
        length: samples in the dataset.

    Example:
        >>> data = RandomDataset(32, 64)
        >>> len(data), data[0].shape
        (64, torch.Size([32]))
    """

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(Dataset[dict[str, Tensor]]):
    """As ``RandomDataset``, with samples that are dicts: ``a`` is the noise, ``b`` the same numbers plus 2.

    Args:
        size: numbers in each value of a sample.
        length: samples in the dataset.

    Example:
        >>> sorted(RandomDictDataset(32, 64)[0])
        ['a', 'b']
    """

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.data[index]
        return {"a": sample, "b": sample + 2}

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Tensor]):
    """A stream of ``count`` samples of ``size`` normal numbers, drawn anew in each pass; its length isn't known.

    Args:
        size: numbers in a sample.
        count: samples in a pass.

    Example:
        >>> len(list(RandomIterableDataset(32, 5)))
        5
    """

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(RandomIterableDataset):
    """The same stream, which tells its length.

    Example:
        >>> len(RandomIterableDatasetWithLen(32, 5))
        5
    """

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """One linear layer from 32 numbers to 2, pulled towards ones, with loaders of 64 samples for every task.

    Override what you want to try.

    Example::

        class Sick(BoringModel):
            def training_step(self, batch, batch_idx):
                return {"loss": super().training_step(batch, batch_idx)["loss"] * float("nan")}

        Trainer(fast_dev_run=True).fit(Sick())
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions of shape ``(N, 2)`` for ``x`` of shape ``(N, 32)``."""
        out: Tensor = self.layer(x)
        return out

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean squared error against ``labels``, or against ones."""
        return F.mse_loss(preds, torch.ones_like(preds) if labels is None else labels)

    def step(self, batch: Any) -> Tensor:
        """The loss of a batch, shared by all steps."""
        return self.loss(self(batch))

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """The loss, as ``{"loss": ...}``."""
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """The loss, as ``{"x": ...}``."""
        return {"x": self.step(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """The loss, as ``{"y": ...}``."""
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Plain SGD with a learning rate of 0.1 that falls to a tenth after every epoch."""
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(RandomDataset(32, 64))

    def val_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(RandomDataset(32, 64))

    def test_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(RandomDataset(32, 64))

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(RandomDataset(32, 64))


class ManualOptimBoringModel(BoringModel):
    """The same model with ``automatic_optimization = False``: its training step runs the optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """One update of the weights; the loss, as ``{"loss": ...}``."""
        optimizer = self.optimizers()
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss}


class BoringDataModule(LightningDataModule):
    """256 samples of 32 numbers, a quarter of them each for training, validation, test and prediction.

    Example::

        Trainer(max_epochs=1).fit(BoringModel(), datamodule=BoringDataModule())
    """

    def __init__(self) -> None:
        super().__init__()
        self.random_full = RandomDataset(32, 64 * 4)

    def setup(self, stage: str) -> None:
        """Cut out the parts that ``stage`` needs."""
        if stage == "fit":
            self.random_train = Subset(self.random_full, indices=range(64))
        if stage in ("fit", "validate"):
            self.random_val = Subset(self.random_full, indices=range(64, 64 * 2))
        if stage == "test":
            self.random_test = Subset(self.random_full, indices=range(64 * 2, 64 * 3))
        if stage == "predict":
            self.random_predict = Subset(self.random_full, indices=range(64 * 3, 64 * 4))

    def train_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample."""
        return DataLoader(self.random_predict)


class BoringDataModuleNoLen(LightningDataModule):
    """Streams of 32 numbers whose loaders have no length: 512 training, 128 validation, 256 test, 64 prediction samples."""

    def __init__(self) -> None:
        super().__init__()

    def setup(self, stage: str) -> None:
        """Make the streams that ``stage`` needs."""
        if stage == "fit":
            self.random_train = RandomIterableDataset(32, 512)
        if stage in ("fit", "validate"):
            self.random_val = RandomIterableDataset(32, 128)
        if stage == "test":
            self.random_test = RandomIterableDataset(32, 256)
        if stage == "predict":
            self.random_predict = RandomIterableDataset(32, 64)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """512 batches of one sample, of unknown length."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """128 batches of one sample, of unknown length."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """256 batches of one sample, of unknown length."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """64 batches of one sample, of unknown length."""
        return DataLoader(self.random_predict)


class IterableBoringDataModule(LightningDataModule):
    """Two loaders for every task, the first with a length, the second without; samples of 4 numbers."""

    def __init__(self) -> None:
        super().__init__()

    def setup(self, stage: str) -> None:
        """Make the pairs of datasets that ``stage`` needs: 16 training, 32 validation, 64 test, 128 prediction samples each."""
        if stage == "fit":
            self.train_datasets = self._pair(16)
        if stage in ("fit", "validate"):
            self.val_datasets = self._pair(32)
        if stage == "test":
            self.test_datasets = self._pair(64)
        if stage == "predict":
            self.predict_datasets = self._pair(128)

    def train_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Two loaders of 16 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.train_datasets]

    def val_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Two loaders of 32 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.val_datasets]

    def test_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Two loaders of 64 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.test_datasets]

    def predict_dataloader(self) -> Iterable[DataLoader[Tensor]]:
        """Two loaders of 128 batches of one sample."""
        return [DataLoader(dataset) for dataset in self.predict_datasets]

    @staticmethod
    def _pair(count: int) -> list[Dataset[Tensor]]:
        return [RandomDataset(4, count), RandomIterableDataset(4, count)]


class DemoModel(LightningModule):
    """One linear layer and a ReLU over 32 numbers; its loss is the sum of its outputs. It brings no loaders.

    Args:
        out_dim: numbers that it predicts for a sample.
        learning_rate: the learning rate of Adam.
    """

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1 = nn.Linear(32, out_dim)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape ``(N, out_dim)`` for ``x`` with 32 numbers in each of ``N`` samples."""
        return torch.relu(self.l1(x.flatten(1)))

    def training_step(self, batch: Any, batch_nb: int) -> STEP_OUTPUT:
        """The sum of the outputs."""
        out: Tensor = self(batch)
        return out.sum()

    def configure_optimizers(self) -> Optimizer:
        """Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Net(nn.Module):
    """A small convolutional classifier of 28 x 28 images of one channel into 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities of shape ``(N, 10)`` for images of shape ``(N, 1, 28, 28)``."""
        features = F.relu(self.conv2(F.relu(self.conv1(x))))
        features = self.dropout1(F.max_pool2d(features, 2)).flatten(1)
        hidden = self.dropout2(F.relu(self.fc1(features)))
        return F.log_softmax(self.fc2(hidden), dim=1)
