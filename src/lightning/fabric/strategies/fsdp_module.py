"""A module whose weights are divided among processes with ``fully_shard``: making it, entering it, and leaving it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning.fabric import collectives
from lightning.fabric.strategies.meta_device import children_first
from lightning.fabric.strategies.sharding import distribute_like, is_dtensor, local_tensor

KEY = "_fsdp_root"  # in the dict of a module that is divided


@dataclass
class Plan:
    """How a module is to be divided.

    Args:
        options: for ``fully_shard``: mesh, mp_policy, offload_policy, reshard_after_forward, shard_placement_fn.
        device: the device of this process.
        units: the modules below it whose weights are gathered together, each on its own.
        ignored: parameters that are left alone.
        whole: parameters of which each process keeps all, as modules and names.
        sync: whether all processes begin with the weights of rank 0.
    """

    options: dict[str, Any]
    device: torch.device
    units: list[Module] = field(default_factory=list)
    ignored: set[Parameter] = field(default_factory=set)
    whole: list[tuple[Module, str]] = field(default_factory=list)
    sync: bool = True


def divide(module: Module, plan: Plan) -> None:
    """Divide a module, from its leaves up, one unit at a time: no more than one unit is ever on the device whole.

    Args:
        module: on any device, the ``meta`` device too; parts of it may be divided already.
        plan: how.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    left_alone: Any = plan.ignored | {part._parameters[name] for part, name in plan.whole}
    seen: set[Tensor] = set()
    chosen = {*plan.units, module}
    for part in children_first(module):
        if part in chosen and not isinstance(part, FSDPModule):
            if part is module:
                _to_device(plan.ignored, plan.device, False, seen)
            _to_device([*part.parameters(), *part.buffers()], plan.device, plan.sync, seen)
            fully_shard(part, ignored_params=left_alone, **plan.options)


def _to_device(tensors: Iterable[Tensor], device: torch.device, sync: bool, seen: set[Tensor]) -> None:
    mine = [tensor for tensor in dict.fromkeys(tensors) if tensor not in seen and not is_dtensor(tensor) and not tensor.is_meta]
    seen.update(mine)
    for tensor in mine:
        tensor.data = tensor.data.to(device).contiguous()
    if sync:
        collectives.broadcast_tensors(mine)


# ---- parameters that each process keeps whole -------------------------------------------------------------------------


class WholeParameters:
    """Parameters that are not divided: numbers, which can't be, and those that must keep their dtype in mixed precision.

    While the module computes, it has plain parameters in their places; outside of that they are DTensors like all others,
    which optimizers can step together with them. Both share their memory. Gradients are averaged at the end of backward.

    Args:
        module: whose parameters they are; on their device.
        parameters: which of them: modules and names.
        mesh: of all processes.
    """

    def __init__(self, module: Module, parameters: list[tuple[Module, str]], mesh: Any) -> None:
        from torch.distributed.tensor import DTensor, Replicate

        self.enabled = True  # False keeps gradients local
        self.entered = False
        self._as_dtensor = lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        places: dict[Parameter, list[tuple[dict[str, Any], str]]] = {part._parameters[name]: [] for part, name in parameters}  # type: ignore[misc]
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter in places:
                    places[parameter].append((part._parameters, name))
        self._places = list(places.values())
        self.pairs = [(inner, Parameter(self._as_dtensor(inner.detach()), inner.requires_grad)) for inner in places]
        self._put(1)

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def _put(self, which: int) -> None:
        for pair, places in zip(self.pairs, self._places):
            for store, name in places:
                store[name] = pair[which]

    def enter(self) -> None:
        """Put the plain parameters into the module."""
        if not self.entered and self.pairs:
            for inner, outer in self.pairs:
                inner.data = local_tensor(outer.data)
                inner.requires_grad_(outer.requires_grad)
            self._put(0)
            self.entered = True

    def leave(self) -> None:
        """Put the DTensors into the module."""
        if self.entered:
            self._put(1)
            self.entered = False

    def on_backward_end(self) -> None:
        """Average the gradients, and hand them to the DTensors; every process must call it, or none."""
        if self.enabled:
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        trained = [(inner, outer) for inner, outer in self.pairs if outer.requires_grad]
        if not trained:
            return
        given = [inner.grad is not None for inner, _ in trained]
        grads = [torch.zeros_like(inner) if inner.grad is None else inner.grad for inner, _ in trained]
        wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
        flags = torch.tensor(given, dtype=wide).to(grads[0].device, non_blocking=True)
        # The numbers are few: all of them, and who has which, travel in one message.
        flat = collectives.reduce(torch.cat([*(grad.reshape(-1).to(wide) for grad in grads), flags]))
        parts = flat.split([*(grad.numel() for grad in grads), len(grads)])
        anywhere = given if all(given) else parts[-1].tolist()
        for (inner, outer), grad, part, has in zip(trained, grads, parts, anywhere):
            inner.grad = None
            if has:
                mean = self._as_dtensor(part.view(grad.shape).to(grad.dtype))
                outer.grad = mean if outer.grad is None else outer.grad + mean


