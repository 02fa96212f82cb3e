"""Losses and weights are those of a hand-written loop, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

EPOCHS = 3


def plain_loop(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
    losses = []
    for _ in range(EPOCHS):
        for batch in loader:
            loss = net.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD with momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "SGD with Nesterov momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.02),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "fused AdamW": partial(torch.optim.AdamW, lr=0.02, fused=True),
    "AdamW one by one": partial(torch.optim.AdamW, lr=0.02, foreach=False),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_parity_of_optimizer(parity: Any, name: str) -> None:
    parity(plain_loop, lambda net: OPTIMIZERS[name](net.parameters()), max_epochs=EPOCHS)


def test_parity_with_parameter_groups(parity: Any) -> None:
    def configure(net: Any) -> torch.optim.Optimizer:
        decay = [p for p in net.parameters() if p.dim() > 1]
        rest = [p for p in net.parameters() if p.dim() <= 1]
        return torch.optim.AdamW([{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0, "lr": 0.05}], lr=0.02)

    parity(plain_loop, configure, max_epochs=EPOCHS)


def test_parity_with_dropout(parity: Any, Net: Any) -> None:
    parity(plain_loop, lambda net: torch.optim.AdamW(net.parameters(), lr=0.02), net=lambda: Net(dropout=0.4), max_epochs=EPOCHS)


def test_parity_of_lbfgs(parity: Any) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        losses = []
        for _ in range(2):
            for batch in loader:

                def closure(batch: Any = batch) -> Tensor:
                    optimizer.zero_grad()
                    loss: Tensor = net.loss(batch)
                    loss.backward()
                    losses.append(loss.detach())
                    return loss

                optimizer.step(closure)
        assert len(losses) > 2 * 11  # the closure ran more than once in a step
        return losses

    parity(by_hand, lambda net: torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4), max_epochs=2)


def test_parity_of_a_run_bounded_by_steps(parity: Any) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        losses: list[Tensor] = []
        while len(losses) < 15:
            for batch in loader:
                loss = net.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                if len(losses) == 15:
                    break
        return losses

    parity(by_hand, lambda net: torch.optim.SGD(net.parameters(), lr=0.1), max_steps=15)


def test_parity_of_manual_optimization_with_two_optimizers(parity: Any, Trained: Any) -> None:
    class Manual(Trained):  # type: ignore[misc, valid-type]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                loss = self.net.loss(batch)
                self.losses.append(loss.detach())
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    def by_hand(net: Any, loader: Any, optimizers: Any) -> list[Tensor]:
        losses = []
        for _ in range(EPOCHS):
            for batch in loader:
                for optimizer in optimizers:
                    loss = net.loss(batch)
                    losses.append(loss.detach())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return losses

    def configure(net: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.layers[0].parameters(), lr=0.1), torch.optim.Adam(net.layers[4].parameters(), lr=0.02)]

    parity(by_hand, configure, module=Manual, max_epochs=EPOCHS)
