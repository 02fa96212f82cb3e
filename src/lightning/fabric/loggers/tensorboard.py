"""Metrics, hyperparameters and graphs as TensorBoard's event files."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning.fabric.loggers.logger import FolderLogger, rank_zero_experiment
from lightning.fabric.utilities.cloud_io import join_path
from lightning.fabric.utilities.logger import add_prefix, convert_params, flatten_dict, metric_value, named_values, sanitize_params
from lightning.fabric.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

KEPT = 1000  # values that may be written again after an error

# The package that must be there, and the module that then holds `SummaryWriter`; the first that is there is used.
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "tensorboardX": "tensorboardX"}


def is_available() -> bool:
    """Whether one of the packages that can write event files is installed."""
    return any(importlib.util.find_spec(package) for package in PACKAGES)


def writer_module() -> str:
    """The name of the module that holds ``SummaryWriter``.

    Raises:
        ModuleNotFoundError: if neither tensorboard nor tensorboardX is installed.
    """
    for package, module in PACKAGES.items():
        if importlib.util.find_spec(package):
            return module
    raise ModuleNotFoundError(
        "`TensorBoardLogger` needs the package `tensorboard` (or `tensorboardX`), and neither is installed. "
        "Run `pip install tensorboard`, or log with `CSVLogger`."
    )


class TensorBoardLogger(FolderLogger):
    """Writes TensorBoard event files to ``root_dir/name/version/sub_dir``; look at them with ``tensorboard --logdir root_dir``.

    Args:
        root_dir: where the experiments lie: a local folder or a URL that fsspec understands.
        name: the experiment; empty or None for no folder of its own.
        version: the run. A number N means the folder ``version_N``, a string is the folder's name; None takes the next number.
        default_hp_metric: log a metric ``hp_metric`` of -1 with hyperparameters that come without metrics, because
            TensorBoard shows no hyperparameters without one.
        prefix: put before the name of each metric, joined by ``-``.
        sub_dir: one more folder below the version.
        kwargs: passed on to ``SummaryWriter``: ``comment``, ``purge_step``, ``max_queue``, ``flush_secs``, ``filename_suffix``.

    Raises:
        ModuleNotFoundError: if neither tensorboard nor tensorboardX is installed.

    Example::

        logger = TensorBoardLogger("runs", name="digits")
        logger.log_hyperparams({"lr": 0.1})
        logger.log_metrics({"loss": 0.5}, step=0)
        logger.finalize("success")
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        writer_module()  # better now than at the first metric
        super().__init__(root_dir, name, version, prefix)
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._default_hp_metric = default_hp_metric
        self._kwargs = kwargs
        self._unflushed: deque[tuple[str, Any, int | None, float]] = deque(maxlen=KEPT)  # name, value, step, time
        self._torn = False  # the file of the values before could not be written

    @property
    def log_dir(self) -> str:
        """The folder of this run: ``version_N`` for a version N, a version that is a string as it is, then ``sub_dir``.

        A leading ``~`` and environment variables are expanded.
        """
        folder = super().log_dir
        return folder if self.sub_dir is None else os.path.expandvars(join_path(folder, self.sub_dir))

    @property
    def sub_dir(self) -> str | None:
        """The folder below the version, or None."""
        return self._sub_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The ``SummaryWriter``, for whatever this logger has no method for; the folder is made when it is first asked for.

        Example::

            logger.experiment.add_image("digits", images, step)
        """
        with self._lock:
            if self._experiment is None:
                writer: Any = importlib.import_module(writer_module()).SummaryWriter
                self._experiment = writer(log_dir=self.log_dir, **self._kwargs)
                if self._torn:
                    self._torn = False
                    for name, value, step, when in self._unflushed:
                        self._add(name, value, step, walltime=when)
            return self._experiment  # type: ignore[no-any-return]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics.

        Args:
            metrics: a number or one-element tensor for each name. A dict of them makes curves in one common chart; each lies
                in a folder of its own beside the others.
            step: the x value; TensorBoard takes 0 for None.

        Raises:
            ValueError: if a metric is neither a number, nor a one-element tensor, nor a dict of them.
        """
        self._catch_up()
        points: list[tuple[str, Any, int | None, float]] = []
        for name, value in add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR).items():
            number = {key: scalar(f"{name}/{key}", v) for key, v in value.items()} if isinstance(value, Mapping) else scalar(name, value)
            points.append((name, number, step, time.time()))
        with self._lock, self._replaced_on_error():
            for name, number, _, _ in points:
                self._add(name, number, step)
            self._unflushed.extend(points)

    def _add(self, name: str, value: Any, step: int | None, **kwargs: Any) -> None:
        add = self.experiment.add_scalars if isinstance(value, Mapping) else self.experiment.add_scalar
        add(name, value, step, **kwargs)

    @contextmanager
    def _replaced_on_error(self) -> Generator[None, None, None]:
        """A writer that has failed to write never writes again: another one takes its place, and gets what is not surely in the file."""
        try:
            yield
        except OSError:
            writer, self._experiment, self._torn = self._experiment, None, True
            with suppress(Exception):
                writer.close()
            raise

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Write hyperparameters, and the metrics by which TensorBoard compares runs.

        Args:
            params: a value for each name; nested ones are named by their path, values that TensorBoard cannot show become strings.
            metrics: a number for each name, or one number, which is then called ``hp_metric``. If None, ``hp_metric`` is -1,
                or nothing at all is written with ``default_hp_metric=False``.
            step: the x value of those metrics, 0 if None.
        """
        shown = sanitize_params(flatten_dict(convert_params(params)))
        if metrics is None:
            metrics = {"hp_metric": -1} if self._default_hp_metric else {}
        elif named_values(metrics) is None:
            metrics = {"hp_metric": metrics}
        if not metrics:
            return
        self.log_metrics(metrics, step or 0)
        summary: Any = importlib.import_module(f"{writer_module()}.summary")
        writer: Any = self.experiment._get_file_writer()
        for part in summary.hparams(shown, add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)):
            writer.add_summary(part)

    @rank_zero_only
    def log_graph(self, model: Module, input_array: Tensor | tuple[Tensor, ...] | None = None) -> None:
        """Write the graph of the operations in the model's ``forward``, which is traced once.

        Args:
            model: the model.
            input_array: an input of ``forward``, several of them as a tuple; if None, ``model.example_input_array``.
        """
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if graph_can_be_traced(example):
            self._add_graph(model, example)

    def _add_graph(self, model: Module, example: Any) -> None:
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a trace cannot hold the cached copies of weights
        try:
            with warnings.catch_warnings(), torch.no_grad():
                # SummaryWriter traces with torch.jit, whose deprecation no user of this method can do anything about.
                warnings.filterwarnings("ignore", message=r"`torch\.jit\.trace.*` is deprecated", category=DeprecationWarning)
                self.experiment.add_graph(model, example)
        finally:
            torch.set_autocast_cache_enabled(cache)

    @rank_zero_only
    def save(self) -> None:
        """Write the events that are held back, those included that a Trainer has sent and that are still on their way."""
        self._catch_up()
        with self._lock, self._replaced_on_error():
            self.experiment.flush()
            self._unflushed.clear()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the events that are held back and close the file; a logger that was never used leaves no folder."""
        if self._experiment is not None:
            self.experiment.flush()
            self.experiment.close()


def scalar(name: str, value: Any) -> Any:
    """``value`` as a number that TensorBoard takes.

    Raises:
        ValueError: if it is not a number.
    """
    number = metric_value(name, value)
    if not hasattr(number, "__float__"):
        raise ValueError(
            f"The metric {name!r} is {value!r} ({type(value).__name__}), which TensorBoard cannot draw. Log a number, a tensor of one "
            "element, or a dict of them; text goes to `logger.experiment.add_text`."
        )
    return number


def graph_can_be_traced(example: Any) -> bool:
    """Whether ``example`` can be the input of a traced model; warns of the reason if not."""
    if example is None:
        rank_zero_warn(
            "The model's graph was not logged to TensorBoard, because there is no example of its input. Set "
            "`self.example_input_array` in the model, or pass `input_array`."
        )
        return False
    if not isinstance(example, (Tensor, tuple)):
        rank_zero_warn(
            f"The model's graph was not logged to TensorBoard, because the example of its input is of type {type(example).__name__}, which "
            "cannot be traced. Use a tensor, or a tuple of the positional arguments of `forward`."
        )
        return False
    return True
