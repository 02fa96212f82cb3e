"""Tensors of which each process holds a part (``DTensor``): gathering, distributing, clipping and unscaling them.

Everything here takes plain tensors too, alone or among sharded ones, and needs no process group for them.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning.fabric import collectives
from lightning.fabric.checkpoint import sharded
from lightning.fabric.checkpoint.temporary import temporary_name
from lightning.fabric.utilities.cloud_io import local_path

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor; asking does not import them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its own memory, not a copy. Of a plain tensor that is all of it."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def number_of_shards(tensor: Tensor) -> int:
    """How many different parts a tensor is divided into; 1 for one that every process holds whole."""
    if not is_dtensor(tensor):
        return 1
    sizes = tensor.device_mesh.shape
    return math.prod(size for size, placement in zip(sizes, tensor.placements) if _sharded_dim(placement) is not None)


def _sharded_dim(placement: Any) -> int | None:
    """The dimension that a placement divides. Torch's strided sharding is a class of its own in some releases."""
    return getattr(placement, "dim", None)


# ---- gathering and distributing ---------------------------------------------------------------------------------------


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor as a plain one; every process that holds a part must call it. A plain tensor is returned as it is."""
    if not is_dtensor(tensor):
        return tensor
    if tensor.device.type != tensor.device_mesh.device_type:  # parts that were offloaded travel over the network of their mesh
        tensor = cast("DTensor", tensor.to(tensor.device_mesh.device_type))
    with torch.no_grad():
        return tensor.full_tensor()


def full_state(tree: Any, rank0_only: bool = True) -> Any:
    """A structure of dicts, lists and tuples with its sharded tensors gathered, one at a time, to the CPU.

    Every process must call it with the same structure. Values that are not sharded stay as they are.

    Args:
        tree: such as a ``state_dict`` of a module or an optimizer.
        rank0_only: give the values to rank 0 alone; the others get tensors without memory (on the ``meta`` device) in their places.
    """
    keep = not rank0_only or not collectives.is_distributed() or torch.distributed.get_rank() == 0

    def gather(tensor: Tensor) -> Tensor:
        if not is_dtensor(tensor):
            return tensor
        full = full_tensor(tensor.detach())
        return full.cpu() if keep else torch.empty_like(full, device="meta")

    return map_tensors(gather, tree)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same structure of dicts, lists and tuples with ``function`` applied to every tensor; what holds none stays the same object."""
    return sharded.map_tensors(lambda tensor, name: function(tensor), tree)


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of a plain tensor, a view of it, that this process would hold if it were divided as ``like`` is."""
    if not is_dtensor(like):
        return full
    coordinate = like.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"This process is not in the mesh {like.device_mesh}, over which the tensor of shape {tuple(like.shape)} is divided."
        )
    mesh_dims = range(len(like.placements))
    strided = [i for i in mesh_dims if hasattr(like.placements[i], "split_factor")]
    # Strided sharding divides what the mesh's later dimensions have divided already.
    for i in [i for i in mesh_dims if i not in strided] + strided[::-1]:
        dim = _sharded_dim(like.placements[i])
        if dim is not None:
            size = full.size(dim)
            chunk = -(-size // like.device_mesh.size(i))
            start = min(chunk * coordinate[i], size)
            full = full.narrow(dim, start, min(chunk, size - start))
    return full


def distribute_like(full: Tensor, param: Tensor) -> Tensor:
    """A plain tensor, the same in all processes, as a new one that is divided, and lies on the device, as ``param``. Nothing is sent.

    Args:
        full: keeps its dtype.
        param: of the same shape; where it is plain, so is the result.
    """
    if not is_dtensor(param) or is_dtensor(full):
        return full.to(param.device)
    with torch.no_grad():
        result = torch.empty_like(param, dtype=full.dtype, requires_grad=False)
        local_tensor(result).copy_(local_part(full.detach(), param))
    return result


def replicate_like(full: Tensor, param: DTensor) -> Tensor:
    """A plain tensor of any shape, the same in all processes, as one that each process of the mesh of ``param`` holds whole."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    return DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)


