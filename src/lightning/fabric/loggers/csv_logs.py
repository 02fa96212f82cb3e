"""Metrics as rows of a CSV file."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor

from lightning.fabric.loggers.logger import FolderLogger, rank_zero_experiment
from lightning.fabric.utilities.cloud_io import get_filesystem, join_path, local_path, replacing
from lightning.fabric.utilities.logger import add_prefix, flatten_dict, metric_value
from lightning.fabric.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class CSVLogger(FolderLogger):
    """Writes metrics to ``root_dir/name/version/metrics.csv``, one row for each call of :meth:`log_metrics`.

    A file that is already there is continued: its rows stay, new ones follow, new columns are added to its header.

    Args:
        root_dir: where the experiments lie: a local folder or a URL that fsspec understands.
        name: the experiment; empty or None for no folder of its own.
        version: the run. A number N means the folder ``version_N``, a string is the folder's name; None takes the next number.
        prefix: put before the name of each metric, joined by ``-``.
        flush_logs_every_n_steps: rows are held back until a step whose number plus one is a multiple of this, or until
            there are that many.

    Raises:
        ValueError: if ``flush_logs_every_n_steps`` is not a positive number.

    Example::

        >>> import pathlib, tempfile
        >>> logger = CSVLogger(tempfile.mkdtemp(), name="digits")
        >>> logger.log_metrics({"loss": 0.5}, step=0)
        >>> logger.save()
        >>> print(pathlib.Path(logger.log_dir, "metrics.csv").read_text())
        loss,step
        0.5,0
        <BLANKLINE>
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(root_dir, name, version, prefix)
        if not isinstance(flush_logs_every_n_steps, int) or flush_logs_every_n_steps < 1:
            raise ValueError(
                f"`flush_logs_every_n_steps` must be a whole number of at least 1, but {flush_logs_every_n_steps!r} was given. "
                "1 writes every row at once."
            )
        self._flush_logs_every_n_steps = flush_logs_every_n_steps

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of this run's files; the folder is made when it is first asked for."""
        with self._lock:
            if self._experiment is None:
                self._experiment = ExperimentWriter(self.log_dir)
            return self._experiment  # type: ignore[no-any-return]

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Not offered here; the CSVLogger of ``lightning.pytorch`` writes hyperparameters to ``hparams.yaml``.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "The `CSVLogger` of lightning.fabric writes no hyperparameters. Use `lightning.pytorch.loggers.CSVLogger`, which does, "
            "or write them yourself into `logger.log_dir`."
        )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        """Add a row.

        Args:
            metrics: a number or one-element tensor for each name; a dict of them becomes a column ``name/key`` for each key.
            step: the value of the column ``step``; the number of rows so far if None.
        """
        metrics = add_prefix(flatten_dict(metrics, self.group_separator), self._prefix, self.LOGGER_JOIN_CHAR)
        self._catch_up()
        with self._lock:
            writer, every = self.experiment, self._flush_logs_every_n_steps
            if step is None:
                step = writer.row_count()
            writer.log_metrics(metrics, step)
            row = writer.metrics[-1]
            due = (step + 1) % every == 0 or len(writer.metrics) >= every
        if due:
            try:
                self.save()
            except BaseException:
                with self._lock, suppress(ValueError):
                    writer.metrics.remove(row)  # whoever called hears that it was not taken, and may try again
                raise

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are held back, those included that a Trainer has sent and that are still on their way."""
        self._catch_up()
        with self._lock:
            self.experiment.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rows that are held back; a logger that was never used leaves no folder."""
        if self._experiment is not None:
            self.save()


class ExperimentWriter:
    """Appends rows to ``log_dir/metrics.csv``.

    Args:
        log_dir: a local folder or a URL; it is made if it does not exist.
    """

    NAME_METRICS_FILE = "metrics.csv"

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.metrics: list[dict[str, Any]] = []  # rows held back
        self.metrics_keys: list[str] = []  # the columns of the file when it was last written
        self.metrics_file_path = join_path(log_dir, self.NAME_METRICS_FILE)
        self._rows_written: int | None = None  # unknown until somebody asks
        self._fs: AbstractFileSystem | None = None
        local = local_path(log_dir)
        if local is not None:
            os.makedirs(local or ".", exist_ok=True)
        else:
            self._fs = get_filesystem(log_dir)
            self._fs.makedirs(log_dir, exist_ok=True)

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Hold back a row with these metrics and this step until :meth:`save`.

        Raises:
            ValueError: if a metric is a tensor of several elements.
        """
        row = {name: metric_value(name, value) for name, value in metrics_dict.items()}
        row["step"] = self.row_count() if step is None else step
        self.metrics.append(row)

    def row_count(self) -> int:
        """How many rows there are, those of earlier runs and those held back included."""
        if self._rows_written is None:
            try:
                with self._open("r") as file:
                    self._rows_written = max(0, sum(1 for _ in csv.reader(file)) - 1)
            except FileNotFoundError:
                self._rows_written = 0
        return self._rows_written + len(self.metrics)

    def save(self) -> None:
        """Append the rows held back. Only a new column makes it write the file anew, beside the old one until it is whole."""
        if not self.metrics:
            return
        # Read again each time: whoever else writes to this file may have added columns.
        columns = self._read_header()
        added = {name for row in self.metrics for name in row}.difference(columns)
        self.metrics_keys = sorted({*columns, *added}) if added else columns
        rows = [[row.get(name) for name in self.metrics_keys] for row in self.metrics]
        if not columns:
            self._write("ab+" if self._fs is None else "wb", [self.metrics_keys, *rows])
        elif added:
            self._rewrite(rows)
        else:
            self._append(rows)
        if self._rows_written is not None:
            self._rows_written += len(rows)
        del self.metrics[: len(rows)]

    def _open(self, mode: str) -> IO[Any]:
        options: dict[str, Any] = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
        if self._fs is None:
            if mode == "ab+":
                options["buffering"] = 0  # what could not be written must not be written again by closing the file
            return open(local_path(self.metrics_file_path) or "", mode, **options)
        return self._fs.open(self.metrics_file_path, mode, **options)  # type: ignore[no-any-return]

    def _read_header(self) -> list[str]:
        try:
            with self._open("r") as file:
                return next(csv.reader(file), [])
        except FileNotFoundError:
            return []

    def _append(self, rows: Iterable[list[Any]]) -> None:
        if self._fs is None:
            self._write("ab+", rows)
            return
        try:
            self._write("ab", rows)
        except (NotImplementedError, ValueError):  # an object store whose objects cannot grow
            self._rewrite(rows)

    def _write(self, mode: str, rows: Iterable[list[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        data = text.getvalue().encode("utf-8", "backslashreplace")
        with self._open(mode) as file:
            if mode == "ab+" and file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a run that was killed left half a row: it gets a line of its own
                    data = b"\r\n" + data
            if mode != "ab+":
                file.write(data)
                return
            size = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)  # of what the disk still had room for: it is written again with the rest
                raise

    def _rewrite(self, rows: Iterable[list[Any]]) -> None:
        """Write the file anew under ``metrics_keys``: the rows that are in it, then ``rows``."""
        with replacing(self.metrics_file_path) as new:
            writer = csv.writer(new)
            writer.writerow(self.metrics_keys)
            with self._open("r") as old:
                reader = csv.reader(old)
                columns = next(reader, [])
                for row in reader:
                    values = dict(zip(columns, row))
                    writer.writerow([values.get(name, "") for name in self.metrics_keys] + row[len(columns) :])
            writer.writerows(rows)
