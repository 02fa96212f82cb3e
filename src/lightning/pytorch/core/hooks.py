"""The one list of hooks: every method of a module, a datamodule or a callback that the trainer calls by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning.fabric.utilities.apply_func import move_data_to_device

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import STEP_OUTPUT

# Events that callbacks and the module both hear of, under the same name; callbacks get (trainer, pl_module) first.
EVENT_HOOKS = (
    "on_fit_start", "on_fit_end",
    "on_sanity_check_start", "on_sanity_check_end",
    "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end",
    "on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end",
    "on_validation_batch_start", "on_validation_batch_end",
    "on_test_start", "on_test_end", "on_test_epoch_start", "on_test_epoch_end", "on_test_batch_start", "on_test_batch_end",
    "on_predict_start", "on_predict_end", "on_predict_epoch_start", "on_predict_epoch_end",
    "on_predict_batch_start", "on_predict_batch_end",
    "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
)  # fmt: skip

# Events that the module alone hears of.
MODULE_HOOKS = (
    "on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_model_train",
    "on_test_model_eval", "on_test_model_train", "on_predict_model_eval",
    "configure_model", "configure_optimizers", "configure_callbacks", "configure_gradient_clipping",
    "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad", "backward",
    "training_step", "validation_step", "test_step", "predict_step",
    "on_save_checkpoint", "on_load_checkpoint",
)  # fmt: skip

DATA_HOOKS = (
    "prepare_data", "setup", "teardown",
    "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
    "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer",
)  # fmt: skip

# Gone since Lightning 2.0, and what took their place: defining one is reported, since it would silently never run.
REMOVED_HOOKS = {
    "training_epoch_end": "on_train_epoch_end",
    "training_step_end": "training_step",
    "validation_epoch_end": "on_validation_epoch_end",
    "validation_step_end": "validation_step",
    "test_epoch_end": "on_test_epoch_end",
    "test_step_end": "test_step",
    "predict_epoch_end": "on_predict_epoch_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
    "tbptt_split_batch": "training_step",
}


class ModelHooks:
    """Hooks of the model's life. Override what you need; what is not overridden costs nothing."""

    def on_fit_start(self) -> None:
        """After models and optimizers are set up, before the sanity check and training."""

    def on_fit_end(self) -> None:
        """At the very end of fit."""

    def on_train_start(self) -> None:
        """Before the first training epoch, after the sanity check."""

    def on_train_end(self) -> None:
        """After the last training epoch."""

    def on_validation_start(self) -> None:
        """Before a run over the validation data."""

    def on_validation_end(self) -> None:
        """After a run over the validation data."""

    def on_test_start(self) -> None:
        """Before a run over the test data."""

    def on_test_end(self) -> None:
        """After a run over the test data."""

    def on_predict_start(self) -> None:
        """Before a run over the prediction data."""

    def on_predict_end(self) -> None:
        """After a run over the prediction data."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before a training step. Return -1 to skip the rest of the epoch."""
        return None

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        """After a training step; ``outputs`` is what ``training_step`` returned, detached."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a validation step."""

    def on_validation_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a validation step."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a test step."""

    def on_test_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a test step."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a prediction step."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a prediction step."""

    def on_validation_model_zero_grad(self) -> None:
        """Called by fit before a validation run to free the gradients; the default calls ``zero_grad()``."""
        self.zero_grad()  # type: ignore[attr-defined]

    def on_validation_model_eval(self) -> None:
        """Puts the model into evaluation mode for validation; the default calls ``eval()``."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        """Puts the model back after validation. Unless overridden, each submodule gets its former mode back."""
        self.train()  # type: ignore[attr-defined]

    def on_test_model_eval(self) -> None:
        """Puts the model into evaluation mode for a test run; the default calls ``eval()``."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_model_train(self) -> None:
        """Puts the model back after a test run. Unless overridden, each submodule gets its former mode back."""
        self.train()  # type: ignore[attr-defined]

    def on_predict_model_eval(self) -> None:
        """Puts the model into evaluation mode for prediction; the default calls ``eval()``."""
        self.eval()  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """At the start of a training epoch; not again when a run resumes in the middle of one."""

    def on_train_epoch_end(self) -> None:
        """At the end of a training epoch."""

    def on_validation_epoch_start(self) -> None:
        """At the start of a run over the validation data."""

    def on_validation_epoch_end(self) -> None:
        """At the end of a run over the validation data."""

    def on_test_epoch_start(self) -> None:
        """At the start of a run over the test data."""

    def on_test_epoch_end(self) -> None:
        """At the end of a run over the test data."""

    def on_predict_epoch_start(self) -> None:
        """At the start of a run over the prediction data."""

    def on_predict_epoch_end(self) -> None:
        """At the end of a run over the prediction data."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Before the gradients are zeroed."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before ``loss.backward()``."""

    def on_after_backward(self) -> None:
        """After ``loss.backward()``, before gradients are unscaled and clipped."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Before gradients are clipped and the optimizer steps; they are unscaled already."""

    def configure_sharded_model(self) -> None:
        """Older name of :meth:`configure_model`."""

    def configure_model(self) -> None:
        """Build, or change, layers where the model will run: the strategy's device, precision and sharding are in force.

        Called once before each fit, validate, test or predict, so it must do nothing when the layers are there already.

        Example::

            def configure_model(self):
                if self.net is None:
                    self.net = BigNet()
        """


class DataHooks:
    """Hooks that prepare data, give loaders, and move batches to the device."""

    def __init__(self) -> None:
        self.prepare_data_per_node: bool = True
        self.allow_zero_length_dataloader_with_multiple_devices: bool = False

    def prepare_data(self) -> None:
        """Download or preprocess, in one process only. Do not assign state here: the other processes would not have it."""

    def setup(self, stage: str) -> None:
        """Before fit, validate, test or predict, in every process; ``stage`` is that name. Assign data sets and state here."""

    def teardown(self, stage: str) -> None:
        """After fit, validate, test or predict."""

    def train_dataloader(self) -> Any:
        """Return the training loader: any iterable, or a nested collection of them.

        Raises:
            MisconfigurationException: if fit needs it and it is neither overridden nor passed.
        """
        raise _not_overridden("train_dataloader", "fit", "train_dataloaders")

    def val_dataloader(self) -> Any:
        """Return the validation loader, or a sequence of them."""
        raise _not_overridden("val_dataloader", "validate", "dataloaders")

    def test_dataloader(self) -> Any:
        """Return the test loader, or a sequence of them."""
        raise _not_overridden("test_dataloader", "test", "dataloaders")

    def predict_dataloader(self) -> Any:
        """Return the prediction loader, or a sequence of them."""
        raise _not_overridden("predict_dataloader", "predict", "dataloaders")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch, changed as you like, before it is moved to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on ``device``. Override it for batches of types that have no method ``to``."""
        return move_data_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch, changed as you like, after it was moved to the device."""
        return batch


def _not_overridden(hook: str, function: str, argument: str) -> Exception:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return MisconfigurationException(
        f"`Trainer.{function}` needs data: pass `{argument}=` to it, or a `datamodule=` that has `{hook}`, "
        f"or define `{hook}` in your LightningModule."
    )


class CheckpointHooks:
    """Hooks around saving and loading."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the state is restored: read back what :meth:`on_save_checkpoint` put there."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the checkpoint is written: add what you need, or change it."""
