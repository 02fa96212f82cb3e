"""FSDPStrategy on the CPU, and its results as plain numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.fsdp_module import root_of
from lightning.fabric.strategies.sharding import full_state
from lightning.fabric.strategies.strategy import Strategy


def fsdp(size: int, **kwargs: Any) -> FSDPStrategy:
    """A strategy in whose units are single layers, unless another policy is given."""
    return FSDPStrategy(parallel_devices=[torch.device("cpu")] * size, **{"auto_wrap_policy": {nn.Linear}, **kwargs})


def set_up(strategy: Strategy, module: nn.Module, optimizer: Any = torch.optim.SGD, **kwargs: Any) -> torch.optim.Optimizer:
    """Set up a module and an optimizer as a trainer would."""
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    strategy.optimizers = strategy.wrap_optimizers([optimizer(module.parameters(), **kwargs)], [])
    return strategy.optimizers[0]


def fit(
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    data: list[Tensor],
    accumulate: int = 1,
    clip: tuple[float, str] | None = None,
) -> list[float]:
    """Train as a trainer would; the losses."""
    step = strategy.bind("training_step")
    losses = []
    for index, batch in enumerate(data):

        def closure(batch: Tensor = batch, index: int = index) -> Tensor:
            with strategy.precision.forward_context():
                output = step(batch, index)
            loss: Tensor = output["loss"] if isinstance(output, dict) else output
            if index % accumulate == 0:
                optimizer.zero_grad()
            strategy.backward(loss / accumulate)
            if clip is not None and (index + 1) % accumulate == 0:
                strategy.clip_gradients(optimizer, *clip)
            losses.append(loss.item())
            return loss

        if (index + 1) % accumulate == 0:
            strategy.optimizer_step(optimizer, closure)
        else:
            with strategy.no_backward_sync():
                closure()
    return losses


def weights(strategy: Strategy) -> dict[str, Any]:
    """The whole weights, in every process, as lists."""
    assert strategy.module is not None
    if (root := root_of(strategy.module)) is not None:
        root.reshard()
    return {name: value.tolist() for name, value in full_state(strategy.module.state_dict(), rank0_only=False).items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer, in every process, as lists by number and name."""
    state = full_state(optimizer.state_dict(), rank0_only=False)["state"]
    return {
        f"{number}.{name}": value.tolist() if isinstance(value, Tensor) else value
        for number, values in state.items()
        for name, value in values.items()
        if value is not None
    }
