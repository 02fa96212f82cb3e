"""Validation in between changes nothing about training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

EPOCHS = 3


def adamw(net: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.02)


def own_random_numbers(batches: Any, samples: int) -> Any:
    """A loader that leaves the global random state alone, so that a loop with it draws what a loop without it draws."""
    return batches(shuffle=False, samples=samples, generator=torch.Generator().manual_seed(1))


def without_validation(net: Any, loader: Any, optimizer: Any, val_loader: Any) -> list[Tensor]:
    losses = []
    for _ in range(EPOCHS):
        for batch in loader:
            loss = net.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_sanity_val_steps": 0},
        {"num_sanity_val_steps": -1},
        {"val_check_interval": 2},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 7},
        {"inference_mode": False},
    ],
    ids=str,
)
def test_training_with_validation_is_bit_equal_to_training_without(
    parity: Any, batches: Any, Net: Any, Validated: Any, arguments: dict[str, Any]
) -> None:
    runs: list[int] = []

    class Counted(Validated):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            runs.append(batch_idx)
            super().validation_step(batch, batch_idx)

    parity(
        without_validation,
        adamw,
        net=lambda: Net(dropout=0.3),
        module=Counted,
        loader=lambda: own_random_numbers(batches, 44),
        val_loader=lambda: own_random_numbers(batches, 12),
        max_epochs=EPOCHS,
        **arguments,
    )
    assert runs


def test_parity_with_validation_written_out_by_hand(parity: Any, batches: Any, Net: Any, Validated: Any) -> None:
    # Both loaders and dropout draw from the global random state; the sanity check must put back what it drew.
    class DrawsInValidation(Validated):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)
            super().validation_step(batch, batch_idx)

    def by_hand(net: Any, loader: Any, optimizer: Any, val_loader: Any) -> list[Tensor]:
        losses = []
        for _ in range(EPOCHS):
            for batch in loader:
                loss = net.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            net.eval()
            with torch.no_grad():
                for batch in val_loader:
                    torch.rand(3)
                    net.loss(batch)
            net.train()
        return losses

    parity(
        by_hand,
        adamw,
        net=lambda: Net(dropout=0.3),
        module=DrawsInValidation,
        val_loader=lambda: batches(shuffle=False, samples=12),
        max_epochs=EPOCHS,
    )


def test_a_module_in_evaluation_mode_stays_in_it_after_validation(parity: Any, batches: Any, Validated: Any) -> None:
    # Frozen batch norm: its running statistics must not move after a validation run either.
    class Frozen(Validated):  # type: ignore[misc, valid-type]
        def on_train_epoch_start(self) -> None:
            self.net.layers[1].eval()

    def by_hand(net: Any, loader: Any, optimizer: Any, val_loader: Any) -> list[Tensor]:
        net.layers[1].eval()
        return without_validation(net, loader, optimizer, val_loader)

    parity(
        by_hand,
        adamw,
        module=Frozen,
        loader=lambda: own_random_numbers(batches, 44),
        val_loader=lambda: own_random_numbers(batches, 12),
        val_check_interval=2,
        max_epochs=EPOCHS,
    )
