"""The progress bar for terminals with colours, drawn by rich."""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Union

from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task, TaskID
    from rich.style import Style

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks.progress._rich import (
        BatchesProcessedColumn,
        CustomBarColumn,
        CustomInfiniteTask,
        CustomProgress,
        CustomTimeColumn,
        MetricsTextColumn,
        ProcessingSpeedColumn,
    )
    from lightning.pytorch.utilities.types import STEP_OUTPUT

__all__ = [
    "BatchesProcessedColumn",
    "CustomBarColumn",
    "CustomInfiniteTask",
    "CustomProgress",
    "CustomTimeColumn",
    "MetricsTextColumn",
    "ProcessingSpeedColumn",
    "RichProgressBar",
    "RichProgressBarTheme",
]

DRAWING_SHARE = 0.02  # of the run's time: a drawing takes milliseconds, and training waits for it


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lightning.pytorch.callbacks.progress._rich"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class RichProgressBarTheme:
    """How the parts of a :class:`RichProgressBar` look: styles of rich, by name, colour or :class:`rich.style.Style`.

    Args:
        description: the text before the bar.
        progress_bar: the bar while it grows.
        progress_bar_finished: the bar when it is complete.
        progress_bar_pulse: the bar while the number of batches is not known.
        batch_progress: the number of batches.
        time: the time passed and to come.
        processing_speed: the batches per second.
        metrics: the metrics.
        metrics_text_delimiter: what stands between two metrics.
        metrics_format: the format of metrics, as in ``format(value, ".3f")``.
    """

    description: Union[str, Style] = ""
    progress_bar: Union[str, Style] = "#6206E0"
    progress_bar_finished: Union[str, Style] = "#6206E0"
    progress_bar_pulse: Union[str, Style] = "#6206E0"
    batch_progress: Union[str, Style] = ""
    time: Union[str, Style] = "dim"
    processing_speed: Union[str, Style] = "dim underline"
    metrics: Union[str, Style] = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


DEFAULT_THEME = RichProgressBarTheme()


