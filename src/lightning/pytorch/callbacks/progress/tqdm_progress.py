"""The progress bar for every terminal and notebook, drawn by tqdm."""

from __future__ import annotations

import importlib
import math
import operator
import os
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks.progress._tqdm import Tqdm
    from lightning.pytorch.utilities.types import STEP_OUTPUT

__all__ = ["TQDMProgressBar", "Tqdm", "convert_inf"]

NEVER = sys.maxsize
COLAB_REFRESH_RATE = 20  # a notebook in Colab freezes when it is redrawn after each of many fast batches


def __getattr__(name: str) -> Any:
    if name == "Tqdm":
        return importlib.import_module("lightning.pytorch.callbacks.progress._tqdm").Tqdm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class TQDMProgressBar(ProgressBar):
    """Shows a bar for each of training, validation, testing and prediction, drawn by tqdm on the standard output.

    The sanity check and validation inside ``fit`` have bars that go when they end; those of training, testing and
    prediction stay, and so does that of ``validate``.

    A bar is redrawn every ``refresh_rate`` batches, and at the last, but no more often than tqdm's ``mininterval``
    (0.1 seconds; the environment variable ``TQDM_MININTERVAL`` changes it) since nobody could read it.

    Args:
        refresh_rate: redraw after this many batches; 0 shows no bar. ``TQDM_MINITERS`` in the environment raises it,
            and in Colab a rate of 1 becomes 20.
        process_position: leave room for the bars of this many other processes above, two lines for each.
        leave: keep the bar of each epoch, and begin the next epoch's below it.

    Raises:
        TypeError: if ``refresh_rate`` or ``process_position`` is not an integer.
        ValueError: if one of them is negative.

    Example::

        from lightning.pytorch.callbacks import TQDMProgressBar

        trainer = Trainer(callbacks=TQDMProgressBar(refresh_rate=10))

    Override an ``init_*_tqdm`` method to change a bar::

        class LitProgressBar(TQDMProgressBar):
            def init_validation_tqdm(self):
                bar = super().init_validation_tqdm()
                bar.colour = "green"
                return bar
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__()
        self._refresh_rate = resolve_refresh_rate(not_negative("refresh_rate", refresh_rate))
        self._process_position = not_negative("process_position", process_position)
        self._leave = leave
        self._enabled = True
        self._train_progress_bar: Tqdm | None = None
        self._val_progress_bar: Tqdm | None = None
        self._test_progress_bar: Tqdm | None = None
        self._predict_progress_bar: Tqdm | None = None
        self._train_due = 0  # the number of batches at which the bar moves next
        self._eval_due = 0
        self._drawn_at = 0.0
        self._epoch_begun = False

    def __getstate__(self) -> dict[str, Any]:
        bars = ("_train_progress_bar", "_val_progress_bar", "_test_progress_bar", "_predict_progress_bar")
        return {**self.__dict__, **dict.fromkeys(bars)}  # open streams can't be pickled

    @property
    def train_progress_bar(self) -> Tqdm:
        """The training bar.

        Raises:
            TypeError: before there is one; the same holds for the other three.
        """
        return self._started("train", self._train_progress_bar)

    @train_progress_bar.setter
    def train_progress_bar(self, bar: Tqdm) -> None:
        self._train_progress_bar = bar

    @property
    def val_progress_bar(self) -> Tqdm:
        """The bar of validation, or of the sanity check."""
        return self._started("val", self._val_progress_bar)

    @val_progress_bar.setter
    def val_progress_bar(self, bar: Tqdm) -> None:
        self._val_progress_bar = bar

    @property
    def test_progress_bar(self) -> Tqdm:
        """The test bar."""
        return self._started("test", self._test_progress_bar)

    @test_progress_bar.setter
    def test_progress_bar(self, bar: Tqdm) -> None:
        self._test_progress_bar = bar

    @property
    def predict_progress_bar(self) -> Tqdm:
        """The prediction bar."""
        return self._started("predict", self._predict_progress_bar)

    @predict_progress_bar.setter
    def predict_progress_bar(self, bar: Tqdm) -> None:
        self._predict_progress_bar = bar

    def _started(self, name: str, bar: Tqdm | None) -> Tqdm:
        if bar is None:
            raise TypeError(f"`{type(self).__name__}.{name}_progress_bar` is not set yet: the bar is there once its loop has started.")
        return bar

    @property
    def refresh_rate(self) -> int:
        """After how many batches the bar is redrawn; 0 for no bar."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """For how many other processes' bars there is room above."""
        return self._process_position

    @property
    def is_enabled(self) -> bool:
        """Whether bars are shown."""
        return self._enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether no bars are shown."""
        return not self.is_enabled

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._train_due = self._eval_due = NEVER

    def enable(self) -> None:
        """Show bars again."""
        self._enabled = True
        self._train_due = self._eval_due = 0

    def init_sanity_tqdm(self) -> Tqdm:
        """Make the bar of the sanity check. Override it to change the bar; the same holds for the other four."""
        return self._new_bar(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Tqdm:
        """Make the training bar."""
        return self._new_bar(self.train_description, leave=True, smoothing=0)

    def init_predict_tqdm(self) -> Tqdm:
        """Make the prediction bar."""
        return self._new_bar(self.predict_description, leave=True, smoothing=0)

    def init_validation_tqdm(self) -> Tqdm:
        """Make the validation bar: inside ``fit`` it stands below the training bar and goes when it ends."""
        inside_fit = self.trainer.state.fn == "fit"
        return self._new_bar(self.validation_description, leave=not inside_fit, line=int(inside_fit))

    def init_test_tqdm(self) -> Tqdm:
        """Make the test bar."""
        return self._new_bar(self.test_description, leave=True)

    def _new_bar(self, description: str, leave: bool, line: int = 0, smoothing: float = 0.3) -> Tqdm:
        # From this module, so that a Tqdm that somebody has put here in place of ours is used.
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        return Tqdm(
            desc=description,
            position=2 * self._process_position + line,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=smoothing,
            bar_format=self.BAR_FORMAT,
        )

    def on_sanity_check_start(self, *_: Any) -> None:
        self.val_progress_bar = self.init_sanity_tqdm()

    def on_sanity_check_end(self, *_: Any) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def on_train_start(self, *_: Any) -> None:
        self.train_progress_bar = self.init_train_tqdm()
        self._train_due = 0 if self.is_enabled else NEVER
        self._epoch_begun = False

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._leave and self.is_enabled and self.train_progress_bar.disable:  # closed when the last epoch ended
            self.train_progress_bar = self.init_train_tqdm()
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: pl.Trainer, done: int = 0) -> None:
        self._epoch_begun = True
        self._train_due = self._begin(self.train_progress_bar, self.total_train_batches, f"Epoch {trainer.current_epoch}", done)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 < self._train_due:
            return
        if not self._epoch_begun:  # resumed in the middle of an epoch: its start is not announced again
            self._begin_epoch(trainer, done=batch_idx)
        self._train_due = self._advance(self.train_progress_bar, batch_idx + 1, trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_metrics(trainer, pl_module)
        if self._leave:
            self.train_progress_bar.close()

    def on_train_end(self, *_: Any) -> None:
        self._show_metrics(self.trainer, self.trainer.lightning_module)  # the module logged at the epoch's end after us
        self.train_progress_bar.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.val_progress_bar = self.init_validation_tqdm()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            text = self.sanity_check_description if trainer.sanity_checking else self.validation_description
            total = self.total_val_batches_current_dataloader
            self._eval_due = self._begin(self.val_progress_bar, total, f"{text} DataLoader {dataloader_idx}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx + 1 >= self._eval_due:
            self._eval_due = self._advance(self.val_progress_bar, batch_idx + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show_metrics(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.test_progress_bar = self.init_test_tqdm()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            total = self.total_test_batches_current_dataloader
            self._eval_due = self._begin(self.test_progress_bar, total, f"{self.test_description} DataLoader {dataloader_idx}")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx + 1 >= self._eval_due:
            self._eval_due = self._advance(self.test_progress_bar, batch_idx + 1)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.test_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.predict_progress_bar = self.init_predict_tqdm()

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            total = self.total_predict_batches_current_dataloader
            self._eval_due = self._begin(self.predict_progress_bar, total, f"{self.predict_description} DataLoader {dataloader_idx}")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx + 1 >= self._eval_due:
            self._eval_due = self._advance(self.predict_progress_bar, batch_idx + 1)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.predict_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close_all()  # so that the traceback begins on a line of its own

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close_all()
        self.reset_dataloader_idx_tracker()

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bars, on the first process only.

        Args:
            *args: what to print.
            sep: what stands between them.
            **kwargs: ``end`` and ``file`` as for the built-in ``print``.
        """
        bar = next((bar for bar in self._bars() if not bar.disable), None)
        if bar is not None:
            kwargs.pop("flush", None)
            bar.write(sep.join(map(str, args)), **kwargs)
        elif self._trainer is None or self._trainer.is_global_zero:
            print(*args, sep=sep, **kwargs)

    def _bars(self) -> list[Tqdm]:
        bars = (self._val_progress_bar, self._train_progress_bar, self._test_progress_bar, self._predict_progress_bar)
        return [bar for bar in bars if bar is not None]

    def _close_all(self) -> None:
        for bar in self._bars():
            bar.close()

    def _begin(self, bar: Tqdm, total: int | float, description: str, done: int = 0) -> int:
        """Start the bar anew and say at how many batches to move it next."""
        if bar.disable or self.is_disabled:
            return NEVER
        bar.set_description(description, refresh=False)
        bar.initial = done  # the speed is that of the batches since
        known = convert_inf(total)
        if known is None:
            bar.total = None
        bar.reset(known)
        bar.n = done
        self._drawn_at = monotonic()
        return self._next_due(done, known)

    def _advance(self, bar: Tqdm, done: int, *metrics_of: Any) -> int:
        """Move the bar to ``done`` batches, draw it unless it was drawn just now, and say at how many to move it next."""
        rate = self._refresh_rate
        if bar.disable or not (self._enabled and rate):
            return NEVER
        bar.n, total = done, bar.total
        now = monotonic()
        if done == total or (done % rate == 0 and now - self._drawn_at >= bar.mininterval):
            if metrics_of:
                bar.set_postfix(self.get_metrics(*metrics_of), refresh=False)
            bar.refresh()
            self._drawn_at = now
        return self._next_due(done, total)

    def _next_due(self, done: int, total: float | None) -> int:
        if total is None:
            return 0  # any batch may be the last, and the bar is to end with the right number
        due = done - done % self._refresh_rate + self._refresh_rate
        return due if done >= total or due < total else int(total)

    def _show_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bar = self.train_progress_bar
        if not bar.disable and self.is_enabled:
            bar.set_postfix(self.get_metrics(trainer, pl_module))


def not_negative(name: str, value: int) -> int:
    """``value`` as an int, if it is an integer of at least 0."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"TQDMProgressBar(`{name}`) must be an integer of at least 0, got {value!r}.") from None
    if number < 0:
        raise ValueError(f"TQDMProgressBar(`{name}`) must be at least 0, got {value!r}." + " Use 0 for no bar." * (name == "refresh_rate"))
    return number


def resolve_refresh_rate(refresh_rate: int) -> int:
    """The refresh rate after the environment has had its say; a bar that is switched off stays off."""
    if refresh_rate == 1 and os.environ.get("COLAB_GPU"):
        return COLAB_REFRESH_RATE
    minimum = os.environ.get("TQDM_MINITERS", "")
    return max(refresh_rate, int(minimum)) if refresh_rate and minimum.isdigit() else refresh_rate


def convert_inf(x: float | None) -> float | None:
    """``x``, or None if it is infinite or not a number: what tqdm takes for an unknown total.

    Example::

        >>> convert_inf(float("inf")), convert_inf(3)
        (None, 3)
    """
    return None if x is None or not math.isfinite(x) else x
