"""The interface of loggers, and what those that write into a folder of their own have in common."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning.fabric.utilities.cloud_io import get_filesystem, join_path, local_path
from lightning.fabric.utilities.rank_zero import rank_zero_only


class Logger(ABC):
    """Writes metrics and hyperparameters somewhere. Subclass it and define ``name``, ``version``, ``log_metrics`` and
    ``log_hyperparams``; the rest is optional.

    Attributes:
        called_in_background: whether a Trainer may call ``log_metrics``, ``save`` and ``after_save_checkpoint`` from a thread of its own,
            so that training never waits for them. Set it to False in a class that can be called from the main thread only.

    Example::

        >>> class Printer(Logger):
        ...     name, version = "printer", 0
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, metrics)
        ...     def log_hyperparams(self, params):
        ...         print(params)
        >>> Printer().log_metrics({"loss": 0.5}, step=3)
        3 {'loss': 0.5}
    """

    called_in_background: bool = True

    @property
    @abstractmethod
    def name(self) -> str | None:
        """The name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""

    @property
    def root_dir(self) -> str | None:
        """The folder that holds all versions of the experiment; None if nothing lies on disk."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run; None if nothing lies on disk."""
        return None

    @property
    def group_separator(self) -> str:
        """What stands between the parts of a metric's name that belongs to a group."""
        return "/"

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write metrics.

        Args:
            metrics: a number for each name.
            step: the step at which they were measured.
        """

    @abstractmethod
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write hyperparameters.

        Args:
            params: a value for each name, nested as you like.
            args: more positional arguments that a logger takes.
            kwargs: more named arguments that a logger takes.
        """

    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:
        """Write the graph of the model's computation.

        Args:
            model: the model.
            input_array: an input of its ``forward``.
        """

    def save(self) -> None:
        """Write out what is still held back."""

    def finalize(self, status: str) -> None:
        """End the run.

        Args:
            status: how it ended: ``"success"``, ``"failed"``, ``"aborted"``.
        """
        self.save()


class FolderLogger(Logger):
    """A logger that writes into ``root_dir/name/version``, a folder on the local disk or on remote storage."""

    LOGGER_JOIN_CHAR = "-"

    def __init__(self, root_dir: str | os.PathLike[str], name: str | None, version: int | str | None, prefix: str) -> None:
        if not isinstance(root_dir, (str, os.PathLike)):
            raise TypeError(f"The folder to log to must be a string or a path, but {root_dir!r} was given. '.' is the current folder.")
        super().__init__()
        self._root_dir = os.fspath(root_dir)
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        self._experiment: Any = None
        self._outbox: Any = None  # rows that are on their way here, while a Trainer runs
        self._lock = threading.RLock()
        _loggers.add(self)

    def _catch_up(self) -> None:
        """Let the rows that a Trainer has sent before get here first; not while the lock is held."""
        if self._outbox is not None:
            self._outbox.catch_up()

    @property
    def name(self) -> str:
        """The name of the experiment: the folder of its versions; empty if they lie in ``root_dir`` itself."""
        return self._name

    @property
    def version(self) -> int | str:
        """Which run this is: as given, else one more than the highest number among the folders ``version_N``."""
        if self._version is None:
            self._version = next_version(expand(self._versions_dir))
        return self._version

    @property
    def root_dir(self) -> str:
        """The folder given as the root of all experiments."""
        return self._root_dir

    @property
    def log_dir(self) -> str:
        """The folder of this run: ``version_N`` for a version N, a version that is a string as it is.

        A leading ``~`` and environment variables are expanded.
        """
        version = self.version
        return expand(join_path(self._versions_dir, version if isinstance(version, str) else f"version_{version}"))

    @property
    def _versions_dir(self) -> str:
        return join_path(self.root_dir, self.name)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay with the original; a copy opens its own when it first writes.
        # So do its threads.
        return {name: value for name, value in {**self.__dict__, "_experiment": None, "_outbox": None}.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        _loggers.add(self)


_loggers: weakref.WeakSet[FolderLogger] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked process, whose parent's threads may hold the locks for ever."""
    for logger in _loggers:
        logger._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def next_version(folder: str) -> int:
    """One more than the highest N of the sub-folders ``version_N`` of ``folder``; 0 if there is none."""
    local = local_path(folder)
    try:
        if local is not None:
            with os.scandir(local or ".") as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
        else:
            listing = get_filesystem(folder).ls(folder, detail=True)
            names = [os.path.basename(entry["name"].rstrip("/")) for entry in listing if entry["type"] == "directory"]
    except FileNotFoundError:
        return 0
    # "version_3_old" counts as 3: a folder that somebody set aside must not get a second owner of its number.
    numbers = [name.split("_")[1] for name in names if name.startswith("version_")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def expand(path: str) -> str:
    """``path`` with a leading ``~`` and environment variables replaced."""
    return os.path.expandvars(os.path.expanduser(path))


def rank_zero_experiment(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make an ``experiment`` property return the real thing on global rank 0 and a :class:`DummyExperiment` elsewhere.

    Example::

        class MyLogger(Logger):
            @property
            @rank_zero_experiment
            def experiment(self):
                return open_connection()
    """

    @functools.wraps(fn)
    def experiment(self: Any) -> Any:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            return fn(self)
        return DummyExperiment()

    return experiment


class DummyExperiment:
    """Accepts every method call and every index, and does nothing.

    Example::

        >>> DummyExperiment().add_image("digits", None)
    """

    def nop(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):  # else copy, pickle and numpy would take us for things that we are not
            raise AttributeError(name)
        return self.nop

    def __getitem__(self, index: Any) -> DummyExperiment:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        """Nothing."""
