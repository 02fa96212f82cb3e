"""The base class of callbacks that write predictions somewhere, batch by batch or all at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.enums import LightningEnum
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.callback import Callback

if TYPE_CHECKING:
    import lightning.pytorch as pl


class WriteInterval(LightningEnum):
    """When :class:`BasePredictionWriter` writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """Whether each batch is written when it is done."""
        return self in (WriteInterval.BATCH, WriteInterval.BATCH_AND_EPOCH)

    @property
    def on_epoch(self) -> bool:
        """Whether all predictions are written at the end."""
        return self in (WriteInterval.EPOCH, WriteInterval.BATCH_AND_EPOCH)


class BasePredictionWriter(Callback):
    """Derive from this class and override one or both of the ``write_on_*`` methods to store predictions.

    Every process writes what it predicted itself. With ``trainer.predict(..., return_predictions=False)`` and the interval
    ``"batch"`` no prediction is kept in memory.

    Args:
        write_interval: ``"batch"`` calls :meth:`write_on_batch_end` after every batch, ``"epoch"`` calls
            :meth:`write_on_epoch_end` once with all predictions, ``"batch_and_epoch"`` does both.

    Raises:
        MisconfigurationException: if ``write_interval`` is none of these.

    Example::

        class FilePerBatch(BasePredictionWriter):
            def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
                torch.save((batch_indices, prediction), f"predictions-{dataloader_idx}-{batch_idx}.pt")

        trainer = Trainer(callbacks=FilePerBatch(write_interval="batch"))
        trainer.predict(model, dataloaders, return_predictions=False)
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        super().__init__()
        accepted = [interval.value for interval in WriteInterval]
        if not isinstance(write_interval, str) or write_interval.lower() not in accepted:
            raise MisconfigurationException(f"`write_interval={write_interval!r}` is not one of {accepted}.")
        self.interval = WriteInterval(write_interval.lower())

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Override to write the prediction of one batch.

        Args:
            trainer: the trainer.
            pl_module: the model.
            prediction: what ``predict_step`` returned.
            batch_indices: which samples of the dataset the batch holds; empty where the loader does not tell.
            batch: the batch.
            batch_idx: the number of the batch in its loader.
            dataloader_idx: the number of the loader.
        """
        raise NotImplementedError(
            f"`{type(self).__name__}(write_interval={self.interval.value!r})` writes after each batch: override `write_on_batch_end`."
        )

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Override to write all predictions at once.

        Args:
            trainer: the trainer.
            pl_module: the model.
            predictions: what ``predict_step`` returned for each batch; with several loaders, a list of that for each.
            batch_indices: for each loader, the sample indices of each of its batches.
        """
        raise NotImplementedError(
            f"`{type(self).__name__}(write_interval={self.interval.value!r})` writes at the end: override `write_on_epoch_end`."
        )

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write this batch, if batches are written."""
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write everything, if the end is when to write."""
        if self.interval.on_epoch:
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)
