"""An optimizer whose step is recorded once and replayed: what it must keep on the device, and what may change on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning.pytorch.loops.graph_watch import PLAIN, NotReplayable

NOT_RECORDED = ("params", "lr", "initial_lr")  # of a group: what a replay follows by itself, or does not use
COUNTERS = ("_opt_called", "_step_count", "_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused")


class OptimizerInGraph:
    """Makes an optimizer's step one that can be recorded, and follows its learning rates.

    Its groups get ``fused`` and ``capturable`` where its class has them, and the user has not chosen otherwise, until :meth:`restore`;
    what is saved has the values of before. The learning rate is a constant of the recording or, where schedulers change it, a
    number on the device that each replay reads.

    Args:
        optimizer: whose.
        device: of its parameters.
        scheduled: whether learning rates are expected to change.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, scheduled: bool) -> None:
        self.optimizer, self.device, self.on_device = optimizer, device, scheduled
        self.rates: list[Tensor] = []
        self.last: list[Any] = []  # learning rates as the device has them, or as they were recorded; the user's own tensors as they are
        self.recorded: list[list[tuple[str, Any]]] = []
        self.sizes: list[int] = []
        self.state: Any = None
        self.states = 0  # how many parameters it holds something for
        self.given: list[dict[str, Any]] | None = None  # the flags of each group, as the user gave them
        self.handle: Any = None
        self.scales: Any = None  # whether the optimizer takes a scale itself, as the user made it
        self.first_rates: list[Any] = []

    def prepare(self) -> str:
        """Set the flags, and move step counts to the device; returns what to tell the user.

        Raises:
            NotReplayable: if something is to run at each step that a replay would leave out.
        """
        optimizer = self.optimizer
        if getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(optimizer, "_optimizer_step_post_hooks", None):
            raise NotReplayable(f"{type(optimizer).__name__} has hooks of its step, which a replay would leave out")
        if self.given is None:
            self.given = [{name: group[name] for name in ("fused", "capturable") if name in group} for group in optimizer.param_groups]
            self.handle = optimizer.register_state_dict_post_hook(self.as_given)
            self.scales = vars(optimizer).get("_step_supports_amp_scaling")
            if not self.first_rates:
                self.first_rates = [group["lr"] for group in optimizer.param_groups]
        set_to: set[str] = set()
        for group in optimizer.param_groups:
            plain = all(p.device == self.device and p.is_floating_point() for p in group["params"])
            free = not group.get("foreach") and not group.get("differentiable")
            if "fused" in group and group["fused"] is None and free and plain and self.can_fuse(group):
                group["fused"] = True
                optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
                set_to.add("fused")
            if "capturable" in group and not group["capturable"] and self.device.type == "cuda":
                group["capturable"] = True
                set_to.add("capturable")
        optimizer._warned_capturable_if_run_uncaptured = True
        for state in optimizer.state.values():
            if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(self.device, torch.float32)
        return f"{type(optimizer).__name__} steps with {' and '.join(f'{name}=True' for name in sorted(set_to))}" if set_to else ""

    def can_fuse(self, group: dict[str, Any]) -> bool:
        """Whether ``fused=True`` does what the optimizer does without it. SGD makes its momentum of memory as it is, and leaves it so where
        the first gradients of 16-mixed overflow; zeros give the same first step, but for dampening."""
        if not isinstance(self.optimizer, torch.optim.SGD) or not group["momentum"]:
            return True
        if group["dampening"]:
            return False
        for parameter in group["params"]:
            state = self.optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        return True

    def as_given(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """A state dict of the optimizer with the flags that the user gave it."""
        groups = [{**group, **given} for group, given in zip(state["param_groups"], self.given or [])]
        return {**state, "param_groups": groups + state["param_groups"][len(groups) :]}

    def restore(self) -> None:
        """Give the groups back their flags, and the host the step counts that belong there without them."""
        for group, given in zip(self.optimizer.param_groups, self.given or []):
            group.update(given)
            if not given.get("fused") and not given.get("capturable"):
                for parameter in group["params"]:
                    state = self.optimizer.state.get(parameter, {})
                    if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                        state["step"] = state["step"].cpu()
        if self.handle is not None:
            self.handle.remove()
            if self.scales is None:
                vars(self.optimizer).pop("_step_supports_amp_scaling", None)
            else:
                self.optimizer._step_supports_amp_scaling = self.scales  # type: ignore[attr-defined]
        self.given = self.handle = None

    @property
    def has_other_groups(self) -> bool:
        """Whether groups were added since the flags were set."""
        return self.given is not None and len(self.given) != len(self.optimizer.param_groups)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside of it learning rates that change are those that a replay reads, in single precision: so that the processes that run a
        step end with the same weights as those that replay it."""
        groups = self.optimizer.param_groups
        own = [group["lr"] for group in groups]
        self.on_device = self.on_device or any(
            not isinstance(lr, Tensor) and lr != first for lr, first in zip(own, self.first_rates or own)
        )
        for group in groups if self.on_device else ():
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32).item()
        try:
            yield
        finally:
            for group, lr in zip(groups, own):
                group["lr"] = lr

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside of it the step is recorded: it reads learning rates where each replay finds the current ones."""
        groups = self.optimizer.param_groups
        self.last = [group["lr"] for group in groups]
        self.recorded = [[(name, value) for name, value in group.items() if name not in NOT_RECORDED] for group in groups]
        self.sizes = [len(group["params"]) for group in groups]
        self.state = self.optimizer.state
        if not self.on_device:
            yield
            return
        if len(self.rates) != len(groups):
            self.rates = [torch.zeros((), device=self.device) for _ in groups]
        own = [group["lr"] for group in groups]
        for group, rate, lr in zip(groups, self.rates, self.last):
            if not isinstance(lr, Tensor):
                rate.fill_(lr)
                group["lr"] = rate
        try:
            yield
        finally:
            for group, lr in zip(groups, own):
                group["lr"] = lr

    def recorded_state(self) -> None:
        """A step was recorded, and replayed once."""
        self.states = len(self.optimizer.state)

    def follow(self) -> str | None:
        """Bring the learning rates to the device; returns what has changed that the recording can't follow."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.sizes):
            return "the optimizer's groups"
        if self.optimizer.state is not self.state or len(self.state) != self.states:
            return "the optimizer's state"
        for index, group in enumerate(groups):
            lr = group["lr"]
            last = self.last[index]
            if lr is not last and (isinstance(lr, Tensor) or isinstance(last, Tensor) or lr != last):
                if not self.on_device or not self.rates or isinstance(lr, Tensor) or isinstance(last, Tensor):
                    self.on_device = True
                    return "lr"
                self.last[index] = lr
                self.rates[index].fill_(lr)
            if len(group["params"]) != self.sizes[index]:
                return "the optimizer's parameters"
            for name, value in self.recorded[index]:
                now = group[name]
                if now is not value and now != value:
                    return name
        return None

    def host_state(self) -> dict[str, Any]:
        """What the optimizer keeps on the host, where a replay does not change it."""
        found = {name: value for name, value in vars(self.optimizer).items() if isinstance(value, PLAIN) and name not in COUNTERS}
        for number, state in enumerate(self.optimizer.state.values()):
            for name, value in (state if isinstance(state, dict) else {}).items():
                if isinstance(value, Tensor):
                    found[f"state {name!r} of parameter {number}"] = value._version if value.device != self.device else id(value)
                elif isinstance(value, PLAIN):
                    found[f"state {name!r} of parameter {number}"] = value
        return found
