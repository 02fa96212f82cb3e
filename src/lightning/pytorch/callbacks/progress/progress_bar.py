"""The base class of progress bars: what they show, and how many batches lie ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks.callback import Callback

if TYPE_CHECKING:
    import lightning.pytorch as pl

VERSION_CHARACTERS = 4


class ProgressBar(Callback):
    """Shows how far a run has come. Derive from it to write a progress bar of your own.

    A trainer has one progress bar at most. The bar is switched off on every process but the first. All that it shows
    comes from :meth:`get_metrics`, whose values lie on the host already: a bar never waits for the device.

    Example::

        class LitProgressBar(ProgressBar):
            def __init__(self):
                super().__init__()
                self.enabled = True

            def disable(self):
                self.enabled = False

            def enable(self):
                self.enabled = True

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if self.enabled:
                    print(f"{batch_idx + 1} of {self.total_train_batches}", end="\\r")

        trainer = Trainer(callbacks=LitProgressBar())
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._current_eval_dataloader_idx: int | None = None

    @property
    def trainer(self) -> pl.Trainer:
        """The trainer that this bar reports on.

        Raises:
            TypeError: before ``setup`` has run.
        """
        if self._trainer is None:
            raise TypeError(f"`{type(self).__name__}.trainer` is not set yet: it is there once fit, validate, test or predict has begun.")
        return self._trainer

    @property
    def sanity_check_description(self) -> str:
        """What the bar of the sanity check begins with."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """What the training bar says before the first epoch begins."""
        return "Training"

    @property
    def validation_description(self) -> str:
        """What the validation bar begins with."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """What the test bar begins with."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """What the prediction bar begins with."""
        return "Predicting"

    @property
    def total_train_batches(self) -> int | float:
        """Training batches of this epoch, up to where ``max_steps`` ends it; ``inf`` if the loader has no length."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if trainer.max_steps == -1 or not trainer.lightning_module.automatic_optimization:
            return batches
        every, done = trainer.accumulate_grad_batches, trainer.fit_loop.progress.position()["batch_idx"]
        end = (done // every + trainer.max_steps - trainer.global_step) * every
        return min(batches, max(end, done) or batches)

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches of the validation loader that runs now; ``inf`` if it has no length."""
        trainer = self.trainer
        return self._of_current_loader(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches of the test loader that runs now; ``inf`` if it has no length."""
        return self._of_current_loader(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches of the prediction loader that runs now; ``inf`` if it has no length."""
        return self._of_current_loader(self.trainer.num_predict_batches)

    @property
    def total_val_batches(self) -> int | float:
        """Batches of all validation loaders together; 0 in an epoch of training that is not followed by validation."""
        trainer = self.trainer
        if trainer.state.fn == "fit":
            every = trainer.check_val_every_n_epoch
            if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
                return 0
        return sum(trainer.num_val_batches)

    def _of_current_loader(self, sizes: list[int | float]) -> int | float:
        if self._current_eval_dataloader_idx is None:
            raise RuntimeError("The number of batches of the current loader is known only while one runs: no evaluation loader runs now.")
        return sizes[self._current_eval_dataloader_idx]

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether ``dataloader_idx`` differs from that of the last call; remembers it for the next one."""
        changed = dataloader_idx != self._current_eval_dataloader_idx
        self._current_eval_dataloader_idx = dataloader_idx
        return changed

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget which loader ran last, so that the next call of :meth:`has_dataloader_changed` says True."""
        self._current_eval_dataloader_idx = None

    def disable(self) -> None:
        """Show nothing from now on. Your own bar has to implement it: it is called on every process but the first."""
        raise NotImplementedError(f"{type(self).__name__} must implement `disable()`, which switches the progress bar off.")

    def enable(self) -> None:
        """Show the bar again, from the next bar on. Your own bar has to implement it."""
        raise NotImplementedError(f"{type(self).__name__} must implement `enable()`, which switches the progress bar on.")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing the bar; arguments are those of the built-in ``print``."""
        print(*args, **kwargs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """What the bar shows beside the progress: the loggers' version as ``v_num``, then what was logged with ``prog_bar=True``.

        Override it to show less, or more.

        Example::

            def get_metrics(self, trainer, pl_module):
                items = super().get_metrics(trainer, pl_module)
                items.pop("v_num", None)
                return items
        """
        standard = get_standard_metrics(trainer)
        logged = trainer.progress_bar_metrics
        hidden = sorted(standard.keys() & logged.keys())
        if hidden:
            rank_zero_warn(
                f"The progress bar shows {hidden} by itself; what was logged with `prog_bar=True` under the same name takes its place."
                " Log it under another name, or remove ours in `ProgressBar.get_metrics`."
            )
        return {**standard, **logged}


def get_standard_metrics(trainer: pl.Trainer) -> dict[str, int | str]:
    """What every progress bar shows: the version of the loggers as ``v_num``, if there is one.

    Args:
        trainer: the trainer whose loggers are asked. Of several loggers each distinct version stands once, joined by
            ``_``; of a long name the last four characters are shown.
    """
    versions = list(dict.fromkeys(logger.version for logger in trainer.loggers if logger.version not in (None, "")))
    if not versions:
        return {}
    if len(versions) == 1 and isinstance(versions[0], int):
        return {"v_num": versions[0]}
    return {"v_num": "_".join(map(str, versions))[-VERSION_CHARACTERS:]}
