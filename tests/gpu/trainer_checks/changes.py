"""What hooks change between two steps holds for the next one, whether that is replayed, recorded anew, or run as without it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning.pytorch as L

from .common import Check, Place, deterministic
from .compiled import RATE, Task, data_of, same, trained
from .running_ahead import STEP_AND_EPOCH

MIDDLE = 15  # a step in the middle of the second epoch


class Once(L.Callback):
    """Does something before one step.

    Args:
        change: gets trainer and module.
        step: before which.
    """

    def __init__(self, change: Callable[[Any, Any], Any], step: int = MIDDLE) -> None:
        self.change, self.step = change, step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.change(trainer, module)


def halve(trainer: Any, module: Any) -> None:
    """New memory under the same parameters."""
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def reload_optimizer(trainer: Any, module: Any) -> None:
    """New memory for what the optimizer keeps."""
    state = copy.deepcopy(trainer.optimizers[0].state_dict())
    for each in state["state"].values():
        each["exp_avg"].zero_()
    trainer.optimizers[0].load_state_dict(state)


def decay(trainer: Any, module: Any) -> None:
    trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.5


def freeze(trainer: Any, module: Any) -> None:
    module.net[1].weight.requires_grad_(False)
    module.net[1].weight.grad = None


class Gradients(L.Callback):
    """Reads gradients after each step."""

    def __init__(self) -> None:
        self.found: list[Tensor | None] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        gradient = module.net[-1].bias.grad
        self.found.append(None if gradient is None else gradient.clone())


class Replaces(L.Callback):
    """Puts other tensors in the place of gradients, inside of the step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for parameter in module.parameters():
            parameter.grad = parameter.grad * 0.5


class Leaves(L.Callback):
    """Leaves a parameter out of some updates."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step % 3 == 0:
            module.net[-1].bias.grad = None


class Average(L.Callback):
    """Validates with other weights in the place of those that are trained."""

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.kept = [parameter.data for parameter in module.parameters()]
        halve(trainer, module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for parameter, kept in zip(module.parameters(), self.kept):
            parameter.data = kept


class LogsOfHost(Task):
    """Logs a number that nothing on the device knows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.numbers = itertools.count()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("number", float(next(self.numbers)), on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Checkpointed(Task):
    """Computes its activations twice, with the same dropout."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])


class Cycle(Task):
    """Rate and momentum change in each step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, fused=True, capturable=next(self.parameters()).is_cuda)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2.0 ** -(step % 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


VAL: dict[str, Any] = {"val_check_interval": 3}

# What: (module, makes a callback, arguments of the trainer, whether only CUDA shows it)
CHANGES: dict[str, tuple[type[Task], Callable[[], Any] | None, dict[str, Any], bool]] = {
    "a part of the module is set to evaluate": (Task, lambda: Once(lambda trainer, module: module.net.eval()), {}, False),
    "other memory for weights, in mid-epoch": (Task, lambda: Once(halve), {}, False),
    "other memory for weights, at an epoch's start": (Task, lambda: Once(halve, 10), {}, False),
    "other weights while validating": (Task, Average, VAL, False),
    "the optimizer's state is loaded": (Task, lambda: Once(reload_optimizer), {}, False),
    "the optimizer's state is dropped": (Task, lambda: Once(lambda trainer, module: trainer.optimizers[0].state.clear()), {}, False),
    "weight decay": (Task, lambda: Once(decay), {}, False),
    "a weight is frozen": (Task, lambda: Once(freeze, 10), {}, False),
    "gradients read after steps": (Task, Gradients, {}, False),
    "gradients read after steps, validation between": (Task, Gradients, VAL, False),
    "gradients read after steps, accumulation": (Task, Gradients, {"accumulate_grad_batches": 2, **VAL}, False),
    "gradients replaced in a hook": (Task, Replaces, {}, False),
    "gradients replaced in a hook, accumulation": (Task, Replaces, {"accumulate_grad_batches": 2}, False),
    "gradients set to None in a hook": (Task, Leaves, {}, False),
    "a number of the host is logged": (LogsOfHost, None, {}, False),
    "activations are computed twice": (Checkpointed, None, {}, True),
    "rates of each step": (Cycle, None, {}, False),
}


def checks(place: Place) -> list[Check]:
    return [(f"changed between steps: {name}", lambda n=name: followed(place, *CHANGES[n])) for name in CHANGES]


def followed(place: Place, kind: type[Task], make: Callable[[], Any] | None, options: dict[str, Any], needs_cuda: bool) -> str:
    if needs_cuda:
        place.require_cuda()
    runs, watched = [], []
    with deterministic():
        for compile in (None, "step"):
            torch.manual_seed(0)
            module, callbacks = kind(net="mlp", dropout=0.2, log=STEP_AND_EPOCH), [] if make is None else [make()]
            val = data_of(place, 2) if "val_check_interval" in options else None
            runs.append(trained(place, module, data_of(place), compile, val=val, callbacks=callbacks, **options))
            watched.append([getattr(each, "found", []) for each in callbacks])
    same(*runs)
    for theirs, ours in zip(*watched):
        for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            assert (a is None) == (b is None), f"after step {index} a gradient is {'None' if b is None else 'there'}"
            assert a is None or torch.equal(a, b), f"after step {index} a gradient is {b}, in eager mode {a}"
    return f"{runs[1].recordings} recordings, {runs[1].replays} replays" + "".join(f"; {told}" for told in runs[1].told)