class RichProgressBar(ProgressBar):
    """Shows a bar for each of training, validation, testing and prediction, drawn by rich.

    Install it with ``pip install "keraunos[rich]"``. Where the output is no terminal, only the finished bars are printed.

    Args:
        refresh_rate: redraw at most this many times a second, and after the last batch; 0 shows no bar. It is redrawn
            less often where drawing would take more than 2 % of the run's time.
        leave: keep the bar of each epoch, and begin the next epoch's below it.
        theme: how it looks.
        console_kwargs: arguments of :class:`rich.console.Console`.

    Raises:
        ModuleNotFoundError: if rich is not installed.
        ValueError: if ``refresh_rate`` is negative.

    Example::

        from lightning.pytorch.callbacks import RichProgressBar
        from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

        trainer = Trainer(callbacks=RichProgressBar(theme=RichProgressBarTheme(progress_bar="green", metrics_format=".2e")))

    Override ``configure_columns`` to show other columns than these; the metrics follow them.
    """

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme = DEFAULT_THEME,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("rich") is None:
            raise ModuleNotFoundError(
                'RichProgressBar is drawn by the package `rich`, which is not installed: run `pip install "keraunos[rich]"`, or use'
                " TQDMProgressBar."
            )
        if not isinstance(refresh_rate, (int, float)) or not 0 <= refresh_rate < math.inf:
            raise ValueError(f"RichProgressBar(`refresh_rate`) must be a number of drawings a second, 0 for no bar; got {refresh_rate!r}.")
        super().__init__()
        self._refresh_rate = refresh_rate
        self._leave = leave
        self._console: Console | None = None
        self._console_kwargs = console_kwargs or {}
        self._enabled = True
        self.theme = theme
        self.progress: CustomProgress | None = None
        self._metric_component: MetricsTextColumn | None = None
        self._reset_progress_bar_ids()

    def _reset_progress_bar_ids(self) -> None:
        self.val_sanity_progress_bar_id: TaskID | None = None
        self.train_progress_bar_id: TaskID | None = None
        self.val_progress_bar_id: TaskID | None = None
        self.test_progress_bar_id: TaskID | None = None
        self.predict_progress_bar_id: TaskID | None = None
        self._train_total: int | float | None = None
        self._train_done = 0
        self._eval_total: int | float | None = None
        self._eval_done = 0
        self._next_drawing = math.inf  # the moment before which no batch but the last is drawn

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "progress": None, "_console": None, "_metric_component": None}  # locks can't be pickled

    @property
    def refresh_rate(self) -> float:
        """How many times a second the bar is redrawn at most; 0 for no bar."""
        return self._refresh_rate

    @property
    def is_enabled(self) -> bool:
        """Whether bars are shown."""
        return self._enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether no bars are shown."""
        return not self.is_enabled

    @property
    def train_progress_bar(self) -> Task:
        """The training bar.

        Raises:
            TypeError: while there is none; the same holds for the other bars.
        """
        return self._task("train_progress_bar", self.train_progress_bar_id)

    @property
    def val_sanity_check_bar(self) -> Task:
        """The bar of the sanity check."""
        return self._task("val_sanity_check_bar", self.val_sanity_progress_bar_id)

    @property
    def val_progress_bar(self) -> Task:
        """The validation bar."""
        return self._task("val_progress_bar", self.val_progress_bar_id)

    @property
    def test_progress_bar(self) -> Task:
        """The test bar."""
        return self._task("test_progress_bar", self.test_progress_bar_id)

    def _task(self, name: str, task_id: TaskID | None) -> Task:
        if self.progress is None or task_id is None:
            raise TypeError(f"`{type(self).__name__}.{name}` is not set: the bar is there while its loop runs.")
        return next(task for task in self.progress.tasks if task.id == task_id)

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._stop_progress()

    def enable(self) -> None:
        """Show bars again, from the next run on."""
        self._enabled = True

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """The columns of the bars, from left to right; the metrics come after them. Override it to choose others."""
        from rich.progress import TextColumn

        from lightning.pytorch.callbacks.progress import _rich

        theme = self.theme
        return [
            TextColumn("{task.description}", style=theme.description),
            _rich.CustomBarColumn(
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            _rich.BatchesProcessedColumn(style=theme.batch_progress),
            _rich.CustomTimeColumn(style=theme.time),
            _rich.ProcessingSpeedColumn(style=theme.processing_speed),
        ]

    def refresh(self, hard: bool = False) -> None:
        """Draw the bars.

        Args:
            hard: draw them even if they were drawn just now.
        """
        if self.progress is None:
            return
        before = monotonic()
        if not hard and before < self._next_drawing < math.inf:
            return
        self.progress.refresh()
        self._drawn(since=before)

    def _drawn(self, since: float) -> None:
        now = monotonic()
        self._next_drawing = now + max(1 / self._refresh_rate, (now - since) / DRAWING_SHARE)

    def _init_progress(self, trainer: pl.Trainer) -> None:
        if self.is_disabled or self.progress is not None:
            return
        from rich.console import Console

        from lightning.pytorch.callbacks.progress._rich import CustomProgress, MetricsTextColumn

        self._reset_progress_bar_ids()
        theme = self.theme
        self._metric_component = MetricsTextColumn(trainer, theme.metrics, theme.metrics_text_delimiter, theme.metrics_format)
        self._console = Console(**self._console_kwargs)
        self.progress = CustomProgress(
            *self.configure_columns(trainer),
            self._metric_component,
            auto_refresh=False,  # a thread that draws would hold the interpreter, and its locks, while workers are forked
            console=self._console,
        )
        self.progress.start()
        self._next_drawing = 0.0

    def _stop_progress(self) -> None:
        progress, self.progress = self.progress, None
        if progress is not None:
            progress.stop()
        self._reset_progress_bar_ids()

    def _add_task(self, total: int | float, description: str, done: int = 0, **fields: Any) -> TaskID | None:
        if self.progress is None:
            return None
        before = monotonic()
        known = float(total) if math.isfinite(total) else None
        task_id = self.progress.add_task(description, total=known, completed=done, initial=done, **fields)  # draws
        self._drawn(since=before)
        return task_id

    def _remove_task(self, task_id: TaskID | None) -> None:
        if self.progress is not None and task_id is not None:
            self.progress.remove_task(task_id)

    def _advance(self, task_id: TaskID | None, done: int) -> None:
        if self.progress is not None and task_id is not None:
            self.progress.update(task_id, completed=done)
            self.refresh(hard=True)

    def _update_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._metric_component is not None and self.progress is not None:
            self._metric_component.update(self.get_metrics(trainer, pl_module))

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._init_progress(trainer)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_task(self.val_sanity_progress_bar_id)
        self.val_sanity_progress_bar_id = None
        self.refresh(hard=True)
        self.reset_dataloader_idx_tracker()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._init_progress(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leave and self.train_progress_bar_id is not None:
            self._stop_progress()
            self._init_progress(trainer)
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: pl.Trainer, done: int = 0) -> None:
        if self.progress is None:
            return
        self._remove_task(self.train_progress_bar_id)
        self._train_total, self._train_done = self.total_train_batches, done
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        description = f"Epoch {trainer.current_epoch}{last}"
        self.train_progress_bar_id = self._add_task(self._train_total, description, done, shows_metrics=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._train_done = batch_idx + 1
        if monotonic() < self._next_drawing and self._train_done != self._train_total:
            return
        if self.train_progress_bar_id is None:  # resumed in the middle of an epoch: its start is not announced again
            self._begin_epoch(trainer, done=batch_idx)
        self._update_metrics(trainer, pl_module)
        self._advance(self.train_progress_bar_id, batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._update_metrics(trainer, pl_module)
        self._advance(self.train_progress_bar_id, self._train_done)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._update_metrics(trainer, pl_module)  # the module logged at the epoch's end after us
        self._stop_progress()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._init_progress(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self.has_dataloader_changed(dataloader_idx):
            return
        total = self.total_val_batches_current_dataloader
        if trainer.sanity_checking:
            bars, description, last = trainer.num_sanity_val_batches, self.sanity_check_description, self.val_sanity_progress_bar_id
            self.val_sanity_progress_bar_id = self._begin_loader(last, total, description, bars)
        else:
            bars, description, last = trainer.num_val_batches, self.validation_description, self.val_progress_bar_id
            self.val_progress_bar_id = self._begin_loader(last, total, description, bars)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._eval_done = batch_idx + 1
        if monotonic() >= self._next_drawing or self._eval_done == self._eval_total:
            self._advance(self.val_sanity_progress_bar_id if trainer.sanity_checking else self.val_progress_bar_id, self._eval_done)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn == "fit":
            self._remove_task(self.val_progress_bar_id)
            self.val_progress_bar_id = None
            self._update_metrics(trainer, pl_module)
            self.refresh(hard=True)
        else:
            self._end_evaluation(self.val_progress_bar_id)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._init_progress(trainer)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            total, bars = self.total_test_batches_current_dataloader, trainer.num_test_batches
            self.test_progress_bar_id = self._begin_loader(self.test_progress_bar_id, total, self.test_description, bars)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._eval_done = batch_idx + 1
        if monotonic() >= self._next_drawing or self._eval_done == self._eval_total:
            self._advance(self.test_progress_bar_id, self._eval_done)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation(self.test_progress_bar_id)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._init_progress(trainer)

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            total, bars = self.total_predict_batches_current_dataloader, trainer.num_predict_batches
            self.predict_progress_bar_id = self._begin_loader(self.predict_progress_bar_id, total, self.predict_description, bars)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._eval_done = batch_idx + 1
        if monotonic() >= self._next_drawing or self._eval_done == self._eval_total:
            self._advance(self.predict_progress_bar_id, self._eval_done)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_evaluation(self.predict_progress_bar_id)

    def _begin_loader(self, last: TaskID | None, total: int | float, description: str, loaders: list[int | float]) -> TaskID | None:
        self._remove_task(last)
        self._eval_total, self._eval_done = total, 0
        which = f" DataLoader {self._current_eval_dataloader_idx}" if len(loaders) > 1 else ""
        return self._add_task(total, description + which)

    def _end_evaluation(self, task_id: TaskID | None) -> None:
        self._advance(task_id, self._eval_done)
        self._stop_progress()  # now, so that the results are printed below the bar
        self.reset_dataloader_idx_tracker()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._advance(self.train_progress_bar_id, self._train_done)
        self._stop_progress()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop_progress()
        self.reset_dataloader_idx_tracker()
