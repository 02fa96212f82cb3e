"""What several loggers, and the code that drives them, need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import replacing
from lightning.fabric.utilities.logger import plain_data

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Put among the hyperparameters by the command line for its own use.
INTERNAL_HPARAMS = ("_class_path", "_instantiator")


def write_hparams(path: str, hparams: Mapping[str, Any]) -> None:
    """Write hyperparameters as YAML that any reader takes without running code.

    Args:
        path: a local path or URL of the file; its folder must exist.
        hparams: what is not plain data is written in string form.
    """
    import yaml

    with replacing(path) as file:
        yaml.safe_dump(plain_data(hparams), file, allow_unicode=True)


def log_hyperparams(trainer: pl.Trainer, call: Callable[..., None] | None = None) -> None:
    """Give each logger the hyperparameters of the module and the datamodule, then the model's graph, then have it save.

    Args:
        trainer: whose loggers, module and datamodule.
        call: calls a method of a logger, and gets the logger, the method's name and the arguments; None calls it.

    Raises:
        RuntimeError: if both have a hyperparameter of the same name with different values.
    """
    if not trainer.loggers:
        return
    module, datamodule = trainer.lightning_module, trainer.datamodule
    owners = [owner for owner in (module, datamodule) if owner is not None and owner._log_hyperparams]
    hparams: dict[str, Any] | None = None
    for owner in owners:
        initial = owner.hparams_initial
        clashes = [key for key in initial if hparams is not None and key in hparams and not same(initial[key], hparams[key])]
        if clashes:
            raise RuntimeError(
                f"The hyperparameters {clashes} exist in the LightningModule and in the LightningDataModule with different values, so "
                "that loggers could show only one of them. Rename one, or call `save_hyperparameters(logger=False)` in one."
            )
        hparams = {**(hparams or {}), **initial}
    call = call or (lambda logger, method, *args: getattr(logger, method)(*args))
    for logger in trainer.loggers:
        if hparams is not None:
            call(logger, "log_hyperparams", {key: value for key, value in hparams.items() if key not in INTERNAL_HPARAMS})
        call(logger, "log_graph", module)
        call(logger, "save")


def same(first: Any, second: Any) -> bool:
    """Whether two hyperparameters are equal; arrays and tensors, whose ``==`` is no single truth, must be the same object."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    try:
        return bool(first == second)
    except (RuntimeError, ValueError):
        return False
