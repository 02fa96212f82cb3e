"""Hyperparameters: the arguments of ``__init__``, kept with the object, in its checkpoints, and for loggers."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.parsing import AttributeDict, as_hparams, copy_of, save_hyperparameters


class HyperparametersMixin:
    """Gives a class ``save_hyperparameters``, ``hparams`` and ``hparams_initial``."""

    __jit_unused_properties__: list[str] = ["hparams", "hparams_initial"]

    # Defaults on the class: subclasses may save before they call super().__init__().
    _log_hyperparams: bool = False
    _hparams_name: str | None = None

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep arguments of ``__init__`` as hyperparameters, in :attr:`hparams`. Call it in ``__init__``.

        They go into each checkpoint, ``load_from_checkpoint`` passes them to ``__init__`` again, and loggers show them.

        Args:
            *args: the names of the arguments to keep, or one dict, ``Namespace``, dataclass instance or OmegaConf container
                of hyperparameters. Without any, all arguments are kept: those of ``__init__`` of the whole class hierarchy
                and what its ``**kwargs`` hold. Where a subclass passes on an argument with another value, its own value counts.
            ignore: the name, or names, of arguments to leave out. Modules and data sets belong here.
            frame: the frame of an ``__init__``, if this is not called from inside it.
            logger: whether loggers get them when a run starts.

        Raises:
            KeyError: if there is no argument of a given name.
            ValueError: if hyperparameters of another type are given.

        Example::

            >>> class Model(HyperparametersMixin):
            ...     def __init__(self, width, depth=2, backbone=None):
            ...         self.save_hyperparameters(ignore="backbone")
            >>> Model(8).hparams
            "depth": 2
            "width": 8
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current is not None else None
        self._log_hyperparams = logger
        save_hyperparameters(self, *args, ignore=ignore, frame=frame)

    @property
    def hparams(self) -> Any:
        """The hyperparameters: an ``AttributeDict``, or the OmegaConf container that was given.

        Changes to it, new entries included, go into later checkpoints.

        Example::

            >>> model = HyperparametersMixin()
            >>> model.save_hyperparameters({"lr": 0.1})
            >>> model.hparams.lr, model.hparams["lr"]
            (0.1, 0.1)
        """
        if "_hparams" not in self.__dict__:
            self.__dict__["_hparams"] = AttributeDict()
        return self.__dict__["_hparams"]

    @property
    def hparams_initial(self) -> Any:
        """The hyperparameters as they were when they were saved, whatever happened to :attr:`hparams` since. A copy."""
        return copy_of(self.__dict__.get("_hparams_initial", AttributeDict()))

    def remove_ignored_hparams(self, ignore_list: list[str]) -> None:
        """Take hyperparameters out of :attr:`hparams` and :attr:`hparams_initial` again.

        Args:
            ignore_list: their names; those that are not there do not matter.
        """
        for stored in (self.hparams, self.__dict__.get("_hparams_initial", {})):
            for name in ignore_list:
                if name in stored:
                    del stored[name]

    def _set_hparams(self, hparams: Any) -> None:
        """Add ``hparams`` to those there are; an OmegaConf container stays one only as long as it is alone."""
        new, old = as_hparams(hparams), self.hparams
        if isinstance(new, dict) and isinstance(old, dict):
            old.update(new)
        else:
            self.__dict__["_hparams"] = AttributeDict({**old, **new}) if old else new

    def _to_hparams_dict(self, hparams: dict[str, Any] | Namespace | str) -> Any:
        return as_hparams(hparams)
