"""A small model, its data, and a hand-written loop over a strategy: what strategies are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning.fabric.strategies.strategy import Strategy

STEPS, SAMPLES = 4, 6  # optimizer steps, and samples in the global batch of each; SAMPLES is a multiple of 2 and 3


class Net(nn.Module):
    """A regression with a layer that only even steps use, if asked for."""

    def __init__(self, skips: bool = False, normalises: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7) if normalises else nn.Identity()
        self.optional = nn.Linear(7, 7)
        self.last = nn.Linear(7, 1)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(batch)))
        if not self.skips or batch_idx % 2 == 0:
            hidden = hidden + self.optional(hidden)
        return (self.last(hidden) - batch.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)  # type: ignore[no-any-return]


def batches(count: int = STEPS) -> list[Tensor]:
    """Global batches, the same in every process."""
    return list(torch.randn(count, SAMPLES, 5, generator=torch.Generator().manual_seed(5)))


def part(batch: Tensor, rank: int, size: int) -> Tensor:
    """The samples of one process."""
    return batch[rank::size]


def train(strategy: Strategy, module: nn.Module, data: list[Tensor], accumulate: int = 1, lr: float = 0.1) -> dict[str, Any]:
    """Train for one epoch, as a trainer would, and return the weights."""
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    optimizer = strategy.setup_optimizer(torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9))
    strategy.optimizers = [optimizer]
    step = strategy.bind("training_step")
    for index, batch in enumerate(data):

        def closure(batch: Tensor = batch, index: int = index) -> Tensor:
            with strategy.precision.forward_context():
                loss: Tensor = step(batch, index)
            if index % accumulate == 0:
                optimizer.zero_grad()
            strategy.backward(loss / accumulate)
            return loss

        if (index + 1) % accumulate == 0:
            strategy.optimizer_step(optimizer, closure)
        else:
            with strategy.no_backward_sync():
                closure()
    return plain(strategy.lightning_module_state_dict())


def plain(state: dict[str, Tensor]) -> dict[str, Any]:
    """Weights as lists, which any process can send."""
    return {name: value.tolist() for name, value in state.items()}


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Between two sets of weights of the same names."""
    assert list(first) == list(second)
    return max(float((torch.tensor(first[name]) - torch.tensor(second[name])).abs().max()) for name in first)
