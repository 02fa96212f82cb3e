"""What processes tell each other: reduce, gather, broadcast, wait, agree.

Every function is safe to call in a run of one process, where it returns what it was given.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning.fabric.utilities.distributed import _distributed_is_initialized as is_distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = [
    "all_gather",
    "barrier",
    "broadcast",
    "broadcast_tensors",
    "compare",
    "gather_bytes",
    "gather_object",
    "host_device",
    "is_distributed",
    "reduce",
    "reduce_boolean_decision",
    "reduce_named",
]

T = TypeVar("T")

REDUCTIONS = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max", "product": "product"}
SHOWN_RANKS = 8  # an error message names no more ranks than these, nor more names for each


def reduce(tensor: Any, op: Any = "mean", group: Any = None) -> Any:
    """Return ``tensor`` reduced over all processes; the one that was given stays as it is, and no gradient flows.

    Args:
        tensor: a tensor of the same shape and dtype in each process, or a number.
        op: ``"mean"`` (or ``"avg"``), ``"sum"``, ``"min"``, ``"max"``, ``"product"``, in any case, or a ``torch.distributed.ReduceOp``.
            The mean of integers is a float.
        group: the processes; None for all.

    Raises:
        ValueError: for another ``op``.

    Example::

        >>> reduce(torch.tensor(3.0), "sum")  # of one process
        tensor(3.)
    """
    name = reduction_name(op)
    if not is_distributed() or not isinstance(tensor, (Tensor, bool, int, float)):
        return tensor
    value = torch.as_tensor(tensor).detach()
    result = _on_served_device(value, group).to(torch.int64 if value.dtype == torch.bool else value.dtype, copy=True).contiguous()
    torch.distributed.all_reduce(result, _native_op(name), group=group)
    result = result.to(value.device)
    return result / torch.distributed.get_world_size(group) if name == "mean" else result


def reduction_name(op: Any) -> str:
    """The canonical name of a reduction.

    Raises:
        ValueError: if there is none for ``op``.

    Example::

        >>> reduction_name("AVG")
        'mean'
    """
    # A ReduceOp prints as <RedOpType.SUM: 0>, and has no other name.
    text = op if isinstance(op, str) else getattr(op, "name", None) or str(op).rpartition(".")[2].partition(":")[0]
    try:
        return REDUCTIONS[text.lower()]
    except KeyError:
        raise ValueError(
            f"reduce_op={op!r} is not known. Accepted: {', '.join(map(repr, REDUCTIONS))}, or a torch.distributed.ReduceOp of these names."
        ) from None


def _native_op(name: str) -> Any:
    op = torch.distributed.ReduceOp
    return {"mean": op.SUM, "sum": op.SUM, "min": op.MIN, "max": op.MAX, "product": op.PRODUCT}[name]


# ---- by name ----------------------------------------------------------------------------------------------------------


def reduce_named(values: Mapping[str, tuple[Tensor, str]], group: Any = None) -> dict[str, Tensor]:
    """Reduce many values at once, each with the values of the same name in the other processes.

    All processes call it, also with nothing. It takes one small gather, to find out whether they hold the same names,
    then one all-reduce for each pair of operation and dtype.

    Args:
        values: for each name a tensor and how to reduce it, as in :func:`reduce`.
        group: the processes; None for all.

    Returns:
        the reduced tensors under the names in the order given, detached.

    Raises:
        MisconfigurationException: in every process, if they don't hold the same names, or not the same shape, dtype or
            reduction under a name.

    Example::

        >>> reduce_named({"loss": (torch.tensor(2.0), "mean"), "count": (torch.tensor(5), "sum")})
        {'loss': tensor(2.), 'count': tensor(5)}
    """
    entries = {name: (tensor.detach(), reduction_name(op)) for name, (tensor, op) in values.items()}
    if not is_distributed():
        return {name: tensor for name, (tensor, _) in entries.items()}
    _check_same_names({name: f"{op} of {tensor.dtype} {tuple(tensor.shape)}" for name, (tensor, op) in entries.items()}, group)
    buckets: dict[tuple[str, torch.dtype], list[str]] = {}
    for name in sorted(entries):
        tensor, op = entries[name]
        buckets.setdefault((op, tensor.dtype), []).append(name)
    reduced: dict[str, Tensor] = {}
    for (op, _), names in buckets.items():
        tensors = [entries[name][0] for name in names]
        device = _on_served_device(tensors[0], group).device
        flat = torch.cat([tensor.to(device).reshape(-1) for tensor in tensors])
        parts = reduce(flat, op, group).split([tensor.numel() for tensor in tensors])
        reduced.update((name, part.view(old.shape).to(old.device)) for name, old, part in zip(names, tensors, parts))
    return {name: reduced[name] for name in entries}


def compare(kinds: Mapping[str, str], details: Any = None, group: Any = None) -> list[Any] | None:
    """Find out whether all processes hold the same; every one of them must call it.

    It takes one all-reduce of two numbers, however many processes there are; only where something differs is more exchanged.

    Args:
        kinds: names, each with what must be equal.
        details: what to tell the others where something differs; None for ``kinds``.
        group: the processes; None for all.

    Returns:
        None if all hold the same, else the details of all processes in the order of their ranks.

    Example::

        >>> compare({"loss": "mean"}) is None  # of one process
        True
    """
    if not is_distributed():
        return None
    text = "\n".join(f"{name}\0{kinds[name]}" for name in sorted(kinds))
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    extremes = torch.tensor([number, -number], device=host_device(group))
    torch.distributed.all_reduce(extremes, _native_op("min"), group=group)
    least, greatest = extremes.tolist()
    return gather_object(dict(kinds) if details is None else details, group) if least != -greatest else None


def _check_same_names(kinds: dict[str, str], group: Any) -> None:
    different = compare(kinds, None, group)
    if different is not None:
        raise MisconfigurationException(_describe_difference(different))


def _describe_difference(kinds: list[dict[str, str]]) -> str:
    everywhere = set.intersection(*(set(names) for names in kinds))
    somewhere = set.union(*(set(names) for names in kinds))
    lacking = [(rank, sorted(somewhere - set(names))) for rank, names in enumerate(kinds) if somewhere - set(names)]
    lines = [
        f"rank {rank} has no {', '.join(map(repr, missing[:SHOWN_RANKS]))}{' ...' if len(missing) > SHOWN_RANKS else ''}"
        for rank, missing in lacking[:SHOWN_RANKS]
    ]
    if len(lacking) > SHOWN_RANKS:
        lines.append(f"{len(lacking) - SHOWN_RANKS} more ranks lack some")
    for name in sorted(everywhere):
        first = kinds[0][name]
        other = next((rank for rank, names in enumerate(kinds) if names[name] != first), None)
        if other is not None:
            lines.append(f"{name!r} is the {first} on rank 0 and the {kinds[other][name]} on rank {other}")
    return (
        f"The processes hold different values to reduce: {'; '.join(lines)}. Log the same names in the same way in every process, in every "
        "branch of the code, or log with sync_dist=False what only some of them have."
    )


# ---- gather, broadcast, wait, agree -----------------------------------------------------------------------------------


def all_gather(tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
    """Return the tensors of all processes, stacked along a new first dimension; in a run of one process the tensor itself.

    Args:
        tensor: of the same shape and dtype in each process.
        group: the processes; None for all.
        sync_grads: let gradients flow back to the process that each part came from.

    Example::

        >>> all_gather(torch.ones(2)).shape  # of one process
        torch.Size([2])
    """
    if not is_distributed():
        return tensor
    if sync_grads and tensor.requires_grad and torch.is_grad_enabled():
        return _AllGather.apply(tensor, group)  # type: ignore[no-any-return]
    return _all_gather(tensor.detach(), group)


def _all_gather(tensor: Tensor, group: Any) -> Tensor:
    sent = _on_served_device(tensor, group).contiguous()
    world = torch.distributed.get_world_size(group)
    gathered = sent.new_empty((world * sent.numel(),))
    _gather_into()(gathered, sent.view(-1), group=group)
    return gathered.view(world, *tensor.shape).to(tensor.device)


def _gather_into() -> Any:
    # torch 2.13 renamed it, and warns of the old name.
    return getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each process holds a gradient of every part; those of one part belong together.
        summed = reduce(gradient, "sum", ctx.group)
        return summed[torch.distributed.get_rank(ctx.group)], None


def broadcast(obj: T, src: int = 0, group: Any = None) -> T:
    """Return the object of process ``src`` in every process.

    Args:
        obj: anything that can be pickled. Tensors on a device arrive on the receiver's own device.
        src: the global rank of the process whose object it is.
        group: the processes; None for all.
    """
    if not is_distributed():
        return obj
    device = host_device(group)
    if torch.distributed.get_rank() == src:
        data = torch.frombuffer(bytearray(_pickled(obj)), dtype=torch.uint8).to(device)
        size = torch.tensor(data.numel(), device=device)
        torch.distributed.broadcast(size, src, group=group)
        torch.distributed.broadcast(data, src, group=group)
        return obj
    size = torch.tensor(0, device=device)
    torch.distributed.broadcast(size, src, group=group)
    data = torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(data, src, group=group)
    return pickle.loads(data.cpu().numpy().tobytes())  # type: ignore[no-any-return]


def gather_object(obj: T, group: Any = None) -> list[T]:
    """Return the objects of all processes in the order of their ranks.

    Example::

        >>> gather_object("here")  # of one process
        ['here']
    """
    if not is_distributed():
        return [obj]
    device = host_device(group)
    data = torch.frombuffer(bytearray(_pickled(obj)), dtype=torch.uint8).to(device)
    sizes = _all_gather(torch.tensor(data.numel(), device=device), group).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    rows = _all_gather(padded, group).cpu().numpy()
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def gather_bytes(data: Tensor, dst: int = 0, group: Any = None) -> tuple[Tensor, list[int]] | None:
    """Bring the bytes of all processes to one of them; every one must call it.

    Args:
        data: bytes on the host, as many as each process has.
        dst: the global rank of the process that gets them.
        group: the processes; None for all.

    Returns:
        there the bytes of all, one after another in the order of their ranks, and the size of each; None in the other processes.
    """
    if not is_distributed():
        return data, [data.numel()]
    device = host_device(group)
    sizes = _all_gather(torch.tensor(data.numel(), device=device), group).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data.to(device)
    receives = torch.distributed.get_rank() == dst
    rows = list(padded.new_empty((len(sizes), padded.numel()))) if receives else None
    torch.distributed.gather(padded, rows, dst, group=group)
    return (torch.cat([row[:size] for row, size in zip(rows, sizes)]).cpu(), sizes) if rows is not None else None


class _Pickler(pickle.Pickler):
    """Sends tensors without the index of the device that they are on, which would be another process's device."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.device.type not in ("cpu", "meta"):
            return _on_own_device, (obj.detach().cpu(), obj.device.type, obj.requires_grad)
        return NotImplemented


