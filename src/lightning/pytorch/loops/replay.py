"""Run a part of a step once more: with the random numbers that it had, and without leaving a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


class RandomStates:
    """Where the random generators of python, numpy, torch and the device of this process were when this was made.

    Args:
        device: of this process. Its generator's state lies on the host: nothing waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.python = random.getstate()
        self.torch = torch.get_rng_state()
        numpy: Any = sys.modules.get("numpy.random")
        self.numpy = None if numpy is None else numpy.get_state(legacy=False)
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Let the generators continue from there."""
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class Buffers:
    """The buffers of modules, such as the running statistics of batch normalisation, with a copy of what was in them.

    Args:
        modules: whose own buffers, without those of their children.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        self.held = [(module, dict(module._buffers)) for module in modules if module._buffers]
        self.copies = {buffer: buffer.detach().clone() for _, held in self.held for buffer in held.values() if buffer is not None}

    def restore(self) -> None:
        """Bring the buffers back, also where a module has put others into their place."""
        with torch.no_grad():
            for module, held in self.held:
                module._buffers.update(held)
            for buffer, copy in self.copies.items():
                buffer.copy_(copy)


@contextmanager
def without_trace(module: Module, metrics: Any, device: torch.device) -> Iterator[None]:
    """A context in which what runs changes neither random numbers, buffers, Metrics nor what is logged.

    Args:
        module: the user's.
        metrics: of the trainer.
        device: of this process.
    """
    from lightning.pytorch.loops.evaluate import metrics_held

    states, buffers = RandomStates(device), Buffers(module.modules())
    outer = metrics.scope, metrics.batch, metrics.batch_size
    try:
        with metrics.discarding(), metrics_held(module):
            yield
    finally:
        metrics.scope, metrics.batch, metrics.batch_size = outer
        buffers.restore()
        states.restore()


def tensors_in(data: Any) -> list[tuple[str, Tensor]]:
    """All tensors of a nested collection, each with the way to it, such as ``['image'][0]``."""
    from torch.utils._pytree import keystr, tree_flatten_with_path

    return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(data)[0] if isinstance(leaf, Tensor)]
