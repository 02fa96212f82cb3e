"""Exceptions that end a run."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["MisconfigurationException", "SIGTERMException"]


class SIGTERMException(SystemExit):
    """Raised between two batches once the process got SIGTERM, so that the run ends in an orderly way.

    It is a :class:`SystemExit`: what the run leaves open is closed, ``on_exception`` hooks run, and the process ends
    without a traceback unless somebody catches it.
    """
