"""``parity``: the same training once by the Trainer and once by a hand-written loop, compared bit by bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning.pytorch import LightningModule, Trainer

SAMPLES, FEATURES, CLASSES, BATCH = 44, 6, 3, 4  # 11 batches, so that windows of 2, 3 and 4 batches leave a smaller last one


class Net(nn.Module):
    """A small classifier with running statistics and, if asked for, random numbers in its forward pass."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, CLASSES)]
        self.layers = nn.Sequential(*layers)

    def loss(self, batch: Any) -> Tensor:
        """The cross entropy of a batch ``(x, y)`` or ``{"x": x, "y": y}``."""
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(self.layers(x), y)


class Trained(LightningModule):
    """A network as the Trainer gets it; keeps each loss."""

    def __init__(self, net: Any, configure: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.configure = net, configure
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self.net)


class Validated(Trained):
    """The same with validation, which logs its mean loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net.loss(batch))


def batches(shuffle: bool = True, samples: int = SAMPLES, **options: Any) -> Iterable[Any]:
    """A loader of random numbers and classes; it shuffles with the global random state."""
    x, y = torch.randn(samples, FEATURES), torch.randint(CLASSES, (samples,))
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=shuffle, **options)


def trainer(**arguments: Any) -> Trainer:
    """A Trainer that only trains."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(**{**quiet, **arguments})


def parity(
    by_hand: Callable[..., list[Tensor]],
    configure: Callable[[Any], Any],
    *,
    net: Callable[[], Any] = Net,
    module: type[Trained] = Trained,
    loader: Callable[[], Any] = batches,
    val_loader: Callable[[], Any] | None = None,
    **arguments: Any,
) -> None:
    """Train twice from the same random state; losses, weights and buffers must not differ in a single bit.

    Args:
        by_hand: ``f(net, loader, optimizer)``, or with the validation loader as a fourth argument: trains, and returns the losses.
        configure: what ``configure_optimizers`` returns; the hand-written loop gets it as its ``optimizer``.
        net: builds the network.
        module: wraps it for the Trainer.
        loader: builds the training loader.
        val_loader: builds the validation loader.
        **arguments: of the Trainer.
    """
    torch.manual_seed(11)
    plain, loaders = net(), [make() for make in (loader, val_loader) if make is not None]
    expected = by_hand(plain, loaders[0], configure(plain), *loaders[1:])
    random_by_hand = torch.get_rng_state()

    torch.manual_seed(11)
    ours, loaders = module(net(), configure), [make() for make in (loader, val_loader) if make is not None]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer(**arguments).fit(ours, *loaders)

    assert len(ours.losses) == len(expected) > 0
    for step, (ours_loss, hand_loss) in enumerate(zip(ours.losses, expected)):
        assert ours_loss.dtype == hand_loss.dtype
        assert torch.equal(ours_loss, hand_loss), f"the losses differ at step {step}: {ours_loss.item()!r} and {hand_loss.item()!r}"
    weights, by_hand_weights = ours.net.state_dict(), plain.state_dict()
    assert weights.keys() == by_hand_weights.keys()
    for name, value in weights.items():
        assert value.dtype == by_hand_weights[name].dtype
        assert torch.equal(value, by_hand_weights[name]), f"{name} differs"
    assert any(not torch.equal(value, start) for value, start in zip(weights.values(), fresh(net).values())), "nothing was trained"
    assert torch.equal(torch.get_rng_state(), random_by_hand), "the Trainer drew random numbers of its own"


def fresh(net: Callable[[], Any]) -> dict[str, Tensor]:
    """The weights that both loops start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return net().state_dict()  # type: ignore[no-any-return]


@pytest.fixture(name="parity")
def parity_fixture() -> Callable[..., None]:
    """See :func:`parity`."""
    return parity


@pytest.fixture(name="batches")
def batches_fixture() -> Callable[..., Any]:
    """See :func:`batches`."""
    return batches


@pytest.fixture(name="Net")
def net_fixture() -> type[Net]:
    """See :class:`Net`."""
    return Net


@pytest.fixture(name="Trained")
def trained_fixture() -> type[Trained]:
    """See :class:`Trained`."""
    return Trained


@pytest.fixture(name="Validated")
def validated_fixture() -> type[Validated]:
    """See :class:`Validated`."""
    return Validated
