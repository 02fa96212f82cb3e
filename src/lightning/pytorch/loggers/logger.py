"""The interface of the loggers that a Trainer writes to."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import DummyExperiment, rank_zero_experiment
from lightning.fabric.loggers.logger import Logger as FabricLogger

if TYPE_CHECKING:
    from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint

__all__ = ["DummyExperiment", "DummyLogger", "Logger", "merge_dicts", "rank_zero_experiment"]


class Logger(FabricLogger, ABC):
    """Writes metrics and hyperparameters somewhere. Subclass it and define ``name``, ``version``, ``log_metrics`` and
    ``log_hyperparams``; the rest is optional.

    Decorate what writes with ``rank_zero_only``, so that a run with several processes writes once.

    Example::

        class Printer(Logger):
            name, version = "printer", 0

            @rank_zero_only
            def log_metrics(self, metrics, step=None):
                print(step, metrics)

            @rank_zero_only
            def log_hyperparams(self, params):
                print(params)

        Trainer(logger=Printer())
    """

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Called once for each checkpoint that is on the disk, after the rows before it and, like them, by a thread in the background.

        By then training may have gone on, and the file may have been replaced. An error is a warning, and the call is not repeated.

        Args:
            checkpoint_callback: a copy of the callback that saved it, with paths and scores as they were then.
        """

    @property
    def save_dir(self) -> str | None:
        """The folder below which checkpoints go; None leaves it to ``default_root_dir``."""
        return None


class DummyLogger(Logger):
    """Accepts every call and writes nothing: what user code finds as ``trainer.logger`` under ``fast_dev_run``.

    Example::

        >>> logger = DummyLogger()
        >>> logger.log_metrics({"loss": 0.5})
        >>> logger.experiment.add_text("note", "goes nowhere")
    """

    def __init__(self) -> None:
        super().__init__()
        self._experiment = DummyExperiment()

    @property
    def experiment(self) -> DummyExperiment:
        """An object that accepts every method call."""
        return self._experiment

    @property
    def name(self) -> str:
        """Empty."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def __getitem__(self, idx: int) -> DummyLogger:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):  # else copy and pickle would take us for things that we are not
            raise AttributeError(name)
        return DummyExperiment().nop


def merge_dicts(
    dicts: Sequence[Mapping[str, Any]],
    agg_key_funcs: Mapping[str, Any] | None = None,
    default_func: Callable[[Sequence[Any]], Any] | None = None,
) -> dict[str, Any]:
    """Merge dicts by aggregating, for each key, the values of all dicts that have it; None does not count as a value.

    Args:
        dicts: the dicts to merge. Dicts within them are merged in the same way.
        agg_key_funcs: for each key the function from the list of values to the result; for a key whose values are dicts, such
            a mapping again.
        default_func: the function for every other key; the mean if None.

    Example::

        >>> merge_dicts([{"loss": 1.0, "best": 3, "val": {"acc": 0.5}}, {"loss": 2.0, "best": 4}], agg_key_funcs={"best": max})
        {'loss': 1.5, 'best': 4, 'val': {'acc': 0.5}}
    """
    if default_func is None:
        from statistics import mean

        default_func = mean
    functions = agg_key_funcs or {}
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for d in dicts for key in d):
        values = [d[key] for d in dicts if d.get(key) is not None]
        function = functions.get(key)
        if not values:
            continue
        if isinstance(values[0], Mapping):
            merged[key] = merge_dicts(values, function, default_func)
        else:
            merged[key] = (function or default_func)(values)
    return merged