class DistributesCopies(TorchFunctionMode):
    """A context in which ``sharded.copy_(plain)`` takes this process's part, so that modules load full weights as they are used to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and is_dtensor(args[0]) and not is_dtensor(args[1]):
            local_tensor(args[0]).copy_(local_part(args[1].expand(args[0].shape), args[0]))
            return args[0]
        return func(*args, **(kwargs or {}))


def load_full_state_dict(module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """``module.load_state_dict`` where the module's parameters may be sharded, and the weights are plain and the same everywhere.

    Args:
        module: whose hooks and overrides take part as ever.
        state_dict: plain tensors, such as a file mapped into memory: only this process's parts of it are read.
        strict: whether all keys must match.

    Raises:
        RuntimeError: if ``strict`` and keys do not match, or shapes differ.
    """
    with DistributesCopies():
        return module.load_state_dict(state_dict, strict=strict)


# ---- optimizers -------------------------------------------------------------------------------------------------------


def full_optimizer_state(optimizer: Optimizer, rank0_only: bool = True) -> dict[str, Any]:
    """The state of an optimizer in torch's plain form, with parameters by number, gathered to the CPU; see :func:`full_state`."""
    return full_state(optimizer.state_dict(), rank0_only)  # type: ignore[no-any-return]


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state in torch's plain form into an optimizer whose parameters may be sharded.

    Args:
        optimizer: gets the state.
        state: its tensors may be plain, sharded, or stand unread in a sharded checkpoint.
    """
    optimizer.load_state_dict(distributed_optimizer_state(optimizer, state))


def distributed_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The same state with each tensor divided as the parameter that it belongs to, and read if it was unread."""
    folders: dict[str, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters))

    def convert(number: Any, value: Any) -> Any:
        parameter = by_number.get(number)
        if not isinstance(value, Tensor) or is_dtensor(value) or parameter is None:
            return value
        name = sharded.stored_name(value)
        if name is not None and value.shape == parameter.shape:
            target = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            return folders.setdefault(value.stored_in, {}).setdefault(name, target)  # type: ignore[attr-defined]
        value = sharded.materialized(value)
        if not is_dtensor(parameter):
            return value
        if value.shape == parameter.shape:
            return distribute_like(value, parameter)
        # A count of steps is a plain number for every parameter; anything larger meets the sharded parameter in computations.
        return value if value.numel() == 1 else replicate_like(value, parameter)

    states = {
        number: {key: convert(number, value) for key, value in each.items()} if isinstance(each, dict) else each
        for number, each in state["state"].items()
    }
    for folder, targets in folders.items():
        sharded.fill(folder, targets)
    return {**state, "state": states}


# ---- sharded checkpoints ----------------------------------------------------------------------------------------------


def save_sharded_checkpoint(checkpoint: dict[str, Any], path: Any) -> None:
    """Write a checkpoint into a directory: every process its parts, and rank 0 the rest. It is there whole, or not at all.

    Args:
        checkpoint: of the same structure in all processes, which all must call this; that of rank 0 counts where they differ.
        path: of the directory, on a disk that all processes see.

    Raises:
        ValueError: for a URL, or a path that not all processes see.
        OSError: or another error in every process, if any of them could not write.
    """
    target = directory_of(path)
    write_sharded_checkpoint(*sharded.split(checkpoint), target)


def directory_of(path: Any) -> str:
    """Where a sharded checkpoint goes.

    Raises:
        ValueError: for a URL.
    """
    target = local_path(path)
    if target is None:
        raise ValueError(
            f"A sharded checkpoint can't be written to {os.fspath(path)!r}: all processes write to one directory of a shared disk. "
            "Give such a path, or use state_dict_type='full', which writes one file to any place."
        )
    return os.path.abspath(target)


