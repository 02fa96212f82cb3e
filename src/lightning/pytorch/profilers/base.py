"""The profiler that measures nothing."""

from __future__ import annotations

from lightning.pytorch.profilers.profiler import Profiler


class PassThroughProfiler(Profiler):
    """Measures nothing: what the trainer uses if no profiler is asked for."""

    def start(self, action_name: str) -> None:
        """Do nothing."""

    def stop(self, action_name: str) -> None:
        """Do nothing."""
