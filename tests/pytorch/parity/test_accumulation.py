"""Accumulated gradients are the mean over the batches of their window; the last window of an epoch may be smaller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning.pytorch.callbacks import GradientAccumulationScheduler

EPOCHS = 2


def accumulating(
    net: Any, loader: Any, optimizer: Any, windows: list[int], clip: float | None = None, scheduler: Any = None
) -> list[Tensor]:
    """A hand-written epoch: ``windows`` says how many batches go into each update."""
    losses = []
    source = iter(loader)
    for size in windows:
        optimizer.zero_grad()
        for _ in range(size):
            loss = net.loss(next(source))
            (loss / size).backward()
            losses.append(loss.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert next(source, None) is None
    return losses


def sgd(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("accumulate", "samples", "windows"),
    [(2, 48, [2] * 6), (3, 36, [3] * 3), (2, 44, [2] * 5 + [1]), (3, 44, [3, 3, 3, 2]), (4, 44, [4, 4, 3]), (100, 44, [11])],
    ids=["even 2", "even 3", "last of 1", "last of 2", "last of 3", "longer than the epoch"],
)
def test_parity_of_accumulation(parity: Any, batches: Any, accumulate: int, samples: int, windows: list[int]) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        return [loss for _ in range(EPOCHS) for loss in accumulating(net, loader, optimizer, windows)]

    parity(by_hand, sgd, loader=lambda: batches(samples=samples), accumulate_grad_batches=accumulate, max_epochs=EPOCHS)


def test_parity_of_accumulation_with_limited_batches(parity: Any) -> None:
    class FirstFive:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            for _, batch in zip(range(5), self.loader):
                yield batch

    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        return [loss for _ in range(EPOCHS) for loss in accumulating(net, FirstFive(loader), optimizer, [3, 2])]

    parity(by_hand, sgd, accumulate_grad_batches=3, limit_train_batches=5, max_epochs=EPOCHS)


def test_parity_of_accumulation_over_a_stream_whose_length_is_not_known(parity: Any) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.data = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(10)]

        def __iter__(self) -> Iterator[Any]:
            yield from self.data

    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        return [loss for _ in range(EPOCHS) for loss in accumulating(net, loader, optimizer, [4, 4, 2])]

    parity(by_hand, sgd, loader=lambda: DataLoader(Stream(), batch_size=None), accumulate_grad_batches=4, max_epochs=EPOCHS)


def test_parity_of_accumulation_that_changes_with_the_epoch(parity: Any) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        losses = accumulating(net, loader, optimizer, [1] * 11)
        losses += accumulating(net, loader, optimizer, [4, 4, 3])
        return losses + accumulating(net, loader, optimizer, [2] * 5 + [1])

    parity(by_hand, sgd, callbacks=GradientAccumulationScheduler({1: 4, 2: 2}), max_epochs=3)


def test_parity_of_accumulation_with_clipping(parity: Any) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        return [loss for _ in range(EPOCHS) for loss in accumulating(net, loader, optimizer, [3, 3, 3, 2], clip=0.2)]

    parity(by_hand, sgd, accumulate_grad_batches=3, gradient_clip_val=0.2, max_epochs=EPOCHS)


def test_parity_of_accumulation_with_a_scheduler_per_step(parity: Any) -> None:
    def configure(net: Any) -> Any:
        optimizer = sgd(net)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=4 * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def by_hand(net: Any, loader: Any, configured: Any) -> list[Tensor]:
        optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        return [loss for _ in range(EPOCHS) for loss in accumulating(net, loader, optimizer, [3, 3, 3, 2], scheduler=scheduler)]

    parity(by_hand, configure, accumulate_grad_batches=3, max_epochs=EPOCHS)


def test_parity_of_accumulation_with_validation_inside_the_windows(parity: Any, batches: Any, Validated: Any) -> None:
    # A run over the validation data in the middle of a window must leave the gradients collected so far alone.
    def by_hand(net: Any, loader: Any, optimizer: Any, val_loader: Any) -> list[Tensor]:
        losses = []
        for _ in range(EPOCHS):
            for index, batch in enumerate(loader):
                size = 3 if index < 9 else 2
                if index % 3 == 0:
                    optimizer.zero_grad()
                loss = net.loss(batch)
                (loss / size).backward()
                losses.append(loss.detach())
                if index % 3 == 2 or index == 10:
                    optimizer.step()
                if index % 2 == 1:
                    iter(val_loader)  # a loader draws a number when it starts
        return losses

    parity(
        by_hand, sgd, module=Validated, val_loader=lambda: batches(shuffle=False, samples=8), accumulate_grad_batches=3,
        val_check_interval=2, num_sanity_val_steps=0, max_epochs=EPOCHS,
    )  # fmt: skip
