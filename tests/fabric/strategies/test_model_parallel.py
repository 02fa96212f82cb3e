"""Training over a grid of processes, divided by tensor and by data, gives what one process gives on all of the data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from training import batches, largest_difference, part

from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.sharding import full_tensor, is_dtensor
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

TOLERANCE = 1e-6


class Block(nn.Module):
    """Two layers, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class Network(nn.Module):
    """A block that is always divided, between layers that not every grid divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.block, self.last = nn.Linear(5, 8), nn.LayerNorm(8), Block(), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.norm(self.first(x))))  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - batch.sum(1, keepdim=True)).square().mean()  # type: ignore[no-any-return]


def by_tensor(model: Any, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model.block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model  # type: ignore[no-any-return]


def by_data(model: Any, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])  # type: ignore[no-any-return]


def by_data_in_part(model: Any, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.block, mesh=mesh["data_parallel"])
    return model  # type: ignore[no-any-return]


def by_both(model: Any, mesh: Any) -> nn.Module:
    return by_data(by_tensor(model, mesh), mesh)


def by_both_in_part(model: Any, mesh: Any) -> nn.Module:
    return by_data_in_part(by_tensor(model, mesh), mesh)


def made(size: int, divide: Callable[..., nn.Module] | None = None, **kwargs: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(**kwargs, parallel_devices=[torch.device("cpu")] * size, parallelize_fn=divide)


def full(module: nn.Module) -> dict[str, Any]:
    return {name: full_tensor(parameter.detach()).tolist() for name, parameter in module.named_parameters()}


def train(
    strategy: Any, model: nn.Module, data: list[Tensor], accumulate: int = 1, clip: float | None = None, algorithm: str = "norm"
) -> None:
    """Train for one epoch, as a trainer would."""
    strategy.connect(model)
    strategy.setup_environment()
    strategy.model = strategy.setup_module(model)
    optimizer = strategy.setup_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    step = strategy.bind("training_step")
    for index, batch in enumerate(data):

        def closure(batch: Tensor = batch, index: int = index) -> Tensor:
            with strategy.precision.forward_context():
                loss: Tensor = step(batch, index)
            if index % accumulate == 0:
                optimizer.zero_grad()
            strategy.backward(loss / accumulate)
            if clip is not None and (index + 1) % accumulate == 0:
                strategy.clip_gradients(optimizer, clip, algorithm)
            return loss

        if (index + 1) % accumulate == 0:
            strategy.optimizer_step(optimizer, closure)
        else:
            with strategy.no_backward_sync():
                closure()


def trained(
    rank: int, size: int, grid: tuple[int, int], divide: str, accumulate: int, clip: float | None, algorithm: str
) -> dict[str, Any]:
    strategy = made(size, globals()[divide], data_parallel_size=grid[0], tensor_parallel_size=grid[1])
    model = Network()
    if rank > 0:
        nn.init.zeros_(model.last.weight)  # what is not divided becomes what it is on rank 0
    data = [part(batch, rank // grid[1], grid[0]) for batch in batches()]
    data = [piece for batch in data for piece in batch.split(len(batch) // accumulate)]
    train(strategy, model, data, accumulate, clip, algorithm)
    assert any(is_dtensor(parameter) for parameter in model.parameters())
    return full(model)


def alone(clip: float | None = None, algorithm: str = "norm") -> dict[str, Any]:
    model = Network()
    train(SingleDeviceStrategy(), model, batches(), 1, clip, algorithm)
    return full(model)


@pytest.mark.parametrize(("grid", "divide"), [((1, 2), "by_tensor"), ((2, 1), "by_data"), ((2, 1), "by_data_in_part")])
@pytest.mark.parametrize(("accumulate", "clip", "algorithm"), [(1, None, "norm"), (3, None, "norm"), (1, 0.3, "norm"), (1, 0.05, "value")])
def test_weights_are_those_of_one_process(grid: tuple[int, int], divide: str, accumulate: int, clip: float | None, algorithm: str) -> None:
    weights = run(trained, 2, grid, divide, accumulate, clip, algorithm)
    assert weights[0] == weights[1]
    expected = alone(clip, algorithm)
    assert largest_difference(weights[0], expected) < TOLERANCE
    if clip is not None:
        assert largest_difference(expected, alone()) > 1e-3


@pytest.mark.parametrize(("divide", "accumulate"), [("by_both", 3), ("by_both_in_part", 1), ("by_tensor", 3)])
def test_weights_on_a_grid_of_two_by_two_are_those_of_one_process(divide: str, accumulate: int) -> None:
    weights = run(trained, 4, (2, 2), divide, accumulate, 0.3, "norm")
    assert all(each == weights[0] for each in weights)
    assert largest_difference(weights[0], alone(0.3)) < TOLERANCE
