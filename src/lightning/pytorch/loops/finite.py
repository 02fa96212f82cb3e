"""Losses and gradients that are infinite or no number: noticed before the step that would spoil the weights with them.

What runs in a step stays on the device: one flag for each loss and each gradient. They are read once for an update, where
something has to be decided before it, and else now and then, without waiting for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning.fabric.precision import MixedPrecision
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.replay import Buffers, RandomStates

if TYPE_CHECKING:
    from lightning.pytorch.loops.fit import FitLoop
    from lightning.pytorch.trainer.trainer import Trainer

SMALLEST_SCALE = 2.0**-24  # the smallest float16: with a scale below it, the scaler has halved in vain
SHOWN = 3  # names of parameters in a message
ELSEWHERE = "A loss or a gradient is not finite in another process"
MOST_LOSSES = 1000  # that are kept where no step is seen
LOOK_EVERY = 50  # updates between looks at the flags on a device, where log_every_n_steps says nothing


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is infinite or no number, and ``Trainer(on_nonfinite="error")`` was asked for."""


@dataclass
class Origin:
    """Where a loss comes from: the batch, and the random numbers with which its forward pass began."""

    batch: Any
    batch_idx: int
    states: RandomStates | None


@dataclass
class Update:
    """What was seen on the way to one optimizer step.

    Args:
        epoch: the epoch.
        batch_idx: the batch of the step.
        global_step: how many steps were taken before.
        losses: of each backward pass since the step before: the loss, and where it comes from.
        names: of the parameters whose gradients were looked at, in the order of their flags.
        flags: of each loss and then of each gradient, whether it is finite; a last one may stand for the scale of the fp16
            scaler, or for another process.
    """

    epoch: int
    batch_idx: int
    global_step: int
    losses: list[tuple[Tensor, Origin]]
    names: list[str]
    flags: Tensor


