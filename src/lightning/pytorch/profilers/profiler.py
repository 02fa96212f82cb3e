"""The base class of profilers."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.cloud_io import get_filesystem, join_path, local_path

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class Profiler(ABC):
    """Derive from this class and implement :meth:`start` and :meth:`stop` to measure the actions of a run.

    The trainer calls :meth:`setup` when fit, validate, test or predict begins, wraps each of its actions in
    :meth:`profile`, and calls :meth:`describe` and :meth:`teardown` when it ends. The report goes to the file
    ``{dirpath}/{stage}-{filename}.txt``, or without a ``filename`` to the log.

    Args:
        dirpath: the directory of the report; None is the log directory of the trainer.
        filename: the end of the report's name, without its extension; None writes no file.

    Example::

        >>> from lightning.pytorch.profilers.profiler import Profiler
        >>> class Announce(Profiler):
        ...     def start(self, action_name):
        ...         print("start", action_name)
        ...     def stop(self, action_name):
        ...         print("stop", action_name)
        >>> with Announce().profile("loading"):
        ...     print("working")
        start loading
        working
        stop loading
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._local_rank: int | None = None
        self._stage: str | None = None

    @abstractmethod
    def start(self, action_name: str) -> None:
        """Begin to measure ``action_name``."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """End the measurement that :meth:`start` began."""

    def summary(self) -> str:
        """The report as text; empty if there is none."""
        return ""

    @contextmanager
    def profile(self, action_name: str) -> Generator[str, None, None]:
        """Measure the body of a ``with`` statement, which gets the name; what raises is measured too."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    @property
    def local_rank(self) -> int:
        """The rank of this process on its machine; 0 if it is the only one."""
        return self._local_rank or 0

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Get ready for a run.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
            local_rank: the rank on this machine, which becomes a part of the file name; None in a run of one process.
            log_dir: where to write if no ``dirpath`` was given.
        """
        self._stage = getattr(stage, "value", stage)
        self._local_rank = local_rank
        self.dirpath = self.dirpath or log_dir

    def _attach(self, trainer: pl.Trainer) -> None:
        """Get to know the trainer, after :meth:`setup`: for profilers of ours that ask it for more than actions."""

    def teardown(self, stage: str | None) -> None:
        """Release what :meth:`setup` took; ``stage`` is the one that ends."""

    def describe(self) -> None:
        """Write the report to its file, after the earlier reports, or to the log in the process of rank 0."""
        report = self.summary()
        if not report:
            return
        if self.filename and self.dirpath:
            self._append(join_path(self.dirpath, self._prepare_filename()), report)
        elif self.local_rank == 0:
            log.info(report)

    def _prepare_filename(self, action_name: str | None = None, extension: str = ".txt") -> str:
        """``{stage}-{filename}-{local_rank}-{action_name}{extension}``, of which unknown parts are left out."""
        rank = None if self._local_rank is None else str(self._local_rank)
        parts = (self._stage, self.filename, rank, action_name)
        return "-".join(part.replace("/", "_") for part in parts if part) + extension

    def _append(self, path: str, text: str) -> None:
        local = local_path(path)
        if local is not None:
            os.makedirs(os.path.dirname(local), exist_ok=True)
            with open(local, "a", encoding="utf-8") as file:
                file.write(text)
            return
        filesystem = get_filesystem(path)
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        # Object stores have no append: there a report replaces the one before it.
        with filesystem.open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def _title(self) -> str:
        return f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"
