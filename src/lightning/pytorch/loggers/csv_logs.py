"""Metrics as rows of a CSV file, hyperparameters as YAML beside it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.csv_logs import CSVLogger as FabricCSVLogger
from lightning.fabric.loggers.csv_logs import ExperimentWriter as FabricExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.cloud_io import join_path
from lightning.fabric.utilities.logger import convert_params
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.loggers.utilities import write_hparams


class ExperimentWriter(FabricExperimentWriter):
    """Appends rows to ``log_dir/metrics.csv`` and keeps hyperparameters in ``log_dir/hparams.yaml``.

    Args:
        log_dir: a local folder or a URL; it is made if it does not exist.
    """

    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.hparams: dict[str, Any] = {}

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Add hyperparameters to those logged before and write them all."""
        self.hparams.update(params)
        write_hparams(join_path(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)


class CSVLogger(Logger, FabricCSVLogger):
    """Writes metrics to ``save_dir/name/version/metrics.csv`` and hyperparameters to ``hparams.yaml`` beside it.

    A ``metrics.csv`` that is already there is continued: its rows stay, new ones follow, new columns are added to its header.

    Args:
        save_dir: where the experiments lie: a local folder or a URL that fsspec understands.
        name: the experiment; empty or None for no folder of its own.
        version: the run. A number N means the folder ``version_N``, a string is the folder's name; None takes the next number.
        prefix: put before the name of each metric, joined by ``-``.
        flush_logs_every_n_steps: rows are held back until a step whose number plus one is a multiple of this, or until
            there are that many. A Trainer has them written whenever it logs.

    Raises:
        ValueError: if ``flush_logs_every_n_steps`` is not a positive number.

    Example::

        trainer = Trainer(logger=CSVLogger("runs", name="digits"))
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        FabricCSVLogger.__init__(self, save_dir, name, version, prefix, flush_logs_every_n_steps)

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

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of this run's files; the folder is made when it is first asked for."""
        with self._lock:
            if self._experiment is None:
                self._experiment = ExperimentWriter(self.log_dir)
            return self._experiment  # type: ignore[no-any-return]

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Write hyperparameters to ``hparams.yaml``, beside those logged before.

        Args:
            params: a value for each name, nested as you like; what is neither a number, a string, a list nor a dict is
                written in string form.
        """
        with self._lock:
            self.experiment.log_hparams(convert_params(params))
