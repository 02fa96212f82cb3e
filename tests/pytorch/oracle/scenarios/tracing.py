"""Models, callbacks and datamodules whose every hook leaves a line: who, which, its arguments, the state of the run."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.core.optimizer import LightningOptimizer

from .base import Plain, loader, plain, trainer

_STARTS = "fit_start fit_end train_start train_end validation_start validation_end test_start test_end predict_start predict_end"
_EPOCHS = "train_epoch_start train_epoch_end validation_epoch_start validation_epoch_end test_epoch_start test_epoch_end"
_EVENTS = {f"on_{event}": "" for event in f"{_STARTS} {_EPOCHS} predict_epoch_start predict_epoch_end".split()}
_BATCHES = {
    "on_train_batch_start": "batch, batch_idx",
    "on_train_batch_end": "outputs, batch, batch_idx",
    **{f"on_{task}_batch_start": "batch, batch_idx, dataloader_idx=0" for task in ("validation", "test", "predict")},
    **{f"on_{task}_batch_end": "outputs, batch, batch_idx, dataloader_idx=0" for task in ("validation", "test", "predict")},
}
_STEPS = {
    "on_before_backward": "loss",
    "on_after_backward": "",
    "on_before_optimizer_step": "optimizer",
    "on_before_zero_grad": "optimizer",
    "on_save_checkpoint": "checkpoint",
    "on_load_checkpoint": "checkpoint",
    "setup": "stage",
    "teardown": "stage",
}
_DATA = {
    "prepare_data": "",
    **{f"{task}_dataloader": "" for task in ("train", "val", "test", "predict")},
    "on_before_batch_transfer": "batch, dataloader_idx",
    "transfer_batch_to_device": "batch, device, dataloader_idx",
    "on_after_batch_transfer": "batch, dataloader_idx",
}
MODULE_HOOKS = {
    **_EVENTS,
    **_BATCHES,
    **_STEPS,
    **_DATA,
    **{f"on_{name}": "" for name in ("validation_model_zero_grad", "validation_model_eval", "validation_model_train")},
    **{f"on_{name}": "" for name in ("test_model_eval", "test_model_train", "predict_model_eval")},
    "configure_callbacks": "",
    "configure_model": "",
    "configure_optimizers": "",
    "training_step": "batch, batch_idx",
    "validation_step": "batch, batch_idx, dataloader_idx=0",
    "test_step": "batch, batch_idx, dataloader_idx=0",
    "predict_step": "batch, batch_idx, dataloader_idx=0",
    "backward": "loss, *args, **kwargs",
    "optimizer_step": "epoch, batch_idx, optimizer, optimizer_closure=None",
    "optimizer_zero_grad": "epoch, batch_idx, optimizer",
    "configure_gradient_clipping": "optimizer, gradient_clip_val=None, gradient_clip_algorithm=None",
    "lr_scheduler_step": "scheduler, metric",
    "state_dict": "*args, **kwargs",
    "load_state_dict": "*args, **kwargs",
}
DATAMODULE_HOOKS = {
    **_DATA,
    "setup": "stage",
    "teardown": "stage",
    "on_exception": "exception",
    "state_dict": "",
    "load_state_dict": "state_dict",
}
CALLBACK_HOOKS = {
    **{
        name: f"trainer, pl_module, {arguments}".rstrip(", ")
        for name, arguments in {**_EVENTS, **_BATCHES, **_STEPS, "on_exception": "exception"}.items()
    },
    "on_sanity_check_start": "trainer, pl_module",
    "on_sanity_check_end": "trainer, pl_module",
    "state_dict": "",
    "load_state_dict": "state_dict",
}

# A hook that most models leave alone because overriding it changes or slows what happens.
_HEAVY = {"backward", "on_validation_model_train", "on_test_model_train", "state_dict", "load_state_dict", "configure_gradient_clipping"}
LIGHT_MODULE_HOOKS = {name: arguments for name, arguments in MODULE_HOOKS.items() if name not in _HEAVY}


# Nothing is computed in these: gradients_where_nothing_is_computed has their facts.
_NO_GRADIENTS_TO_TELL = ("_dataloader", "_model_eval", "_model_train", "_model_zero_grad")


class Trace:
    """The lines, and the trainer and module whose state they show."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.trainer: Trainer | None = None
        self.module: LightningModule | None = None

    def note(self, owner: str, hook: str, arguments: Mapping[str, Any]) -> None:
        facts = [self._tell(name, value) for name, value in arguments.items()]
        mode = "T" if self.module is not None and self.module.training else "-"
        state = "" if hook.endswith(_NO_GRADIENTS_TO_TELL) else ("G" if torch.is_grad_enabled() else "-") + mode
        where = "" if self.trainer is None else f"e{self.trainer.current_epoch} s{self.trainer.global_step} "
        self.lines.append(f"{where}{state:2} {owner}.{hook}({', '.join(fact for fact in facts if fact)})")

    def _tell(self, name: str, value: Any) -> str:
        told = {"batch_idx": "b", "dataloader_idx": "d", "epoch": "epoch"}
        if name in told:
            return f"{told[name]}={value}"
        if name in ("trainer", "pl_module", "args", "kwargs", "scheduler"):
            return ""
        if name == "batch":
            return f"x={_samples(value)}"
        if name == "outputs":
            return f"outputs={_outputs(value)}"
        if name == "loss":
            return f"loss={value.item():.4g}"
        if name == "optimizer":
            return f"optimizer={self._place(value)}{'L' if isinstance(value, LightningOptimizer) else ''}"
        if name == "optimizer_closure":
            return "closure" if callable(value) else "no closure"
        if name == "checkpoint":
            return f"epoch={value['epoch']}, step={value['global_step']}"
        if name in ("state_dict", "exception"):
            return type(value).__name__
        return f"{name}={plain(value) if isinstance(value, Enum) else value}"

    def _place(self, optimizer: Any) -> int:
        assert self.trainer is not None
        groups = [other.param_groups for other in self.trainer.optimizers]
        return next(place for place, other in enumerate(groups) if other is optimizer.param_groups or other == optimizer.param_groups)


