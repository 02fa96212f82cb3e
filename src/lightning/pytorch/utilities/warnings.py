"""Warning categories: the names of :mod:`lightning.fabric.utilities.warnings`."""

from lightning.fabric.utilities.warnings import PossibleUserWarning

__all__ = ["PossibleUserWarning"]
