"""Batches reach the model as their loaders make them, in the same order and with the same random state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning.pytorch.utilities import CombinedLoader

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


def sgd(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def test_parity_with_a_generator_of_the_loader(parity: Any, batches: Any) -> None:
    parity(plain_loop, sgd, loader=lambda: batches(generator=torch.Generator().manual_seed(5)), max_epochs=EPOCHS)


def test_parity_with_dropped_last_batch(parity: Any, batches: Any) -> None:
    parity(plain_loop, sgd, loader=lambda: batches(samples=42, drop_last=True), max_epochs=EPOCHS)


def test_parity_with_uneven_last_batch(parity: Any, batches: Any) -> None:
    parity(plain_loop, sgd, loader=lambda: batches(samples=43), max_epochs=EPOCHS)


def test_parity_with_a_worker_process(parity: Any, batches: Any) -> None:
    parity(plain_loop, sgd, loader=lambda: batches(num_workers=1), max_epochs=EPOCHS)


def test_parity_with_dict_batches(parity: Any) -> None:
    def loader() -> Any:
        data = [{"x": torch.randn(6), "y": torch.randint(3, ())} for _ in range(44)]
        return DataLoader(data, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    parity(plain_loop, sgd, loader=loader, max_epochs=EPOCHS)


def test_parity_with_random_augmentation_in_the_collate_function(parity: Any) -> None:
    def noisy(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(part) for part in zip(*samples))
        return x + torch.randn_like(x), y

    def loader() -> Any:
        data = [(torch.randn(6), torch.randint(3, ())) for _ in range(20)]
        return DataLoader(data, batch_size=4, shuffle=True, collate_fn=noisy)  # type: ignore[arg-type]

    parity(plain_loop, sgd, loader=loader, max_epochs=EPOCHS)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Batches drawn anew in each epoch."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(7):
            yield torch.randn(4, 6), torch.randint(3, (4,))


def test_parity_with_a_stream_read_one_batch_ahead(parity: Any) -> None:
    # The network draws nothing: the stream's numbers are the only ones, so that fetching ahead cannot change their order.
    parity(plain_loop, sgd, loader=lambda: DataLoader(Stream(), batch_size=None), max_epochs=EPOCHS)


class TwoInputs(nn.Module):
    """Learns from the batches of two loaders at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def loss(self, batch: Any) -> Tensor:
        total = torch.zeros(())
        for layer, part in ((self.first, batch["a"]), (self.second, batch["b"])):
            if part is not None:
                total = total + nn.functional.cross_entropy(layer(part[0]), part[1])
        return total


def side_by_side(a: Any, b: Any, mode: str) -> Iterator[dict[str, Any]]:
    """The batches of two loaders, of which the second has the fewer, as each mode of CombinedLoader pairs them."""
    first, second = iter(a), iter(b)
    if mode == "min_size":
        yield from ({"a": x, "b": y} for x, y in zip(first, second))
        return
    for x in first:
        y = next(second, None)
        if y is None and mode == "max_size_cycle":
            second = iter(b)
            y = next(second)
        yield {"a": x, "b": y}


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_parity_with_several_loaders(parity: Any, batches: Any, mode: str) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        loaders = loader.iterables
        return [loss for _ in range(EPOCHS) for loss in epoch(net, side_by_side(loaders["a"], loaders["b"], mode), optimizer)]

    def epoch(net: Any, combined: Iterator[Any], optimizer: Any) -> list[Tensor]:
        losses = []
        for batch in combined:
            loss = net.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def loader() -> CombinedLoader:
        return CombinedLoader({"a": batches(samples=28), "b": batches(samples=12)}, mode)  # type: ignore[arg-type]

    parity(by_hand, sgd, net=TwoInputs, loader=loader, max_epochs=EPOCHS)


def test_parity_with_a_dict_of_loaders(parity: Any, batches: Any) -> None:
    def by_hand(net: Any, loaders: Any, optimizer: Any) -> list[Tensor]:
        losses = []
        for _ in range(EPOCHS):
            for batch in side_by_side(loaders["a"], loaders["b"], "max_size_cycle"):
                loss = net.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return losses

    def loaders() -> dict[str, Any]:
        return {name: batches(samples=n, shuffle=False) for name, n in (("a", 28), ("b", 12))}

    parity(by_hand, sgd, net=TwoInputs, loader=loaders, max_epochs=EPOCHS)
