"""What the rich progress bar consists of. A module of its own, so that rich is imported when a bar is first drawn and no earlier."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar as Bar
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    import lightning.pytorch as pl

UNKNOWN_TIME = "-:--:--"


class CustomBarColumn(BarColumn):
    """The bar; it pulses while the number of batches is not known."""

    def render(self, task: Task) -> Bar:
        return Bar(
            total=task.total,
            completed=max(0, task.completed),
            width=None if self.bar_width is None else max(1, self.bar_width),
            pulse=task.total is None or not task.started,
            animation_time=task.get_time(),
            style=self.style,
            complete_style=self.complete_style,
            finished_style=self.finished_style,
            pulse_style=self.pulse_style,
        )


class CustomInfiniteTask(Task):
    """A task of unknown length, whose end can't be foretold."""

    @property
    def time_remaining(self) -> float | None:
        return None


class CustomProgress(Progress):
    """The live display of all bars."""


class CustomTimeColumn(ProgressColumn):
    """Time since the bar began, and the time that the rest will take."""

    def __init__(self, style: str | Style) -> None:
        self.style = style
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(
            f"{duration(task.finished_time if task.finished else task.elapsed)} • {duration(task.time_remaining)}",
            style=self.style,
        )


class BatchesProcessedColumn(ProgressColumn):
    """Batches done, and batches in all."""

    def __init__(self, style: str | Style) -> None:
        self.style = style
        super().__init__()

    def render(self, task: Task) -> Text:
        total = "--" if task.total is None else int(task.total)
        return Text(f"{int(task.completed)}/{total}", style=self.style)


class ProcessingSpeedColumn(ProgressColumn):
    """Batches a second."""

    def __init__(self, style: str | Style) -> None:
        self.style = style
        super().__init__()

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:  # rich knows a speed after several updates; until then the average serves
            done = task.completed - task.fields.get("initial", 0)
            elapsed = task.finished_time if task.finished else task.elapsed
            speed = done / elapsed if elapsed else 0.0
        return Text(f"{speed:>.2f}it/s", style=self.style)


class MetricsTextColumn(ProgressColumn):
    """The metrics, beside the training bar.

    Args:
        trainer: the trainer whose metrics these are.
        style: how the text looks.
        text_delimiter: what stands between two metrics.
        metrics_format: the format of floats; integers and text are shown as they are.
    """

    def __init__(self, trainer: pl.Trainer, style: str | Style, text_delimiter: str, metrics_format: str) -> None:
        self._trainer = trainer
        self._style = style
        self._text_delimiter = text_delimiter
        self._metrics_format = metrics_format
        self._text = Text()
        super().__init__()

    def update(self, metrics: dict[str, Any]) -> None:
        """Show these metrics from the next drawing on."""
        texts = (f"{k}: {v:{self._metrics_format}}" if isinstance(v, float) else f"{k}: {v}" for k, v in metrics.items())
        self._text = Text(self._text_delimiter.join(texts), justify="left", style=self._style)

    def render(self, task: Task) -> Text:
        return self._text if task.fields.get("shows_metrics") else Text()


def duration(seconds: float | None) -> str:
    """``seconds`` as hours, minutes and seconds."""
    return UNKNOWN_TIME if seconds is None else str(timedelta(seconds=int(seconds)))