def write_sharded_checkpoint(plain: Any, tensors: dict[str, Tensor], target: str, group: Any = None) -> None:
    """Write the two parts of a checkpoint (:func:`~lightning.fabric.checkpoint.sharded.split`) into a directory.

    Args:
        plain: that of rank 0 is written.
        tensors: by name, the same names in all processes, which all must call this.
        target: the directory, an absolute path.
        group: of all processes; None for the one of the run, which nothing else may use at the same time.

    Raises:
        ValueError: for a path that not all processes see.
        OSError: or another error in every process, if any of them could not write.
    """
    name = collectives.broadcast(temporary_name() if _is_rank_zero() else "", group=group)
    folder = os.path.join(os.path.dirname(target), name)
    try:
        on_rank_zero(os.makedirs, folder, group=group)
        if not collectives.reduce_boolean_decision(_appears(folder), group=group):
            raise ValueError(
                f"Not all processes see the directory of {target!r}. A sharded checkpoint needs a disk that all machines share; "
                "with local disks use state_dict_type='full'."
            )
        sharded.write_shards(tensors, folder, group)
        on_rank_zero(sharded.commit, plain, folder, target, group=group)
    except BaseException:
        if os.path.isdir(folder) and _is_rank_zero():
            import shutil

            shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_rank_zero() -> bool:
    return not collectives.is_distributed() or torch.distributed.get_rank() == 0


