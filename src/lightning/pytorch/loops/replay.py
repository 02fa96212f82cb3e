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
        statistics_only: leave out tables and masks: integers and truth values, but for single numbers.
    """

    def __init__(self, modules: Iterable[Module], statistics_only: bool = False) -> None:
        self.modules = [module for module in modules if module._buffers]
        self.statistics_only = statistics_only
        self.copies: list[Tensor] = []
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Copy what is in them now, for :meth:`restore`."""
        self.held = [(module, dict(module._buffers)) for module in self.modules]
        here = self._tensors()
        if [(each.shape, each.dtype, each.device) for each in here] == [(copy.shape, copy.dtype, copy.device) for copy in self.copies]:
            if here:
                torch._foreach_copy_(self.copies, here)
        else:
            self.copies = [buffer.detach().clone() for buffer in here]

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the buffers back, also where a module has put others into their place."""
        for module, held in self.held:
            module._buffers.update(held)
        if self.copies:
            torch._foreach_copy_(self._tensors(), self.copies)

    def _tensors(self) -> list[Tensor]:
        """Those that are kept, each once, as this process has them."""
        from lightning.fabric.strategies.sharding import local_tensor

        found = {buffer: None for _, held in self.held for buffer in held.values() if buffer is not None}
        return [local_tensor(each) for each in found if not self.statistics_only or each.is_floating_point() or each.dim() == 0]


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