# ---- entering ---------------------------------------------------------------------------------------------------------


def root_of(module: Any) -> Root | None:
    """What a module is entered by, if it is divided."""
    return vars(module).get(KEY) if isinstance(module, Module) else None


class Root:
    """Enters a divided module: gathers weights for its forward pass, and has the gradients reduced in the backward pass after it.

    ``fully_shard`` does so for calls of the module. This does it for calls of any function that computes with the module, within
    which calls of the module are plain ones. And it gathers what no unit holds where a submodule is called on its own.

    Args:
        module: divided, and with all of its weights in memory.
        whole: the parameters of it that are not divided.
    """

    def __init__(self, module: Module, whole: WholeParameters) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.module: Any = module
        self.whole = whole
        self._task = -1  # the backward pass whose end is awaited
        self.units: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self.without_value: list[str] = []  # tensors that only a checkpoint can give values to
        self.buffer_dtypes: dict[str, torch.dtype] = {}  # of buffers that compute in another one
        self.busy = False  # a function that computes with the module runs
        self.manual = False  # it runs backward and steps by itself
        self._nested: list[bool] = []
        state = self.state = _state_of(module)
        state._lazy_init()
        self.groups = [group for unit in self.units for group in groups_of(unit)]
        self._own_groups = groups_of(module)
        for group in self.groups:
            if group._orig_dtype is None and group.fsdp_params:  # nothing in it is trained, so far
                first = group.fsdp_params[0]
                group._orig_dtype, group._reduce_dtype = first.orig_dtype, first.reduce_dtype
        owners = {owner for group in self._own_groups for each in group.fsdp_params for owner in _owners(each)}
        self._holds_weights = module in owners
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        module.register_forward_hook(self._after, always_call=True)
        for owner in owners.difference(self.units):
            owner.register_forward_pre_hook(self._before_owner)
            owner.register_forward_hook(self._after_owner)
        vars(module)[KEY] = self

    # -- whatever is called --

    def through(self, function: Callable[..., Any], manual: bool = False) -> Callable[..., Any]:
        """``function`` as it runs with gathered weights.

        Args:
            function: computes with the module; what it returns, or has under ``"loss"``, may be differentiated.
            manual: whether it runs backward and steps optimizers by itself.
        """

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.busy:
                return function(*args, **kwargs)
            if torch.is_inference_mode_enabled():  # weights that were gathered in it could never be trained
                with torch.inference_mode(False), torch.no_grad():
                    return run(*args, **kwargs)
            if manual:
                return self._run_manual(function, args, kwargs)
            self.whole.enter()
            args, kwargs = self.state._pre_forward(self.module, args, kwargs)
            self.busy = True
            try:
                output = function(*args, **kwargs)
            except BaseException:
                self.reset()
                raise
            self.busy = False
            return self._finish(args, output)

        return run

    def _finish(self, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            output = self.state._post_forward(self.module, args, output)
            self.reshard()
            return output
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            self.state._post_forward(self.module, args, None)
            self.reshard()
            return output
        if isinstance(loss, Tensor) and loss._base is not None and loss.requires_grad:
            loss = loss.clone()  # hooks on a view could be lost
        loss = self.state._post_forward(self.module, args, loss)
        self._await_backward(loss)
        if not isinstance(output, Mapping):
            return loss
        if loss is not output["loss"]:
            output = copy.copy(output)
            output["loss"] = loss
        return output

    def _run_manual(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Weights are gathered when a submodule is called, since backward and optimizers come in between.
        self.reshard()
        self.manual = True
        self._gather_held()
        self.whole.enter()
        try:
            return function(*args, **kwargs)
        finally:
            self.manual = False
            self.reshard()

    def before_backward(self, tensor: Any) -> None:
        """In a function that runs backward by itself: a backward pass over ``tensor`` comes."""
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            self.state._register_pre_backward_hook(tensor)
            self._await_backward(tensor)

    def _await_backward(self, output: Any) -> None:
        if not (self.whole or self.manual):
            return
        from torch.utils._pytree import tree_leaves

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._on_backward)

    def _on_backward(self, gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self.whole.on_backward_end()
        if self.manual:
            self._gather_held()
        else:
            self.whole.leave()

    def _gather_held(self) -> None:
        """Gather the weights that the module holds itself, for a function that may use them at any time."""
        if self.manual and self._holds_weights:
            self.module.unshard()

    # -- calls of the module and of its parts --

    def _before(self, module: Module, args: Any, kwargs: Any) -> Any:
        self._nested.append(self.busy or self.manual)
        if self._nested[-1]:
            if self.manual:
                self._gather()
            return None
        self.whole.enter()
        self.busy = True
        return self.state._pre_forward(module, args, kwargs)

    def _after(self, module: Module, args: Any, output: Any) -> Any:
        if not self._nested or self._nested.pop():
            return None
        self.busy = False
        output = self.state._post_forward(module, args, output)
        if torch.is_grad_enabled():
            self._await_backward(output)
        else:
            self.reshard()
        return output

    def _before_owner(self, owner: Module, args: Any) -> None:
        if not self.busy:
            self._gather()

    def _after_owner(self, owner: Module, args: Any, output: Any) -> None:
        if not self.busy and not torch.is_grad_enabled() and not self.manual:
            self.reshard()

    def _gather(self) -> None:
        if any(group.is_sharded for group in self._own_groups):
            self.module.unshard()
        self.whole.enter()

    # -- states --

    def convert_buffers(self, dtype: torch.dtype | None) -> None:
        """Compute with buffers in another dtype, but for the statistics of normalisation; checkpoints hold them in their own."""
        from torch.nn.modules.batchnorm import _NormBase

        for prefix, part in self.module.named_modules():
            for name, buffer in part._buffers.items():
                if dtype is None or buffer is None or not buffer.is_floating_point() or isinstance(part, _NormBase):
                    continue
                self.buffer_dtypes[f"{prefix}.{name}" if prefix else name] = buffer.dtype
                buffer.data = buffer.data.to(dtype)

    def reshard(self) -> None:
        """Let go of whatever is gathered, so that the module's parameters are those that optimizers, checkpoints and callbacks know."""
        for unit in self.units:
            unit.reshard()
        self.whole.leave()

    def before_step(self, *args: Any) -> None:
        """Called before an optimizer changes the weights, of which no gathered copies may be left."""
        for unit in self.units:
            unit.reshard()

    def after_step(self, *args: Any) -> None:
        """Called after an optimizer has changed the weights."""
        self._gather_held()

    def set_gradient_sync(self, enabled: bool) -> None:
        """Whether the next backward pass reduces gradients over processes."""
        for unit in self.units:
            unit.set_requires_gradient_sync(enabled, recurse=False)
        self.whole.enabled = enabled

    def accumulated_gradients(self) -> dict[str, Tensor]:
        """The gradients of an accumulation window that is not over, by name: their mean over processes, divided as the weights are."""
        self.reshard()
        local = {each.sharded_param: _local_gradient(each) for group in self.groups for each in group.fsdp_params}
        local.update({outer: inner.grad for inner, outer in self.whole.pairs})
        found = {}
        for name, parameter in self.module.named_parameters():
            grad = local.get(parameter)
            mean = None if grad is None else distribute_like(collectives.reduce(grad).to(parameter.dtype), parameter)
            total = mean if parameter.grad is None else parameter.grad if mean is None else parameter.grad + mean
            if total is not None:
                found[name] = total
        return found

    def discard_gradients(self) -> None:
        """Forget the gradients of an accumulation window that an earlier run did not finish."""
        for group in self.groups:
            for each in group.fsdp_params:
                each.unsharded_accumulated_grad = None
                if hasattr(each, "_unsharded_param"):
                    each._unsharded_param.grad = None
        for inner, _ in self.whole.pairs:
            inner.grad = None

    def reset(self) -> None:
        """Forget a forward or backward pass that was broken off; nothing waits for another process."""
        self.busy = self.manual = False
        self._nested.clear()
        reset = getattr(self.module, "reset_iter_state", None)
        with suppress(Exception):  # the error that broke it off is the one to be seen
            if reset is not None:
                reset()
            self.reshard()


def _local_gradient(fsdp_param: Any) -> Tensor | None:
    """The gradient, of this process's batches, that was not reduced yet."""
    grad: Tensor | None = fsdp_param.unsharded_accumulated_grad
    return getattr(getattr(fsdp_param, "_unsharded_param", None), "grad", None) if grad is None else grad


def _state_of(unit: Any) -> Any:
    return unit._get_fsdp_state()


def groups_of(unit: Any) -> list[Any]:
    """The parameter groups of a unit. Releases of torch before 2.12 know one at most."""
    state = _state_of(unit)
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [group for group in (state._fsdp_param_group,) if group is not None]


def _owners(fsdp_param: Any) -> list[Module]:
    info = fsdp_param._module_info
    return [info.module, *info.shared_modules]