class FiniteWatch:
    """Looks at each loss before its backward pass, and at the gradients before each step.

    Args:
        trainer: whose run is watched.
        loop: the loop of the run.
        policy: ``"error"``, ``"warn"`` or ``"skip"``.

    Raises:
        MisconfigurationException: if the policy cannot be kept.
    """

    def __init__(self, trainer: Trainer, loop: FitLoop, policy: str) -> None:
        self.trainer, self.loop, self.policy = trainer, loop, policy
        strategy = trainer.strategy
        self.device = strategy.root_device
        self.sharded = strategy.forward_is_collective and strategy.world_size > 1
        # With several processes, all of them see the same gradients only where those were averaged before the step.
        self.plain = type(strategy).backward is Strategy.backward
        self.agrees = self.plain and strategy.world_size > 1
        # A loss that is not finite may have finite gradients. Where all must leave out the same update, it spoils them for sure.
        needed = self.agrees or strategy.precision.policy.scaler
        self.poisons = self.plain and needed and policy != "warn"
        automatic = trainer.lightning_module.automatic_optimization
        self.scaler_is_used = strategy.precision.policy.scaler
        averaged = getattr(strategy, "_comm_hook", None) is None  # a hook of the user's may leave each process its own gradients
        self.deferred = policy == "warn" and self.device.type != "cpu"
        told = self.sharded and not self.deferred if policy == "warn" else True  # whether all processes come here at the same update
        self.gathers = self.agrees and told and automatic and averaged and not self.scaler_is_used
        self.losses: list[tuple[Tensor, Origin]] = []
        self.origin = Origin(None, 0, None)
        self.waiting: list[Update] = []
        self.arriving: list[tuple[list[Update], Tensor, Any]] = []
        self.counts = {"loss": 0, "gradient": 0, "scale": 0}
        self.names: dict[Tensor, str] = {}
        self.automatic = automatic
        # What the batches of an update that is left out did to running statistics is undone.
        self.buffers = Buffers(trainer.lightning_module.modules(), statistics_only=True) if policy == "skip" else None
        self.check_policy()

    def check_policy(self) -> None:
        """Refuse what cannot be done.

        Raises:
            MisconfigurationException: for "skip" with optimizers and strategies that step in ways of their own.
        """
        if self.policy != "skip":
            return
        strategy = self.trainer.strategy
        if not self.plain:
            raise MisconfigurationException(
                f"on_nonfinite='skip' cannot leave out updates under {type(strategy).__name__}, which steps in a way of its own. "
                "Give 'error' or 'warn'."
            )
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in strategy.optimizers):
            raise MisconfigurationException(
                "on_nonfinite='skip' cannot leave out an update of LBFGS, which has changed the weights before it asks for the last "
                "gradients of a step. Give 'error' or 'warn'."
            )

    # ---- what a step calls ------------------------------------------------------------------------------------------

    def wrap(self, loop: FitLoop) -> None:
        """Take part in the steps of a loop whose functions were just bound."""
        if self.buffers is not None:
            loop.training_step = self.keeping(loop.training_step, self.buffers)
        if self.automatic and not self.deferred:
            loop.training_step = self.remembering(loop.training_step)
        loop.backward = self.watching(loop.backward)
        loop.unscale = self.checking(loop.unscale)
        self.names = {parameter: name for name, parameter in self.trainer.lightning_module.named_parameters()}

    def remembering(self, training_step: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        """``training_step``, whose batch and random numbers are kept until the update."""

        def step(batch: Any, batch_idx: int) -> Any:
            if self.losses and batch_idx % self.loop.accumulate == 0 and self.losses[-1][1].batch_idx != batch_idx:
                self.check(None)  # an update that did not come by here; its batches must not be kept for ever
            self.origin = Origin(batch, batch_idx, RandomStates(self.device))
            return training_step(batch, batch_idx)

        return step

    def keeping(self, training_step: Callable[[Any, int], Any], buffers: Buffers) -> Callable[[Any, int], Any]:
        """``training_step``, before which buffers are copied if no other batch belongs to the same update."""

        def step(batch: Any, batch_idx: int) -> Any:
            if not self.losses:
                buffers.keep()
            return training_step(batch, batch_idx)

        return step

    def watching(self, backward: Callable[..., None]) -> Callable[..., None]:
        """``backward``, whose loss is looked at before."""

        def run(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            origin = self.origin if self.origin.states is not None else Origin(None, self.loop.progress.batch_idx, None)
            if len(self.losses) >= MOST_LOSSES:
                self.check(None)
            self.losses.append((loss.detach(), origin))
            if self.poisons:
                loss = loss * torch.where(loss.detach().isfinite().all(), 1.0, float("nan")).to(loss.dtype)
            backward(loss, *args, **kwargs)

        return run

    def checking(self, unscale: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``unscale``, after which losses and gradients are checked, and before which nobody has seen them."""

        def check(optimizer: Optimizer) -> None:
            unscale(optimizer)
            self.check(optimizer)

        return check

    def check(self, optimizer: Optimizer | None) -> None:
        """Look at all losses since the last update, and at the gradients that are about to be used.

        Args:
            optimizer: that uses them; None where it is not known, and the update is over.

        Raises:
            NonFiniteError: if one is not finite, and that is to be an error.
        """
        progress, losses = self.loop.progress, self.losses
        self.losses, self.origin = [], Origin(None, 0, None)
        gradients = {} if self.scaler_is_used or optimizer is None else self.gradients(optimizer)
        own = [loss.isfinite().all().to(self.device, non_blocking=True).reshape(1) for loss, _ in losses]
        if gradients:
            own.append(are_finite(list(gradients.values()), self.device))
        if self.scaler_is_used or self.sharded or not own:
            own.append(self.rest(own))
        flags = torch.cat(own)
        update = Update(progress.epoch, progress.batch_idx, progress.global_step, losses, list(gradients), flags)
        if self.deferred:
            self.look_later(update)
        elif not bool(flags.all()):
            self.found(update, flags.tolist(), optimizer)
        if self.buffers is not None and not self.automatic:  # the step may go on to another update
            self.buffers.keep()

    def rest(self, own: list[Tensor]) -> Tensor:
        """A flag for what the others do not tell: the scale of the fp16 scaler, and processes with other parts of the gradients."""
        precision = self.trainer.strategy.precision
        flag = torch.ones(1, dtype=torch.bool, device=self.device)
        if self.scaler_is_used and isinstance(precision, MixedPrecision) and precision.grad_scaler._scale is not None:
            flag = (precision.grad_scaler._scale >= SMALLEST_SCALE).to(self.device).reshape(1)
        if self.sharded and self.agrees and not self.deferred:
            bad = (~torch.cat([*own, flag]).all()).float()
            flag = flag & (self.trainer.strategy.reduce(bad, reduce_op="max") == 0)
        return flag

    def gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The gradients of the optimizer's parameters by name: what this process holds of them."""
        from lightning.fabric.strategies.sharding import local_tensor

        found: dict[str, Tensor] = {}
        for index, parameter in enumerate(parameters_of(optimizer)):
            if parameter.grad is not None:
                found[self.names.get(parameter) or f"parameter number {index} of {type(optimizer).__name__}"] = local_tensor(parameter.grad)
        return found

    # ---- what follows -----------------------------------------------------------------------------------------------

    def found(self, update: Update, flags: list[bool], optimizer: Optimizer | None) -> None:
        """Something is not finite: do what the policy says.

        Raises:
            NonFiniteError: if that is an error.
        """
        kind = self.kind_of(update, flags)
        alone = self.policy == "warn" and not self.gathers
        first = self.counts[kind] == 0 if alone else not any(self.counts.values())
        self.counts[kind] += 1
        if first:
            text = self.describe(kind, update, flags)
            if self.gathers and optimizer is not None:  # all processes are here, at the same update
                text = self.said_by_all(kind, text)
            if self.policy == "error":
                raise NonFiniteError(text)
            self.tell(kind, text)
        if self.policy != "skip" or optimizer is None:
            return
        if not self.scaler_is_used:
            for parameter in parameters_of(optimizer):
                parameter.grad = None  # torch's optimizers leave such parameters, and what they know of them, as they are
        if self.buffers is not None:
            self.buffers.restore()

    def kind_of(self, update: Update, flags: list[bool]) -> str:
        if not all(flags[: len(update.losses)]):
            return "loss"
        return "scale" if self.scaler_is_used else "gradient"

    def tell(self, kind: str, text: str) -> None:
        """Warn: once for all processes where they know of each other, and else from each whose own loss it is."""
        rank = self.trainer.global_rank
        if rank and (self.gathers or (kind != "loss" and not self.sharded)):
            return
        done = "The update is left out." if self.policy == "skip" else "The update is done all the same."
        later = "Further ones are counted, and told at the end."
        warnings.warn(f"{f'Rank {rank}: ' if rank else ''}{text} {done} {later}", RuntimeWarning, stacklevel=2)

    def said_by_all(self, kind: str, text: str) -> str:
        """What all processes say: the text of the one whose loss it is."""
        from lightning.fabric.collectives import gather_object

        texts = gather_object((kind, text))
        for rank, (theirs, words) in enumerate(texts):
            if theirs == "loss":
                return f"Rank {rank}: {words}"
        return next((words for _, words in texts if ELSEWHERE not in words), text)

    def describe(self, kind: str, update: Update, flags: list[bool]) -> str:
        """What is not finite, where, and where that comes from."""
        batch_idx = update.batch_idx
        origin = update.losses[-1][1] if update.losses else None
        if kind == "loss":
            loss, origin = update.losses[flags.index(False)]
            batch_idx = origin.batch_idx
            what = f"The loss is not finite ({_shown(loss)})"
        elif kind == "scale":
            what = f"The fp16 scaler has halved its scale to less than {SMALLEST_SCALE:.1e}, and the gradients still are not finite"
        else:
            bad = [name for name, flag in zip(update.names, flags[len(update.losses) :]) if not flag]
            more = f" and {len(bad) - SHOWN} more of {len(update.names)}" if len(bad) > SHOWN else ""
            names = ", ".join(f"`{name}`" for name in bad[:SHOWN])
            what = f"The loss is finite, and the gradient of {names}{more} is not" if bad else ELSEWHERE
        return f"{what}{self.place(update, batch_idx)}. {self.cause(kind, origin)}"

    @staticmethod
    def place(update: Update, batch_idx: int) -> str:
        return f" in epoch {update.epoch}, batch {batch_idx} (global step {update.global_step})"

    def cause(self, kind: str, origin: Origin | None) -> str:
        """The first module whose output was not finite, found by another forward pass."""
        hint = "`Trainer(detect_anomaly=True)` names the operation."
        if not self.trainer.lightning_module.automatic_optimization:
            return f"In manual optimization no step is run again to find the module. {hint}"
        if origin is None or origin.states is None:
            return 'Its batch is gone, so no module can be named: `Trainer(on_nonfinite="error")` stops in time for that.'
        collective = self.sharded or (self.agrees and any("SyncBatchNorm" in type(m).__name__ for m in self.loop.trainer.model.modules()))
        if collective and not (self.sharded and self.policy == "error"):
            return f"A forward pass needs all processes, so none is run again to find the module. {hint}"
        from lightning.pytorch.loops.nonfinite_search import search

        return search(self.trainer, self.loop, origin, kind, through_strategy=self.sharded)

    # ---- flags that stay on the device ------------------------------------------------------------------------------

    def look_later(self, update: Update) -> None:
        """Keep the flags until it is time to send them to the host; look at those that have arrived there."""
        self.waiting.append(update)
        if len(self.waiting) >= (self.trainer._metrics.every or LOOK_EVERY):
            self.send()
        while self.arriving and (self.arriving[0][2] is None or self.arriving[0][2].query()):
            self.look(*self.arriving.pop(0)[:2])

    def send(self) -> None:
        """Start copying flags to the host."""
        if not self.waiting:
            return
        flags, event = torch.cat([update.flags for update in self.waiting]), None
        if self.device.type == "cuda":
            host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        else:
            host = flags.cpu()
        self.arriving.append((self.waiting, host, event))
        self.waiting = []

    def look(self, updates: list[Update], host: Tensor) -> None:
        """Read flags that have arrived."""
        if bool(host.all()):
            return
        for update, flags in zip(updates, host.split([len(update.flags) for update in updates])):
            if not bool(flags.all()):
                self.found(update, flags.tolist(), None)

    def finish(self) -> None:
        """Look at what is left, and tell how often something was not finite."""
        self.send()
        for updates, host, event in self.arriving:
            if event is not None:
                event.synchronize()
            self.look(updates, host)
        self.arriving, self.losses = [], []
        count = sum(self.counts.values())
        if count > 1 and self.policy != "error" and self.trainer.is_global_zero:
            parts = " and ".join(f"{number} for a {kind}" for kind, number in self.counts.items() if number)
            done = "left out" if self.policy == "skip" else "done"
            warnings.warn(f"{count} updates were {done} that were not finite: {parts}.", RuntimeWarning, stacklevel=2)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def are_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """For each tensor whether all of it is finite, as one tensor on ``device``."""
    flags: list[Tensor | None] = [None] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        values = tensor._values() if tensor.is_sparse else tensor
        values = torch.view_as_real(values) if values.is_complex() else values
        if values.numel() == 0:
            flags[index] = torch.ones((), dtype=torch.bool, device=device)
        else:
            groups.setdefault((values.device, values.dtype), []).append((index, values))
    for (where, _), members in groups.items():
        # Extremes: unlike a sum of squares they overflow only where a value did.
        if where.type == "cpu":  # which has no fast infinity norm
            found = torch.stack([torch.stack(torch.aminmax(values)) for _, values in members]).isfinite().all(1)
        else:
            found = torch.stack(list(torch._foreach_norm([values for _, values in members], float("inf")))).isfinite()
        found = found.to(device, non_blocking=True)
        if len(members) == len(tensors):
            return found
        for (index, _), flag in zip(members, found.unbind()):
            flags[index] = flag
    return torch.stack(flags)  # type: ignore[arg-type]


def _shown(loss: Tensor) -> str:
    return f"{loss.item()}" if loss.numel() == 1 else f"{int((~loss.isfinite()).sum())} of {loss.numel()} elements"
