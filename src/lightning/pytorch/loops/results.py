"""The table of metrics that ``validate`` and ``test`` print."""

from __future__ import annotations

Rows = list[list[str]]


def print_results(results: list[dict[str, float]], stage: str) -> None:
    """Print the metrics of all loaders as a table, through Rich where it is installed.

    Args:
        results: one dict for each loader.
        stage: ``"validate"`` or ``"test"``.
    """
    if not any(results):
        return
    rows = table_of(results, stage)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(rows))
        return
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # a file is as wide as need be
        console.width = max(console.width, console.measure(table, options=console.options.update_width(10_000)).maximum)
    console.print(table)


def table_of(results: list[dict[str, float]], stage: str) -> Rows:
    """The table's cells: a head, then a row for each metric, whichever loaders have it.

    Example::

        >>> table_of([{"acc/dataloader_idx_0": 0.5}, {"acc/dataloader_idx_1": 0.75}], "test")
        [['Test metric', 'DataLoader 0', 'DataLoader 1'], ['acc', '0.5', '0.75']]
    """
    # The columns say which loader it is.
    columns = [{name.removesuffix(f"/dataloader_idx_{i}"): value for name, value in result.items()} for i, result in enumerate(results)]
    names = sorted({name for column in columns for name in column})
    head = [f"{stage.capitalize()} metric", *(f"DataLoader {i}" for i in range(len(columns)))]
    return [head, *([name, *(f"{column[name]:.8g}" if name in column else "" for column in columns)] for name in names)]


def plain(rows: Rows) -> str:
    """The table in plain text.

    Example::

        >>> print(plain([["Test metric", "DataLoader 0"], ["acc", "0.5"]]))
        ──────────────────────────
        Test metric   DataLoader 0
        ──────────────────────────
        acc           0.5
        ──────────────────────────
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = "─" * (sum(widths) + 3 * (len(widths) - 1))
    head, *body = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([line, head, line, *body, line])
