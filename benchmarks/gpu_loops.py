"""The models that ``gpu.py`` trains, with the loops that one would write for them: step by step, and replayed as a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from models import GPT, TINY, Size
from torch import Tensor, nn

KINDS_OF_BATCHES = 8  # which repeat


class Perceptron(nn.Module):
    """Three layers; its forward returns the loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, batch: Any) -> Tensor:
        """The mean loss of a pair of inputs and classes."""
        x, y = batch
        return F.cross_entropy(self.layers(x), y)


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Args:
        network: makes it; its forward takes a batch and returns the loss.
        batch: makes one, on the host.
        bf16: compute in bfloat16 where autocast does.
        clip: the norm of gradients.
        rate: of learning.
    """

    network: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    bf16: bool
    clip: float | None
    rate: float

    def build(self) -> nn.Module:
        """A network whose weights are the same in each call."""
        if self not in PROTOTYPES:
            torch.manual_seed(0)
            PROTOTYPES[self] = self.network()
        return copy.deepcopy(PROTOTYPES[self])

    def optimizer(self, module: nn.Module, **options: Any) -> torch.optim.Optimizer:
        """The optimizer of a network."""
        return torch.optim.AdamW(module.parameters(), lr=self.rate, fused=True, **options)

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def batches(self, device: torch.device, pinned: bool) -> list[Any]:
        """Some batches: on the device, or in pinned memory of the host.

        Args:
            device: which.
            pinned: leave them on the host.
        """
        generator = torch.Generator().manual_seed(1)
        made = [self.batch(generator) for _ in range(KINDS_OF_BATCHES)]
        if not pinned:
            return [moved(batch, device) for batch in made]
        return [each(batch, Tensor.pin_memory) for batch in made] if device.type == "cuda" else made


def perceptron(tiny: bool) -> Setting:
    """Little to do for a GPU: the time is what the host needs to launch it."""
    width, count = (16, 8) if tiny else (256, 128)

    def batch(generator: torch.Generator) -> Any:
        return torch.randn(count, width, generator=generator), torch.randint(10, (count,), generator=generator)

    return Setting(lambda: Perceptron(width), batch, bf16=False, clip=1.0, rate=1e-4)


def gpt(tiny: bool) -> Setting:
    """A GPT of 6 layers, 512 wide, in bfloat16, on 16 sequences of 256 tokens."""
    size, count = (TINY, 2) if tiny else (Size(layers=6, width=512, heads=8, vocabulary=50304, context=256), 16)

    def batch(generator: torch.Generator) -> Any:
        return (torch.rand(count, size.context + 1, generator=generator).square() * size.vocabulary).long()

    return Setting(lambda: GPT(size), batch, bf16=True, clip=None, rate=3e-4)


PROTOTYPES: dict[Setting, nn.Module] = {}  # drawing the weights of the GPT on one core takes longer than measuring it
SETTINGS: dict[str, Callable[[bool], Setting]] = {"perceptron": perceptron, "GPT": gpt}


def each(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function of each tensor of a batch."""
    return tuple(function(part) for part in batch) if isinstance(batch, (tuple, list)) else function(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on the device."""
    return each(batch, lambda part: part.to(device, non_blocking=True))


class ByHand:
    """The loop that one would write.

    Args:
        setting: what to train.
        device: where.
        options: of the optimizer.
    """

    def __init__(self, setting: Setting, device: torch.device, **options: Any) -> None:
        self.setting, self.device = setting, device
        self.net = setting.build().to(device)
        self.parameters = list(self.net.parameters())
        self.optimizer = setting.optimizer(self.net, **options)

    def step(self, batch: Any) -> Tensor:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        with self.setting.context(self.device):
            loss = self.net(batch)
        loss.backward()
        if self.setting.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.setting.clip)
        self.optimizer.step()
        return loss

    def __call__(self, batches: list[Any]) -> None:
        for batch in batches:
            self.step(moved(batch, self.device))


class Replayed(ByHand):
    """The same steps, recorded as one CUDA graph by hand. On a CPU they run one by one, after the same copies.

    Args:
        setting: what to train.
        device: where.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        super().__init__(setting, device, **({"capturable": True} if device.type == "cuda" else {}))
        first = setting.batches(device, pinned=False)[0]
        self.batch = each(first, Tensor.clone)
        if device.type != "cuda":
            self.replay: Callable[[], Any] = lambda: self.step(self.batch)
            return
        before = [parameter.detach().clone() for parameter in self.parameters]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are chosen, and state is made
                self.step(self.batch)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.step(self.batch)
        with torch.no_grad():  # the steps of before did not count
            for parameter, value in zip(self.parameters, before):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self.replay = graph.replay

    def __call__(self, batches: list[Any]) -> None:
        ours = self.batch if isinstance(self.batch, tuple) else (self.batch,)
        for batch in batches:
            for target, source in zip(ours, batch if isinstance(batch, (tuple, list)) else (batch,)):
                target.copy_(source, non_blocking=True)
            self.replay()


def mean_loss(setting: Setting, net: nn.Module, batches: list[Any], device: torch.device) -> float:
    """The loss over some batches: what training has come to."""
    net.to(device)
    with torch.no_grad(), setting.context(device):
        return sum(net(moved(batch, device)).float().item() for batch in batches) / len(batches)
