"""Prints what the model consists of when training begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.utilities.model_summary import DeepSpeedSummary
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from lightning.pytorch.utilities.model_summary.model_summary import _format_summary_table, summarize

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class ModelSummary(Callback):
    """Prints a table of the model's layers at the start of ``fit``, once, on the first process.

    With ``example_input_array`` set in the module, the table has the layers' input and output sizes and FLOPs too.

    Args:
        max_depth: down to which depth layers are listed: 1 for the module's own attributes, -1 for all; 0 prints nothing.
        **summarize_kwargs: handed to :meth:`summarize`.

    Example::

        from lightning.pytorch.callbacks import ModelSummary

        trainer = Trainer(callbacks=ModelSummary(max_depth=-1))
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth: int = max_depth
        self._summarize_kwargs: dict[str, Any] = summarize_kwargs

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._max_depth:
            return
        summary = self._summary(trainer, pl_module)  # on every process: the forward pass of a sharded model needs all of them
        if trainer.is_global_zero:
            self.summarize(
                summary._get_summary_data(),
                summary.total_parameters,
                summary.trainable_parameters,
                summary.model_size,
                summary.total_training_modes,
                total_flops=summary.total_flops,
                **self._summarize_kwargs,
            )

    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Summary:
        if any(hasattr(parameter, "ds_numel") for parameter in pl_module.parameters()):  # divided by DeepSpeed
            return DeepSpeedSummary(pl_module, max_depth=self._max_depth)
        return summarize(pl_module, max_depth=self._max_depth)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the table. Override it to show the summary in another way.

        Args:
            summary_data: the table's columns: the title and a cell for each row.
            total_parameters: the number of parameters.
            trainable_parameters: how many of them require gradients.
            model_size: the size of the parameters in megabytes.
            total_training_modes: the number of modules in ``"train"`` and in ``"eval"`` mode.
            total_flops: floating point operations of a forward pass with the example input.
            **summarize_kwargs: what the callback was made with.
        """
        table = _format_summary_table(total_parameters, trainable_parameters, model_size, total_training_modes, total_flops, *summary_data)
        log.info("\n" + table)
