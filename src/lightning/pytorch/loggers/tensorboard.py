"""Metrics, hyperparameters and graphs as TensorBoard's event files."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning.fabric.loggers.tensorboard import TensorBoardLogger as FabricTensorBoardLogger
from lightning.fabric.loggers.tensorboard import graph_can_be_traced
from lightning.fabric.utilities.cloud_io import get_filesystem, join_path, local_path
from lightning.fabric.utilities.logger import convert_params
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.loggers.utilities import write_hparams

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.precision import Precision


class TensorBoardLogger(Logger, FabricTensorBoardLogger):
    """Writes TensorBoard event files, and hyperparameters as ``hparams.yaml``, to ``save_dir/name/version/sub_dir``.

    Look at them with ``tensorboard --logdir save_dir``.

    Args:
        save_dir: where the experiments lie: a local folder or a URL that fsspec understands.
        name: the experiment; empty or None for no folder of its own.
        version: the run. A number N means the folder ``version_N``, a string is the folder's name; None takes the next number.
        log_graph: have the Trainer log the model's graph. The model needs an ``example_input_array``.
        default_hp_metric: log a metric ``hp_metric`` of -1 with hyperparameters that come without metrics, because
            TensorBoard shows no hyperparameters without one.
        prefix: put before the name of each metric, joined by ``-``.
        sub_dir: one more folder below the version.
        kwargs: passed on to ``SummaryWriter``: ``comment``, ``purge_step``, ``max_queue``, ``flush_secs``, ``filename_suffix``.

    Raises:
        ModuleNotFoundError: if neither tensorboard nor tensorboardX is installed.

    Example::

        trainer = Trainer(logger=TensorBoardLogger("runs", name="digits"))
    """

    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        FabricTensorBoardLogger.__init__(self, save_dir, name, version, default_hp_metric, prefix, sub_dir, **kwargs)
        self._log_graph = log_graph
        self.hparams: dict[str, Any] = {}
        self._hparams_changed = True
        self._hparams_file_is_ours = False

    @property
    def save_dir(self) -> str:
        """The folder given as the root of all experiments."""
        return self._root_dir

    @property
    def root_dir(self) -> str:
        """The folder of the experiment: ``save_dir/name``."""
        return join_path(self.save_dir, self.name)

    @property
    def _versions_dir(self) -> str:
        return self.root_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Write hyperparameters, and the metrics by which TensorBoard compares runs; :meth:`save` puts them into ``hparams.yaml``.

        Args:
            params: a value for each name; nested ones are named by their path, values that TensorBoard cannot show become strings.
            metrics: a number for each name, or one number, which is then called ``hp_metric``. If None, ``hp_metric`` is -1,
                or nothing at all is written to the event file with ``default_hp_metric=False``.
            step: the x value of those metrics, 0 if None.
        """
        fields = convert_params(params)
        self.hparams.update(fields)
        self._hparams_changed = True
        super().log_hyperparams(fields, metrics, step)

    @rank_zero_only
    def log_graph(self, model: pl.LightningModule, input_array: Tensor | tuple[Tensor, ...] | None = None) -> None:
        """Write the graph of the operations in the model's ``forward``, which is traced once; with ``log_graph=True`` only.

        Args:
            model: the model; its hooks around the transfer of batches are applied to the example.
            input_array: an input of ``forward``, several of them as a tuple; if None, ``model.example_input_array``.
        """
        if not self._log_graph:
            return
        example: Any = model.example_input_array if input_array is None else input_array
        if not graph_can_be_traced(example):
            return
        example = model.on_before_batch_transfer(example, 0)
        example = model.transfer_batch_to_device(example, model.device, 0)
        example = model.on_after_batch_transfer(example, 0)
        with traceable(model) as precision:
            if precision is None:
                self._add_graph(model, example)
            else:
                with precision.forward_context():
                    self._add_graph(model, precision.convert_input(example))

    @rank_zero_only
    def save(self) -> None:
        """Write the events that are held back, and ``hparams.yaml`` if there is none or there are new hyperparameters."""
        super().save()
        with self._lock:
            if self._hparams_changed:
                self._write_hparams()
                self._hparams_changed = False

    def _write_hparams(self) -> None:
        path = join_path(self.log_dir, self.NAME_HPARAMS_FILE)
        # The file of an earlier run says what that run was; what is new since then is in the event file.
        if self._hparams_file_is_ours or not exists(path):
            write_hparams(path, self.hparams)
            self._hparams_file_is_ours = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write everything that is held back and close the file; a logger that was never used leaves no folder."""
        if self._experiment is not None:
            self.save()
        super().finalize(status)


@contextmanager
def traceable(model: pl.LightningModule) -> Generator[Precision | None, None, None]:
    """Let a trace look at every attribute of a module, also of one without a trainer; gives the trainer's precision, if there is one."""
    from lightning.pytorch.core.module import LightningModule

    modules = [module for module in model.modules() if isinstance(module, LightningModule)]
    for module in modules:
        module.__dict__["_jit_is_scripting"] = True  # `module.trainer` is then None where it would raise
    try:
        trainer = model.trainer
        yield None if trainer is None else trainer.precision_plugin
    finally:
        for module in modules:
            del module.__dict__["_jit_is_scripting"]


def exists(path: str) -> bool:
    """Whether there is a file at a local path or URL."""
    local = local_path(path)
    return os.path.exists(local) if local is not None else bool(get_filesystem(path).exists(path))
