"""What a process has otherwise than rank 0, whose state is that of the checkpoint: callbacks, and buffers that nothing makes equal."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.packed import opened

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

State = dict[str, dict[str, Any]]
KINDS = ("buffers", "callbacks")


def differences(trainer: Trainer, callbacks: dict[str, Any]) -> State:
    """What this process has otherwise than rank 0; all processes must call it.

    Args:
        trainer: whose run.
        callbacks: the states of the callbacks of this process.
    """
    strategy = trainer.strategy
    if strategy.world_size == 1:
        return {}
    own: State = {"buffers": strategy.own_buffers(), "callbacks": callbacks}
    digests = {kind: {name: _digest(value) for name, value in own[kind].items()} for kind in KINDS}
    first = strategy.broadcast(digests)  # in a process that fails its own, which differs from nothing
    found: State = {}
    for kind in KINDS:
        others = {name: own[kind].get(name) for name in first[kind].keys() | own[kind].keys()}
        apart = {name: value for name, value in others.items() if first[kind].get(name) != digests[kind].get(name)}
        if apart:
            found[kind] = move_data_to_device(apart, torch.device("cpu"))
    return found


def found_in(trainer: Trainer, checkpoint: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What the checkpoint holds for this process beside rank 0's; nothing for another number of processes."""
    saved = opened(checkpoint.get("keraunos", {}).get("processes"))
    part = saved[trainer.global_rank] if len(saved) == trainer.world_size else None
    return dict((part or {}).get("apart", {}).get(kind, {}))


def give_back(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Give this process its buffers; callbacks have their states by then."""
    saved = opened(checkpoint.get("keraunos", {}).get("processes"))
    if len(saved) != trainer.world_size:
        names = sorted({name for part in saved if part for kind in part.get("apart", {}).values() for name in kind})
        if names:
            rank_zero_warn(
                f"The checkpoint is from {len(saved)} process(es), which had different states of {names}: those of rank 0 are used "
                f"in all of the {trainer.world_size} of now."
            )
        return
    module = trainer.strategy.lightning_module
    assert module is not None
    with torch.no_grad():
        for name, value in found_in(trainer, checkpoint, "buffers").items():
            if value is not None:
                module.get_buffer(name).copy_(value)


def _digest(value: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    try:
        _feed(found, value)
    except (pickle.PicklingError, TypeError, AttributeError):  # no checkpoint can hold it
        return ""
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _feed(found, key)
            _feed(found, item)
    elif isinstance(value, (list, tuple)):
        found.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _feed(found, item)
    else:
        found.update(pickle.dumps(value))