def _pickled(obj: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    return buffer.getvalue()


def _on_own_device(tensor: Tensor, device_type: str, requires_grad: bool) -> Tensor:
    return tensor.to(device_type).requires_grad_(requires_grad)  # without an index: this process's current device


def broadcast_tensors(tensors: Iterable[Tensor], src: int = 0, group: Any = None) -> None:
    """Overwrite each tensor with that of process ``src``.

    Args:
        tensors: the same number of them, with the same shapes and dtypes, in each process.
        src: the global rank of the process whose tensors they become.
        group: the processes; None for all.
    """
    if not is_distributed():
        return
    pending: list[tuple[Any, Tensor, Tensor]] = []
    for tensor in tensors:
        target = tensor.detach()
        sent = _on_served_device(target, group).contiguous()
        pending.append((torch.distributed.broadcast(sent, src, group=group, async_op=True), sent, target))
    for work, sent, target in pending:
        work.wait()
        if sent is not target:
            target.copy_(sent)


def barrier(group: Any = None) -> None:
    """Wait until every process is here. Work that was queued on a GPU may still run."""
    if is_distributed():
        # An all-reduce of one number on the host, where the group has a backend for it, doesn't wait for the GPU.
        torch.distributed.all_reduce(torch.zeros(1, device=host_device(group)), group=group)


def reduce_boolean_decision(decision: bool, all: bool = True, group: Any = None) -> bool:
    """Whether all processes, or with ``all=False`` any of them, decided True.

    Example::

        >>> reduce_boolean_decision(True)  # of one process
        True
    """
    if not is_distributed():
        return bool(decision)
    vote = torch.tensor(int(decision), device=host_device(group))
    torch.distributed.all_reduce(vote, _native_op("min" if all else "max"), group=group)
    return bool(vote.item())


# ---- where ------------------------------------------------------------------------------------------------------------


def host_device(group: Any = None) -> torch.device:
    """Where numbers travel that Python reads: the CPU if the group has a backend for it, else the current device."""
    served = _served_devices(group)
    if "cpu" in served or not served:
        return torch.device("cpu")
    return torch.device(served[0], torch.get_device_module(served[0]).current_device())


def _served_devices(group: Any) -> list[str]:
    config: str = torch.distributed.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    return [entry.partition(":")[0] for entry in config.split(",") if ":" in entry]


def _on_served_device(tensor: Tensor, group: Any) -> Tensor:
    """The tensor itself, or a copy on a device that the group has a backend for."""
    served = _served_devices(group)
    return tensor if not served or tensor.device.type in served else tensor.to(host_device(group))
