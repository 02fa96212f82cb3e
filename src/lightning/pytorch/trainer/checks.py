"""What must fit together before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from lightning.pytorch.data import TrainLoader
    from lightning.pytorch.loops.progress import FitProgress
    from lightning.pytorch.trainer.trainer import Trainer


def check_model(model: Any, function: str) -> LightningModule:
    """The LightningModule in ``model``, which may be compiled.

    Raises:
        TypeError: if it is none.
    """
    from lightning.pytorch.utilities.compile import maybe_unwrap_optimized

    try:
        return maybe_unwrap_optimized(model)
    except (TypeError, ValueError):
        raise TypeError(
            f"`Trainer.{function}(model=...)` needs a LightningModule; got {_short(model)}, "
            f"a {type(model).__module__}.{type(model).__qualname__}. {_advice(model)}"
        ) from None


def _advice(model: Any) -> str:
    if isinstance(model, type) and issubclass(model, LightningModule):
        return f"Pass an instance of the class, such as `{model.__name__}()`."
    where = " of this package, not from `pytorch_lightning`" if _is_of_another_package(model) else ""
    return f"Derive your model's class from `lightning.pytorch.LightningModule`{where}."


def _is_of_another_package(model: Any) -> bool:
    return any(cls.__module__.startswith("pytorch_lightning") for cls in type(model).__mro__)


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."


def check_run(trainer: Trainer) -> None:
    """Check that the module has what the function needs.

    Raises:
        MisconfigurationException: if a method is missing, or two things contradict each other.
    """
    module, function = trainer.lightning_module, trainer.state.fn
    if function is TrainerFn.FITTING:
        _check_training(trainer, module)
    elif function is TrainerFn.PREDICTING:
        if not is_overridden("predict_step", module) and not is_overridden("forward", module):
            raise MisconfigurationException(
                f"`Trainer.predict` needs `predict_step`, or `forward`, and {type(module).__name__} defines neither."
            )
    elif function is not None:
        name = "validation" if function is TrainerFn.VALIDATING else "test"
        if not is_overridden(f"{name}_step", module):
            raise MisconfigurationException(
                f"`Trainer.{function.value}` needs `{name}_step`, and {type(module).__name__} does not define it: "
                f"add `def {name}_step(self, batch, batch_idx)`."
            )


def _check_training(trainer: Trainer, module: LightningModule) -> None:
    name = type(module).__name__
    if not is_overridden("training_step", module):
        raise MisconfigurationException(f"`Trainer.fit` needs `training_step`: add `def training_step(self, batch, batch_idx)` to {name}.")
    if not is_overridden("configure_optimizers", module):
        raise MisconfigurationException(f"`Trainer.fit` needs `configure_optimizers`: add it to {name}, and return an optimizer from it.")
    has_loader = trainer._data.has("val")
    has_step = is_overridden("validation_step", module)
    if has_loader and not has_step:
        rank_zero_warn(
            f"There is a validation loader, and {name} has no `validation_step`: fit will not validate.", category=PossibleUserWarning
        )
    if has_step and not has_loader:
        rank_zero_warn(
            f"{name} has a `validation_step`, and there is no validation loader: fit will not validate.", category=PossibleUserWarning
        )
    if not module.automatic_optimization:
        _check_manual(trainer)
    overridden = is_overridden("optimizer_step", module)
    if overridden and trainer.accumulate_grad_batches != 1 and is_overridden("optimizer_zero_grad", module):
        rank_zero_warn(
            "With accumulate_grad_batches > 1, your `optimizer_step` and `optimizer_zero_grad` are called once for each accumulation "
            "window, not once for each batch."
        )


def _check_manual(trainer: Trainer) -> None:
    """The trainer's gradient arguments mean nothing where the user steps the optimizers."""
    for name, value, neutral in (
        ("gradient_clip_val", trainer.gradient_clip_val, None),
        ("accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
    ):
        if value != neutral and not (name == "gradient_clip_val" and value == 0):
            how = "call `self.clip_gradients`" if name == "gradient_clip_val" else "step every n batches"
            raise MisconfigurationException(
                f"`Trainer({name}={value!r})` has no effect in manual optimization. Leave it out, and {how} in `training_step` instead."
            )


def check_optimizers(module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Check the optimizers against the way of optimization.

    Raises:
        RuntimeError: for several optimizers in automatic optimization.
    """
    if module.automatic_optimization and len(optimizers) > 1:
        raise RuntimeError(
            f"`configure_optimizers` returned {len(optimizers)} optimizers, and automatic optimization steps one. "
            "Set `self.automatic_optimization = False` and step them in `training_step`."
        )


def check_state_keys(callbacks: Sequence[Callback]) -> None:
    """Two callbacks must not share the key under which their state is saved.

    Raises:
        RuntimeError: if two do.
    """
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        stateful = is_overridden("state_dict", callback) or is_overridden("on_save_checkpoint", callback)
        if stateful and callback.state_key in seen:
            raise RuntimeError(
                f"Two callbacks of type {type(callback).__name__} have the same state_key {callback.state_key!r}, so one would be restored "
                "with the state of the other. Give them different arguments, or override the property `state_key`."
            )
        if stateful:
            seen[callback.state_key] = callback


def check_storable(trainer: Trainer) -> None:
    """Before training, find hyperparameters that no checkpoint can hold: the first save would fail after hours.

    Raises:
        TypeError: naming the first of them.
    """
    from lightning.fabric.checkpoint.format import find_unstorable

    if not trainer.checkpoint_callbacks or trainer.fast_dev_run:
        return
    for owner in (trainer.lightning_module, trainer.datamodule):
        if owner is None or not owner.hparams:
            continue
        for path, kind, reason in find_unstorable(dict(owner.hparams), "hparams"):
            raise TypeError(
                f"The hyperparameter `{path}` of {type(owner).__name__} is a {kind.__module__}.{kind.__qualname__}, which no checkpoint "
                f"can hold: {reason}. Leave it out with `self.save_hyperparameters(ignore=[...])`, or pass something that can be saved."
            )


def migrated(checkpoint: Any, path: Any) -> dict[str, Any]:
    """The checkpoint in today's form.

    Raises:
        ValueError: if the file holds something else.
    """
    from lightning.pytorch.utilities.migration import migrate_checkpoint

    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        keys = f" with the keys {sorted(map(str, checkpoint))[:8]}" if isinstance(checkpoint, dict) else ""
        held = f"a {type(checkpoint).__name__}{keys}"
        raise ValueError(
            f"The file at {path} is no checkpoint of a trainer: it holds {held}. A checkpoint is a dict with weights under 'state_dict'."
        )
    return migrate_checkpoint(checkpoint)


def check_place(progress: FitProgress, loader: TrainLoader | None) -> None:
    """Refuse to go on in the middle of an epoch that has become shorter than that.

    Raises:
        MisconfigurationException: if it has.
    """
    if loader is None or progress.is_last or progress.batch_idx < loader.num_batches or loader.num_batches == 0:
        return
    # At the very end of an epoch only a loader knows of batches to pass over that was meant to give more.
    if progress.batch_idx > loader.num_batches or loader.passes_over:
        raise MisconfigurationException(
            f"The checkpoint was saved after {progress.batch_idx} batches of an epoch, and an epoch has {int(loader.num_batches)} now: the "
            "data, the batch size or limit_train_batches are others. Resume with those of before; from a checkpoint of the end of an "
            "epoch; or start anew from the weights, by `Model.load_from_checkpoint(path)`."
        )
