"""Running an entry point of the Trainer in all processes of its strategy, and bringing back what happened in new ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException

from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.utilities.exceptions import SIGTERMException

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

R = TypeVar("R")

TERMINATED = 128 + signal.SIGTERM


def launch(trainer: Trainer, entry: Callable[..., R], *args: Any) -> R:
    """Run ``entry(*args)``, an entry point of the trainer, in every process.

    Where the strategy runs the script again, this process is one of them, and everything is as with one process. Where it
    starts processes with copies of trainer and model, these get back what the copies of rank 0 have become.

    Args:
        trainer: whose strategy knows how processes are started.
        entry: a bound method of the trainer.
        args: its arguments.

    Raises:
        SIGTERMException: if the processes with copies have ended by SIGTERM, sent to this process or to any of them.
    """
    launcher = trainer.strategy.launcher
    if not getattr(launcher, "runs_copies", False):
        return launcher.launch(_here, trainer, entry, args)  # type: ignore[no-any-return]
    try:
        outcome: Outcome = launcher.launch(_in_copy, trainer, entry, args)
    except (SystemExit, ProcessExitedException) as error:
        if (error.code if isinstance(error, SystemExit) else error.exit_code) != TERMINATED:
            raise
        raise SIGTERMException(TERMINATED) from error
    outcome.take_over(trainer, next((arg for arg in args if hasattr(arg, "load_state_dict")), None))
    return outcome.result  # type: ignore[no-any-return]


def _here(trainer: Trainer, entry: Callable[..., R], args: tuple[Any, ...]) -> R:
    trainer._launched = True
    try:
        return entry(*args)
    finally:
        trainer._launched = False


def _in_copy(trainer: Trainer, entry: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
    reset_seed()
    return Outcome.of(trainer, _here(trainer, entry, args))


@dataclass
class Outcome:
    """What a run in another process has changed, on the CPU.

    Args:
        result: what the entry point returned.
        weights: of the model.
        attributes: of each callback and logger, those that are plain data.
        metrics: the dictionaries of :class:`Metrics`.
        progress: the training loop's.
        counts: batches of the loaders, by stage.
        state: the trainer's.
        stopped: whether somebody asked to stop.
    """

    result: Any
    weights: dict[str, Any]
    attributes: list[dict[str, Any]]
    metrics: dict[str, Any]
    progress: dict[str, Any]
    counts: dict[str, Any]
    state: Any
    stopped: bool

    @classmethod
    def of(cls, trainer: Trainer, result: Any) -> Outcome:
        """Collect it, in the process where it happened."""
        outcome = cls(
            result,
            trainer.lightning_module.state_dict(),
            [{name: value for name, value in vars(part).items() if is_plain(value)} for part in (*trainer.callbacks, *trainer.loggers)],
            trainer._metrics.published(),
            trainer.fit_loop.progress.state_dict(),
            dict(trainer._data.counts),
            trainer.state,
            trainer.should_stop,
        )
        for name, value in vars(outcome).items():
            setattr(outcome, name, apply_to_collection(value, Tensor, lambda tensor: tensor.detach().cpu()))
        return outcome

    def take_over(self, trainer: Trainer, module: Any) -> None:
        """Let the trainer of this process, and its model, become what the copies have become."""
        module = module if module is not None else trainer.lightning_module
        if module.state_dict().keys() != self.weights.keys():
            module.trainer = trainer
            module.configure_model()  # its layers were made in the copies alone
        module.load_state_dict(self.weights)
        trainer.strategy.connect(module)
        module.trainer = trainer
        for part, attributes in zip((*trainer.callbacks, *trainer.loggers), self.attributes):
            vars(part).update(attributes)
        trainer._metrics.publish(self.metrics)
        trainer.fit_loop.progress.load_state_dict(self.progress)
        trainer._data.counts.update(self.counts)
        trainer.state, trainer.should_stop = self.state, self.stopped


PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, os.PathLike, timedelta, Enum)


def is_plain(value: Any) -> bool:
    """Whether a value is data that can be taken from one process to another: no object with a life of its own.

    Example::

        >>> is_plain({"scores": [0.5, 0.7]}), is_plain(open)
        (True, False)
    """
    if isinstance(value, dict):
        return all(is_plain(each) for item in value.items() for each in item)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN)