def _samples(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return int(batch.flatten()[0])
    if isinstance(batch, Mapping):
        return {key: _samples(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_samples(value) for value in batch]
    return batch


def _outputs(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_outputs(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Tensor):
        return f"tensor{'+graph' if value.requires_grad else ''}"
    return str(value)


def _noted(kind: type, owner: str, hooks: Mapping[str, str], trace: Trace) -> type:
    """A subclass of ``kind`` that overrides each hook: notes the call, then does what ``kind`` does."""
    members: dict[str, Any] = {}

    def call(instance: Any, hook: str, arguments: dict[str, Any]) -> Any:
        trace.note(owner, hook, arguments)
        inherited = getattr(super(made, instance), hook)
        extra = arguments.pop("kwargs", {})
        positional = [item for name, value in arguments.items() for item in (value if name == "args" else [value])]
        return inherited(*positional, **extra)

    for hook, parameters in hooks.items():
        if hook.endswith("_dataloader") and getattr(kind, hook) is getattr(LightningModule, hook):
            continue  # a loader hook that only the base class has says that there is no such data
        names = [part.split("=")[0].strip(" *") for part in parameters.split(",") if part.strip()]
        collected = ", ".join(f"{name!r}: {name}" for name in names)
        head = f"lambda self, {parameters}" if parameters else "lambda self"
        members[hook] = eval(f"{head}: call(self, {hook!r}, {{{collected}}})", {"call": call})
    made = type(kind.__name__, (kind,), members)
    return made


class _PlainCallback(Callback):
    owner = ""

    @property
    def state_key(self) -> str:
        return self.owner

    def state_dict(self) -> dict[str, Any]:
        return {"owner": self.owner}


class _PlainCheckpoint(_PlainCallback, Checkpoint):
    pass


class PlainData(LightningDataModule):
    """The loaders that a traced run uses where it has a datamodule."""

    def train_dataloader(self) -> Any:
        return loader(3)

    def val_dataloader(self) -> Any:
        return loader(2, 100)

    def test_dataloader(self) -> Any:
        return loader(2, 200)

    def predict_dataloader(self) -> Any:
        return loader(2, 300)

    def state_dict(self) -> dict[str, Any]:
        return {"data": 1}


class SGD(torch.optim.SGD):
    """Leaves a line when it steps."""

    def __init__(self, trace: Trace, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trace = trace

    def step(self, closure: Any = None) -> Any:
        self.trace.note("SGD", "step", {"optimizer_closure": closure})
        return super().step(closure)


class Bare(Plain):
    """The model under the traced hooks: SGD with a step decay, no loaders."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.trace, self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Traced(Bare):
    """The same model with the loaders of ``PlainData``."""

    def train_dataloader(self) -> Any:
        return loader(3)

    def val_dataloader(self) -> Any:
        return loader(2, 100)

    def test_dataloader(self) -> Any:
        return loader(2, 200)

    def predict_dataloader(self) -> Any:
        return loader(2, 300)


class Run:
    """A trainer and a traced model, with as many traced callbacks as ``owners`` names, and their common trace.

    ``owners``: "cb..." is an ordinary callback, "ckpt" one of the type Checkpoint, "dm" a datamodule, "heavy" stands
    for the module's hooks that are seldom overridden.
    """

    def __init__(self, owners: str = "cb", model: type[Plain] = Traced, data: type = PlainData, **arguments: Any) -> None:
        self.trace = Trace()
        names = owners.split()
        hooks = MODULE_HOOKS if "heavy" in names else LIGHT_MODULE_HOOKS
        self.model = _noted(model, "module", hooks, self.trace)(self.trace)
        self.data = _noted(data, "dm", DATAMODULE_HOOKS, self.trace)() if "dm" in names else None
        self.trace.module = self.model
        callbacks = [self.callback(name) for name in names if name.startswith(("cb", "ckpt"))]
        arguments["callbacks"] = [*callbacks, *arguments.get("callbacks", [])]
        arguments.setdefault("enable_checkpointing", "ckpt" in names)
        self.trainer = self.trace.trainer = trainer(**{"max_epochs": 1, **arguments})

    def callback(self, name: str) -> Any:
        kind = _PlainCheckpoint if name.startswith("ckpt") else _PlainCallback
        callback = _noted(kind, name, CALLBACK_HOOKS, self.trace)()
        callback.owner = name
        return callback

    def do(self, task: str = "fit", **arguments: Any) -> Run:
        """Run a task; the datamodule, if there is one, brings the data."""
        if self.data is not None:
            arguments["datamodule"] = self.data
        getattr(self.trainer, task)(self.model, **arguments)
        return self

    def facts(self) -> dict[str, Any]:
        """The trace, and how the run ended."""
        return {
            "trace": self.trace.lines,
            "current_epoch": self.trainer.current_epoch,
            "global_step": self.trainer.global_step,
            "weights": plain(self.model.weights),
        }
