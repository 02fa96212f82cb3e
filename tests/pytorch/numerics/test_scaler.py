"""The scaler of fp16 leaves out updates whose gradients overflowed: that is no failure, and it is not taken for one.

Its arithmetic is the same on the CPU, where torch has a scaler too; the Trainer itself takes bfloat16 there.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import quiet

from lightning.pytorch import LightningModule
from lightning.pytorch.loops.finite import NonFiniteError
from lightning.pytorch.plugins import MixedPrecision

INF, NAN = float("inf"), float("nan")


class Net(LightningModule):
    """``grows`` is a factor of the gradient alone, ``adds`` a constant of the loss, by batch."""

    def __init__(self, grows: dict[int, float] | None = None, adds: dict[int, float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3, 1)
        self.grows, self.adds = grows or {}, adds or {}
        self.weights: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        factor = self.grows.get(batch_idx if batch_idx in self.grows else -1, 1.0)
        loss = self.layer(batch).square().mean()
        if factor != 1.0:
            loss.register_hook(lambda gradient: gradient * factor)
        return loss + self.adds.get(batch_idx, 0.0)

    def on_train_batch_end(self, *args: Any) -> None:
        self.weights.append(self.layer.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def trained(module: Net, policy: str | None, count: int = 5, **arguments: Any) -> list[str]:
    precision = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**8))
    data = torch.randn(count, 8, 3, generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(plugins=precision, on_nonfinite=policy, **arguments).fit(module, DataLoader(list(data), batch_size=None))  # type: ignore[arg-type]
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("policy", ["error", "warn", "skip"])
def test_overflow_is_the_scalers_own_affair(policy: str) -> None:
    module, plain = Net(grows={1: 1e36}), Net(grows={1: 1e36})
    assert trained(module, policy) == []
    trained(plain, None)
    assert all(torch.equal(a, b) for a, b in zip(module.weights, plain.weights))
    assert torch.equal(module.weights[0], module.weights[1])


@pytest.mark.parametrize("value", [INF, NAN])
def test_loss_that_is_not_finite_is_one(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"The loss is not finite \((inf|nan)\) in epoch 0, batch 2 \(global step 2\)"):
        trained(Net(adds={2: value}), "error")


@pytest.mark.parametrize("value", [INF, NAN])
def test_its_update_is_left_out_by_the_scaler(value: float) -> None:
    module = Net(adds={2: value})
    assert len(trained(module, "skip")) == 1
    changed = [not torch.equal(a, b) for a, b in zip(module.weights, module.weights[1:])]
    assert changed == [True, False, True, True]


def test_scale_that_has_fallen_to_nothing_is_one() -> None:
    with pytest.raises(NonFiniteError, match=r"The fp16 scaler has halved its scale to less than 6.0e-08.*global step 3\d"):
        trained(Net(grows={-1: INF}), "error", count=60)


def test_parts_of_a_batch_are_scaled_alike() -> None:
    class Small(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if len(batch) > 4:
                torch.empty(2**46)
            return super().training_step(batch, batch_idx)

    whole, split = Net(), Small()
    trained(whole, None)
    trained(split, None, on_out_of_memory="split_batch")
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(whole.weights, split.weights))
    assert len(split.weights) == 5
