"""Training in several processes that talk between the passes of a step, where none of its passes may."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import Module

BUCKET = 2**28  # bytes of buffers that are sent at once


class BetweenPasses:
    """Keeps a module the same in all processes, at the points where it is told to.

    DistributedDataParallel averages gradients while backward runs, which hides the time for it. Passes that are recorded and replayed
    must not talk, so there the mean is taken after backward, of all gradients in one call. The numbers are the same for two processes;
    for more, sums are rounded in another order.

    Args:
        module: on its device, with equal weights in all processes.
        ignored: names of its parameters and buffers that each process has for itself.
        broadcasts: whether buffers become those of rank 0 at the beginning of each accumulation window.
        within_window: whether training goes on in the middle of one.
    """

    def __init__(self, module: Module, ignored: Collection[str] = (), broadcasts: bool = True, within_window: bool = False) -> None:
        self.module, self.ignored, self.broadcasts, self.within_window = module, ignored, broadcasts, within_window
        self.trained = {name: each for name, each in module.named_parameters() if each.requires_grad and name not in ignored}

    def begin_window(self) -> None:
        """To be called before the first forward pass of an accumulation window."""
        self.within_window = True
        buffers = [each for name, each in self.module.named_buffers() if name not in self.ignored] if self.broadcasts else []
        if buffers and torch.distributed.get_world_size() > 1:
            torch.distributed._broadcast_coalesced(everybody(), buffers, BUCKET, 0)

    @torch.no_grad()
    def average(self) -> None:
        """To be called after the last backward pass of an accumulation window.

        Raises:
            RuntimeError: if a parameter has no gradient.
        """
        lacking = [name for name, parameter in self.trained.items() if parameter.grad is None and parameter.requires_grad]
        if lacking:
            raise RuntimeError(
                f"These parameters got no gradient: {', '.join(lacking[:8])}{', ...' * (len(lacking) > 8)}. Each process has to give one "
                "for each of them: leave out what the loss does not depend on, or set its `requires_grad` to False."
            )
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.trained.values():
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce() / torch.distributed.get_world_size()
                torch.distributed.all_reduce(parameter.grad)
            else:
                by_kind.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_kind.values():
            torch._foreach_div_(gradients, torch.distributed.get_world_size())
            everybody().allreduce_coalesced(gradients, torch.distributed.AllreduceCoalescedOptions()).wait()
        self.within_window = False


def everybody() -> torch.distributed.ProcessGroup:
    """The group of all processes."""
    group = torch.distributed.group.WORLD
    assert group is not None
    return group
