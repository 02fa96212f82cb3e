"""The profiler that takes the time of each action."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

from lightning.pytorch.profilers.profiler import Profiler


class SimpleProfiler(Profiler):
    """Record how long each action takes, and report the mean and the total for each, the longest total first.

    Args:
        dirpath: the directory of the report; None is the log directory of the trainer.
        filename: the end of the report's name, without its extension: ``"profiler"`` gives ``fit-profiler.txt``. None
            sends the report to the log.
        extended: report the number of calls and the share of the whole time too.

    Attributes:
        recorded_durations: for each action the seconds of each of its calls.
        current_actions: for each action that runs now, when it started.

    Raises:
        ValueError: if an action is started twice, or stopped without having been started.

    Example::

        >>> from lightning.pytorch.profilers.simple import SimpleProfiler
        >>> profiler = SimpleProfiler()
        >>> with profiler.profile("loading"):
        ...     pass
        >>> len(profiler.recorded_durations["loading"])
        1
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: defaultdict[str, list[float]] = defaultdict(list)
        self.start_time = time.perf_counter()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Get ready for a run; the whole time is counted from the first one."""
        super().setup(stage, local_rank, log_dir)
        if not self.recorded_durations and not self.current_actions:
            self.start_time = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Begin to measure ``action_name``."""
        if action_name in self.current_actions:
            raise ValueError(f"The action {action_name!r} was started twice: stop it first, or give the inner one another name.")
        self.current_actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Record the time since ``action_name`` was started."""
        end = time.perf_counter()
        if action_name not in self.current_actions:
            raise ValueError(f"The action {action_name!r} was stopped and never started; running now: {sorted(self.current_actions)}.")
        self.recorded_durations[action_name].append(end - self.current_actions.pop(action_name))

    def summary(self) -> str:
        """The report as a table."""
        whole = time.perf_counter() - self.start_time
        durations = self.recorded_durations
        totals = sorted(((sum(times), len(times), action) for action, times in durations.items()), key=lambda entry: -entry[0])
        calls = sum(len(times) for times in durations.values())
        rows: list[tuple[str, ...]]
        if self.extended:
            rows = [("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %")]
            rows.append(("Total", "-", f"{calls}", f"{whole:.5}", "100 %"))
            rows += [(action, f"{total / n:.5}", f"{n}", f"{total:.5}", f"{100 * total / whole:.5}") for total, n, action in totals]
        else:
            rows = [("Action", "Mean duration (s)", "Total time (s)")]
            rows += [(action, f"{total / n:.5}", f"{total:.5}") for total, n, action in totals]
        # A rule under the header, and in the extended form under the line of totals.
        return f"{self._title()}\n\n{_table(rows, rules_after=2 if self.extended else 1)}\n"


def _table(rows: list[tuple[str, ...]], rules_after: int) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["|  " + "  |  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + "  |" for row in rows]
    rule = "-" * len(lines[0])
    head = [line for row in lines[:rules_after] for line in (row, rule)]
    return "\n".join([rule, *head, *lines[rules_after:], rule]) + "\n"
