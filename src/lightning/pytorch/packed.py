"""The states of very many processes in a checkpoint: each written by the process itself, and read by the one that goes on from it.

With a few processes a checkpoint holds a list of their states. Ten thousand of them would be written by rank 0 for twenty seconds, and read
for ten by each process that wants one of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning.fabric import collectives

MANY = 64  # processes from which on their states are packed


def gather_packed(state: Any) -> dict[str, Tensor] | None:
    """The states of all processes in two tensors, on rank 0; None on the others. All must call it.

    Args:
        state: of this process.
    """
    from lightning.fabric.checkpoint.format import encode

    buffer = io.BytesIO()
    torch.save(encode(state), buffer)
    gathered = collectives.gather_bytes(torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8))
    if gathered is None:
        return None
    data, sizes = gathered
    return {"packed": data, "ends": torch.tensor(sizes).cumsum(0)}


def opened(saved: Any) -> Sequence[Any]:
    """The states of all processes in a checkpoint, by rank, in either form; empty if there are none."""
    if isinstance(saved, dict):
        return PackedStates(saved["packed"], saved["ends"].tolist())
    return saved or ()


class PackedStates(Sequence[Any]):
    """States that are unpacked when they are asked for.

    Args:
        data: their bytes, one after another.
        ends: where each of them ends.
    """

    def __init__(self, data: Tensor, ends: list[int]) -> None:
        self.data = data
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rank: Any) -> Any:
        from lightning.fabric.checkpoint.io import load

        if not -len(self) <= rank < len(self):
            raise IndexError(rank)
        rank %= len(self)
        start = self.ends[rank - 1] if rank else 0
        part = io.BytesIO(self.data[start : self.ends[rank]].cpu().numpy().tobytes())
        return load(part, weights_only=True, map_location="cpu")  # data alone, whoever has written it

    def __iter__(self) -> Iterator[Any]:
        return (self[rank] for rank in range(len(self)))
