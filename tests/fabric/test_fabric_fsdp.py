"""Fabric with weights divided between two real processes gives what one process gives on all of the data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run
from training import Net, batches, largest_difference, part, plain

from lightning.fabric import Fabric
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.sharding import full_state, full_tensor, is_dtensor

TOLERANCE = 1e-6


class Deep(Net):
    """With a method that computes beside its forward pass."""

    def score(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).mean()  # type: ignore[no-any-return]


def fsdp(state_dict_type: Any = "full", **arguments: Any) -> Fabric:
    strategy = FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type=state_dict_type)
    return Fabric(accelerator="cpu", devices=2, strategy=strategy, **arguments)


def whole(module: Any) -> dict[str, Any]:
    return plain(full_state(dict(module.state_dict()), rank0_only=False))


def train(fabric: Fabric, data: list[Tensor], accumulate: int = 1, together: bool = True) -> tuple[Any, Any, list[float]]:
    module = Deep()
    if together:
        model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    else:
        model = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    norms = []
    for index, batch in enumerate(data):
        last = (index + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(model.training_step(batch, index) / accumulate)
        if last:
            norm = fabric.clip_gradients(model, optimizer, max_norm=0.5)
            assert norm is not None
            norms.append(full_tensor(norm).item())
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer, norms


def pieces(rank: int, size: int, accumulate: int) -> list[Tensor]:
    return [piece for batch in batches() for piece in part(batch, rank, size).split(3 // accumulate)]


def trained(rank: int, size: int, accumulate: int, together: bool) -> Any:
    model, _, norms = train(fsdp(), pieces(rank, size, accumulate), accumulate, together)
    return [all(is_dtensor(p) for p in model.parameters()), whole(model), norms]


@pytest.mark.parametrize(("accumulate", "together"), [(1, True), (1, False), (3, True)])
def test_weights_and_norms_are_those_of_one_process(accumulate: int, together: bool) -> None:
    data = [piece for batch in batches() for piece in batch.split(6 // accumulate)]
    model, _, expected = train(Fabric(accelerator="cpu", devices=1), data, accumulate)
    for divided, weights, norms in run(trained, 2, accumulate, together):
        assert divided
        assert largest_difference(weights, plain(model.state_dict())) < TOLERANCE
        assert norms == pytest.approx(expected, rel=1e-5)


def marked(rank: int, size: int) -> list[Any]:
    fabric, module = fsdp(), Deep()
    model = fabric.setup(module)
    batch = part(batches()[0], rank, size)
    with torch.no_grad(), pytest.raises(RuntimeError, match="mark_forward_method"):
        model.score(batch)
    model.mark_forward_method("score")
    fabric.backward(model.score(batch))
    assert module.last.bias.grad is not None
    gradient = full_tensor(module.last.bias.grad).item()
    with torch.no_grad():
        return [gradient, model(batch).shape == (3, 1)]


def test_marked_methods_gather_weights_and_reduce_gradients() -> None:
    assert run(marked, 2) == [[1.0, True]] * 2


def stale(rank: int, size: int) -> str:
    fabric, module = fsdp(), Deep()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    fabric.setup_module(module)
    with pytest.raises(RuntimeError) as raised:
        fabric.setup_optimizers(optimizer)
    return str(raised.value)


def test_optimizers_made_before_the_weights_were_divided_are_refused() -> None:
    assert all("Make it after `model = fabric.setup_module(model)`" in message for message in run(stale, 2))


def saved(rank: int, size: int, folder: str, kind: str) -> list[Any]:
    fabric = fsdp(kind)
    model, optimizer, _ = train(fabric, pieces(rank, size, 1))
    path = Path(folder) / "a.ckpt"
    fabric.save(path, {"model": model, "optimizer": optimizer, "epoch": 3, "extra": {"x": torch.ones(2)}})
    other_model, other_optimizer, _ = train(fabric, [])
    state: dict[str, Any] = {"model": other_model, "optimizer": other_optimizer, "epoch": 0}
    rest = fabric.load(path, state)
    for each, step in ((model, optimizer), (other_model, other_optimizer)):
        fabric.backward(each.training_step(part(batches()[0], rank, size), 0))
        step.step()
    return [whole(model), whole(other_model), state["epoch"], rest["extra"]["x"].tolist(), list(rest)]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_checkpoints_come_back_here_and_in_one_process(tmp_path: Path, kind: str) -> None:
    for weights, again, epoch, extra, rest in run(saved, 2, str(tmp_path), kind):
        assert largest_difference(weights, again) < TOLERANCE
        assert (epoch, extra, rest) == (3, [1.0, 1.0], ["extra"])
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert (tmp_path / "a.ckpt").is_dir() == (kind == "sharded")
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer, _ = train(fabric, [])
    fabric.load(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})
    fabric.backward(model.training_step(batches()[0], 0))
    optimizer.step()
    assert largest_difference(plain(model.state_dict()), weights) < TOLERANCE


def adversaries(fabric: Fabric, data: list[Tensor]) -> list[Any]:
    """Two modules, each with an optimizer of its own, the second of which sees what the first makes."""
    torch.manual_seed(1)
    critic_module = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    pairs = [fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1)) for module in (Deep(), critic_module)]
    (maker, maker_optimizer), (critic, critic_optimizer) = pairs
    for batch in data:
        critic_optimizer.zero_grad()
        fabric.backward(critic(maker(batch).detach()).square().mean())
        critic_optimizer.step()
        maker_optimizer.zero_grad()
        fabric.backward(-critic(maker(batch)).mean())
        maker_optimizer.step()
    return [whole(maker), whole(critic)]


def two_modules(rank: int, size: int) -> list[Any]:
    return adversaries(fsdp(), pieces(rank, size, 1))


def test_several_modules_train_as_in_one_process() -> None:
    alone = adversaries(Fabric(accelerator="cpu", devices=1), batches())
    for found in run(two_modules, 2):
        for weights, expected in zip(found, alone):
            assert largest_difference(weights, expected) < TOLERANCE