def _appears(folder: str, patience: float = 10.0) -> bool:
    """Whether a directory is there, or comes to be seen: a network's file system may take a while."""
    deadline = time.monotonic() + patience
    while not os.path.isdir(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def on_rank_zero(action: Callable[..., Any], *args: Any, group: Any = None) -> None:
    """Do something on rank 0 while the others wait for it; its error is raised in all processes."""
    error: Exception | None = None
    if _is_rank_zero():
        try:
            action(*args)
        except Exception as caught:
            error = caught
    told = collectives.broadcast(None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    if told is not None:
        raise OSError(f"Rank 0 failed: {told}")


def load_sharded_state_dict(module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Load weights of which some stand unread in a sharded checkpoint (:func:`~lightning.fabric.checkpoint.sharded.open_sharded`).

    Each process reads its parts of them, and no more.

    Args:
        module: whose parameters may be sharded.
        state_dict: plain tensors and stand-ins.
        strict: whether all keys must match.

    Raises:
        RuntimeError: if ``strict`` and keys do not match, or shapes differ.
    """
    current = module.state_dict()
    folders: dict[str, dict[str, Tensor]] = {}

    def read(value: Tensor, key: str) -> Tensor:
        name, target = sharded.stored_name(value), current.get(key)
        if name is None:
            return value
        if isinstance(target, Tensor) and target.shape == value.shape:
            room = torch.empty_like(target, dtype=value.dtype, requires_grad=False)
        else:  # of a name that the module's own hooks change, or one to be complained of
            room = torch.empty(value.shape, dtype=value.dtype)
        return folders.setdefault(value.stored_in, {}).setdefault(name, room)  # type: ignore[attr-defined]

    complete: Any = copy.copy(state_dict)  # with its attributes: the versions of the modules
    complete.update({key: read(value, key) if isinstance(value, Tensor) else value for key, value in state_dict.items()})
    for folder, targets in folders.items():
        sharded.fill(folder, targets)
    return load_full_state_dict(module, complete, strict)


# ---- gradients --------------------------------------------------------------------------------------------------------


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that are there. One whose sum over processes is still pending is summed first, in its parameter."""
    found = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if is_dtensor(grad) and any(placement.is_partial() for placement in grad.placements):
            from torch.distributed.tensor import Replicate

            grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
            parameter.grad = grad
        found.append(grad)
    return found


def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0, sharded: bool | None = None) -> Tensor:
    """The norm of all tensors together, as if one process held them whole; every process must call it. The device is not read.

    Args:
        tensors: sharded or plain ones; plain ones are taken to be the same in all processes.
        norm_type: the exponent: a positive number, or infinity.
        sharded: whether any is sharded in any process; None if all processes have tensors of the same kinds.

    Returns:
        a plain tensor of no dimensions, at least in float32, with the same value in all processes.

    Raises:
        ValueError: for an exponent that is not positive.
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type} is not known. Accepted: a positive number, or float('inf').")
    greatest = math.isinf(norm_type)
    world = torch.distributed.get_world_size() if collectives.is_distributed() else 1
    tensors = list(tensors)
    if sharded is None:
        sharded = any(is_dtensor(tensor) for tensor in tensors)
    parts = []
    for (device, dtype, share), group in _grouped(tensors, world if sharded else 1).items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(group, norm_type, dtype=wide)])
        parts.append(norms.max() if greatest else norms.pow(norm_type).sum() * share)
    device = _home_of(tensors)
    if parts:
        joined = torch.stack([part.to(device) for part in parts])
        result = joined.max() if greatest else joined.sum()
    else:
        result = torch.zeros((), device=device)
    if sharded:
        # One sum over all processes serves every way of dividing: a part that several hold counts as much less in each.
        result = collectives.reduce(result, "max" if greatest else "sum")
    return result if greatest else result.pow(1.0 / norm_type)


def _grouped(tensors: list[Tensor], world: int) -> dict[tuple[torch.device, torch.dtype, float], list[Tensor]]:
    """The local parts by device, dtype, and by how much the part of one process counts."""
    groups: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = {}
    for tensor in tensors:
        local = local_tensor(tensor)
        if local.numel():
            groups.setdefault((local.device, local.dtype, number_of_shards(tensor) / world), []).append(local)
    return groups


def _home_of(tensors: list[Tensor]) -> torch.device:
    """Where numbers about all tensors are kept: not on the CPU if any of them is elsewhere."""
    devices = [local_tensor(tensor).device for tensor in tensors]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


@torch.no_grad()
def clip_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
    """Scale the gradients by one factor such that their common norm is at most ``max_norm``; every process must call it.

    Args:
        parameters: whose gradients, sharded or plain, are scaled in place.
        max_norm: the largest norm.
        norm_type: the exponent of the norm.
        error_if_nonfinite: raise if the norm is no number; this reads the device.

    Returns:
        the norm before clipping, as :func:`total_norm` does.

    Raises:
        RuntimeError: if ``error_if_nonfinite`` and the norm is infinite or not a number.
    """
    parameters = list(parameters)
    grads = gradients(parameters)
    norm = total_norm(grads, norm_type, sharded=any(is_dtensor(parameter) for parameter in parameters))
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"The norm of the gradients is {norm.item()}, so they can't be clipped. Look for a loss that is not finite, or pass "
            "error_if_nonfinite=False to go on all the same."
        )
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for (device, _, _), group in _grouped(grads, 1).items():
        torch._foreach_mul_(group, factor.to(device))
    return norm


@torch.no_grad()
def clip_value_(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Limit each element of each gradient, sharded or plain, to between ``-clip_value`` and ``clip_value``, in place."""
    for group in _grouped(gradients(parameters), 1).values():
        torch._foreach_clamp_min_(group, -clip_value)
        torch._foreach_clamp_max_(group, clip_value)


# ---- the fp16 scaler --------------------------------------------------------------------------------------------------


def make_scaler_agree(scaler: GradScaler) -> None:
    """Let a scaler unscale sharded gradients, alone or among plain ones, and all processes leave out a step if one of them overflowed.

    A scaler with a way of its own to unscale stays as it is.
    """
    from torch.amp.grad_scaler import GradScaler

    if type(scaler)._unscale_grads_ is GradScaler._unscale_grads_:
        scaler._unscale_grads_ = partial(_unscale_together, scaler)  # type: ignore[method-assign]


def _unscale_together(
    scaler: GradScaler, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
) -> dict[torch.device, Tensor]:
    """What ``GradScaler._unscale_grads_`` does, over local parts, and agreed upon: for each device, whether anything overflowed."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grads = gradients(parameters)
    found: dict[torch.device, Tensor] = {}
    for (device, dtype, _), group in _grouped(grads, 1).items():
        if dtype == torch.float16 and not allow_fp16:
            raise ValueError(
                "The gradients are float16, which can't be unscaled without loss. Keep the parameters in float32 (precision='16-mixed')."
            )
        overflow = found.setdefault(device, found_inf.to(device, copy=True))
        torch._amp_foreach_non_finite_check_and_unscale_(group, overflow, inv_scale.to(device))
    home = _home_of(grads)
    worst = torch.stack([found_inf.to(home), *(each.to(home) for each in found.values())]).max()
    if any(is_dtensor(parameter) for parameter in parameters):
        worst = collectives.reduce(worst, "max")
    return {device: worst.to(device) for device in found} or {home: worst}
