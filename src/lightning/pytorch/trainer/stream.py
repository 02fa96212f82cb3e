"""``predict`` as an iterator: one run, of which the caller takes the outputs batch by batch."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.dispatch import no_op
from lightning.pytorch.trainer.launch import launch
from lightning.pytorch.trainer.run import running
from lightning.pytorch.trainer.states import TrainerFn

if TYPE_CHECKING:
    from lightning.pytorch.core.module import LightningModule
    from lightning.pytorch.trainer.trainer import Trainer


def meet_others(trainer: Trainer) -> None:
    """See that all processes run the script up to here.

    Raises:
        MisconfigurationException: if the strategy runs copies of the trainer in processes of which this one is none.
    """
    launcher = trainer.strategy.launcher
    if getattr(launcher, "runs_copies", False):
        raise MisconfigurationException(
            f"`Trainer.predict_stream` gives outputs in the processes that predict, and {type(launcher).__name__} predicts in new ones, of "
            "which this is none. Use a strategy whose processes run the script, such as strategy='ddp' or torchrun, or `Trainer.predict` "
            "with a BasePredictionWriter."
        )
    launch(trainer, no_op)


def stream(trainer: Trainer, module: LightningModule, dataloaders: Any, datamodule: Any, *how: Any) -> Generator[Any, None, None]:
    """The run of ``predict_stream``: it begins when the first output is asked for, and ends with the last, or when it is closed.

    Args:
        trainer: whose model predicts.
        module: the model.
        dataloaders: as given.
        datamodule: as given.
        how: the other arguments of :func:`~lightning.pytorch.trainer.run.running`.
    """
    trainer._data.reset(predict=dataloaders)
    with running(trainer, TrainerFn.PREDICTING, module, datamodule, *how):
        try:
            yield from trainer.predict_loop.stream()
        except GeneratorExit:  # the caller wants no more: this run ends here as others do
            return
