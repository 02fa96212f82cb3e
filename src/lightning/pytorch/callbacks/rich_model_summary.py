"""Prints what the model consists of as a table of rich."""

from __future__ import annotations

import importlib.util
from typing import Any

from lightning.pytorch.callbacks.model_summary import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import summary_totals

NUMERIC_COLUMNS = ("Params", "FLOPs", "In sizes", "Out sizes")


class RichModelSummary(ModelSummary):
    """Prints a table of the model's layers at the start of ``fit``, once, on the first process, drawn by rich.

    Install it with ``pip install "keraunos[rich]"``.

    Args:
        max_depth: down to which depth layers are listed: 1 for the module's own attributes, -1 for all; 0 prints nothing.
        **summarize_kwargs: arguments of :class:`rich.table.Table`.

    Raises:
        ModuleNotFoundError: if rich is not installed.

    Example::

        from lightning.pytorch.callbacks import RichModelSummary

        trainer = Trainer(callbacks=RichModelSummary(max_depth=2, header_style="bold green"))
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        if importlib.util.find_spec("rich") is None:
            raise ModuleNotFoundError(
                'RichModelSummary is drawn by the package `rich`, which is not installed: run `pip install "keraunos[rich]"`, or use'
                " ModelSummary."
            )
        super().__init__(max_depth, **summarize_kwargs)

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
        """Print the table; the arguments are those of :meth:`ModelSummary.summarize`."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(**{"header_style": "bold magenta", **summarize_kwargs})
        for title, _ in summary_data:
            justify: Any = "right" if title in NUMERIC_COLUMNS else "left"
            table.add_column(title, justify=justify, style="dim" if title == " " else None, overflow="fold")
        for row in zip(*(cells for _, cells in summary_data)):
            table.add_row(*(Text(cell.strip()) for cell in row))  # as text: rich would take [2, 3] for markup
        console = Console()
        console.print(table)
        totals = summary_totals(total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
        for title, value in totals.items():
            console.print(Text.assemble((f"{title}: ", "bold"), value.strip()))
