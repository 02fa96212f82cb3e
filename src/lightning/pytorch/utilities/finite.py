"""Whether the weights of a model are numbers: what is looked at before a checkpoint is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.pytorch.trainer.states import TrainerStatus

if TYPE_CHECKING:
    import lightning.pytorch as pl

_looked_at: ContextVar[bool] = ContextVar("looked_at", default=False)


def nonfinite_parameter(trainer: pl.Trainer) -> str | None:
    """The name of the first parameter of the trainer's module that holds a NaN or an infinity; None if there is none.

    Buffers are not looked at. All processes must call it, unless the run is failing, and get the same answer: where each holds a part of
    the weights, that of all of them, else that of rank 0. It reads one flag from the device.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    names = [name for name, _ in module.named_parameters()]
    first = _first_nonfinite([parameter for _, parameter in module.named_parameters()])
    if trainer.state.status is not TrainerStatus.INTERRUPTED and strategy.world_size > 1:
        # The order of the parameters is the same everywhere, and so the first of all is the one with the smallest number.
        first = int(strategy.reduce(torch.tensor(first), reduce_op="min")) if strategy.forward_is_collective else strategy.broadcast(first)
    return names[first] if first < len(names) else None


def _first_nonfinite(tensors: list[Tensor]) -> int:
    """The place of the first tensor that holds anything but finite numbers; the number of tensors if there is none."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        held = _held(tensor)
        if held is not None:
            places, group = groups.setdefault((held.device, held.dtype), ([], []))
            places.append(place)
            group.append(held)
    first = len(tensors)
    for places, group in groups.values():
        # Extremes, which are NaN if there is one, and, unlike sums, never overflow: two of them are quick on the CPU, one on GPUs.
        if group[0].device.type == "cpu":
            extremes = torch.stack([extreme for tensor in group for extreme in torch.aminmax(tensor)]).view(-1, 2)
        else:
            extremes = torch.stack(torch._foreach_norm(group, torch.inf)).unsqueeze(1)
        finite = torch.isfinite(extremes).all(1)
        if not bool(finite.all()):
            first = min(first, places[finite.logical_not().nonzero()[0].item()])  # type: ignore[index]
    return first


def _held(tensor: Tensor) -> Tensor | None:
    """What this process holds of a parameter, as plain real numbers; None if that is nothing of the kind."""
    held: Any = getattr(tensor, "ds_tensor", tensor)  # under ZeRO 3
    held = getattr(held, "_local_tensor", held)  # of a DTensor
    if hasattr(held, "__tensor_flatten__") or held.is_meta or held.layout is not torch.strided or held.numel() == 0:
        return None
    held = held.detach()
    if held.is_complex():
        held = torch.view_as_real(held.resolve_conj())
    return held if held.is_floating_point() and held.dtype.itemsize > 1 else None


@contextmanager
def looked_at() -> Iterator[None]:
    """Inside, the weights need not be looked at: that has happened."""
    token = _looked_at.set(True)
    try:
        yield
    finally:
        _looked_at.reset(token)


def has_been_looked_at() -> bool:
    """Whether this is called inside of :func:`looked_at`."""
    return _looked_at.get()
