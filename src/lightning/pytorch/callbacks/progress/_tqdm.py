"""The bar itself. A module of its own, so that tqdm is imported when a bar is first drawn and no earlier."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING or importlib.util.find_spec("ipywidgets") is None:
    from tqdm import tqdm as base
else:
    from tqdm.auto import tqdm as base

METRIC_WIDTH = 5


class Tqdm(base):  # type: ignore[type-arg]
    """A tqdm bar whose metrics keep their width, so that the line does not jump while it is redrawn."""

    # We say when to draw; the thread that tqdm would start to wake up stalled bars has nothing to do here.
    monitor_interval = 0

    @staticmethod
    def format_num(n: float | str) -> str:
        """``n`` in at least five characters if it is a float; integers and text as they are.

        Example::

            >>> Tqdm.format_num(0.5), Tqdm.format_num(123.456), Tqdm.format_num(3), Tqdm.format_num("on_7")
            ('0.500', '123.0', '3', 'on_7')
        """
        if isinstance(n, str):
            return n
        text: str = base.format_num(n)
        if not isinstance(n, float) or not math.isfinite(n) or "e" in text:
            return text
        return (text if "." in text else text + ".").ljust(METRIC_WIDTH, "0")
