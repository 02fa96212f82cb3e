"""What the processes of XLA devices tell each other: the same as :mod:`lightning.fabric.collectives`, carried by torch_xla.

XLA's collectives are parts of programs, and the programs of all processes have to be equal. So a value is computed first
(:func:`~lightning.fabric.strategies.xla_device.sync`), and what is sent to the device then is a program that holds a
collective and nothing else; and layouts are not pinned, for which torch_xla would put the rank of the process into the program.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning.fabric import collectives
from lightning.fabric.strategies.xla_device import as_device_data, current_device, sync
from lightning.fabric.utilities.exceptions import MisconfigurationException

T = TypeVar("T")

OPERATIONS = {"mean": "sum", "sum": "sum", "min": "min", "max": "max", "product": "mul"}


def world_size() -> int:
    """The number of devices, each with a process or thread of its own."""
    import torch_xla.runtime

    return int(torch_xla.runtime.world_size())


def rank() -> int:
    """The number of this process, or thread, among all."""
    import torch_xla.runtime

    return int(torch_xla.runtime.global_ordinal())


def reduce(tensor: Any, op: Any = "mean") -> Any:
    """Return ``tensor`` reduced over all processes; see :func:`lightning.fabric.collectives.reduce`."""
    name = collectives.reduction_name(op)
    if not isinstance(tensor, (Tensor, bool, int, float)):
        return tensor
    import torch_xla.core.xla_model as xm

    value = torch.as_tensor(tensor).detach()
    sent = _on_device(value.to(torch.int64) if value.dtype == torch.bool else value)
    result = _run(lambda: xm.all_reduce(OPERATIONS[name], sent)).to(value.device)
    return result / world_size() if name == "mean" else result


def reduce_named(values: Mapping[str, tuple[Tensor, str]]) -> dict[str, Tensor]:
    """Reduce many values, each with those of the same name; see :func:`lightning.fabric.collectives.reduce_named`."""
    entries = {name: (tensor.detach(), collectives.reduction_name(op)) for name, (tensor, op) in values.items()}
    different = compare({name: f"{op} of {tensor.dtype} {tuple(tensor.shape)}" for name, (tensor, op) in entries.items()})
    if different is not None:
        raise MisconfigurationException(collectives._describe_difference(different))
    buckets: dict[tuple[str, torch.dtype], list[str]] = {}
    for name in sorted(entries):
        tensor, op = entries[name]
        buckets.setdefault((op, tensor.dtype), []).append(name)
    reduced: dict[str, Tensor] = {}
    for (op, _), names in buckets.items():
        tensors = [entries[name][0] for name in names]
        flat = torch.cat([_on_device(tensor).reshape(-1) for tensor in tensors])
        parts = reduce(flat, op).split([tensor.numel() for tensor in tensors])
        reduced.update((name, part.view(old.shape).to(old.device)) for name, old, part in zip(names, tensors, parts))
    sync()
    return {name: reduced[name] for name in entries}


def compare(kinds: Mapping[str, str], details: Any = None) -> list[Any] | None:
    """Find out whether all processes hold the same; see :func:`lightning.fabric.collectives.compare`."""
    text = "\n".join(f"{name}\0{kinds[name]}" for name in sorted(kinds))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    if len(set(gather_bytes(digest))) == 1:
        return None
    return gather_object(dict(kinds) if details is None else details)


# ---- gather, broadcast, wait, agree -----------------------------------------------------------------------------------


def all_gather(tensor: Tensor, sync_grads: bool = False) -> Tensor:
    """Return the tensors of all processes, stacked along a new first dimension.

    Args:
        tensor: of the same shape and dtype in each process.
        sync_grads: let gradients flow back to the process that each part came from.
    """
    if sync_grads and tensor.requires_grad and torch.is_grad_enabled():
        return _AllGather.apply(tensor)  # type: ignore[no-any-return]
    value = _on_device(tensor.detach())
    return _run(lambda: _gathered(value)).to(tensor.device)


def _gathered(tensor: Tensor) -> Tensor:
    import torch_xla.core.xla_model as xm

    sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    return xm.all_gather(sent.unsqueeze(0), pin_layout=False).to(tensor.dtype)  # type: ignore[no-any-return]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _gathered(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        import torch_xla.core.xla_model as xm

        # Each process holds a gradient of every part; those of one part belong together.
        count = gradient.shape[0]
        return xm.reduce_scatter(  # type: ignore[no-any-return]
            xm.REDUCE_SUM, gradient.contiguous(), scale=1.0, scatter_dim=0, shard_count=count, pin_layout=False
        ).squeeze(0)


def gather_bytes(data: bytes) -> list[bytes]:
    """Return what each process has sent, in the order of their ranks."""
    sizes = all_gather(as_device_data(torch.tensor([len(data)]), current_device())).flatten().tolist()
    width = 1 << max(max(sizes) - 1, 0).bit_length()  # few widths, and so few programs
    padded = torch.zeros(width, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
    rows = all_gather(as_device_data(padded, current_device())).cpu().numpy()
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]


def pickled(obj: Any) -> bytes:
    """The object as bytes; what its tensors wait for is computed first."""
    sync()
    return collectives._pickled(obj)


def gather_object(obj: T) -> list[T]:
    """Return the objects of all processes in the order of their ranks."""
    return [pickle.loads(data) for data in gather_bytes(pickled(obj))]


def broadcast(obj: T, src: int = 0) -> T:
    """Return the object of process ``src`` in every process; tensors on its device arrive on that of the receiver."""
    mine = rank() == src
    data = gather_bytes(pickled(obj) if mine else b"")[src]
    return obj if mine else pickle.loads(data)


def broadcast_tensors(tensors: Iterable[Tensor], src: int = 0) -> None:
    """Overwrite each tensor, which is on the device, with that of process ``src``."""
    import torch_xla.core.xla_model as xm

    # Not a product with 0, which is no 0 where memory was left uninitialised.
    is_source = as_device_data(torch.tensor(rank() == src), current_device())
    sync()
    for tensor in tensors:
        target = tensor.detach()
        sent = torch.where(is_source, target, torch.zeros_like(target))
        received = xm.all_reduce(xm.REDUCE_SUM, sent.to(torch.int64) if sent.dtype == torch.bool else sent)
        target.copy_(received)
    sync()


def barrier() -> None:
    """Wait until every process is here, and has computed what was recorded."""
    reduce(1, "sum").item()


def reduce_boolean_decision(decision: bool, all: bool = True) -> bool:
    """Whether all processes, or with ``all=False`` any of them, decided True."""
    return bool(reduce(int(decision), "min" if all else "max").item())


def _on_device(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "xla" else as_device_data(tensor, current_device())


def _run(collective: Any) -> Tensor:
    """Run a collective in a program of its own."""
    sync()
    result: Tensor = collective()
    sync()
    return result
