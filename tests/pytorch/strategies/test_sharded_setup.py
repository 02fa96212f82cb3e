"""Modules that `configure_model` divides, and optimizers of them: what they begin with, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from trainers import Vectors, quiet
from training import plain

from lightning.fabric.strategies.fsdp_units import choose_units
from lightning.fabric.strategies.sharding import full_state
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy


class Divided(LightningModule):
    """Draws its weights in `configure_model`, and divides some of them there."""

    def __init__(self, optimizer: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.optimizer = optimizer or {}
        self.first: dict[str, Any] = {}
        self.drawn: list[float] = []

    def configure_model(self) -> None:
        self.drawn.append(float(torch.rand(())))
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
        fully_shard(self.net[0], mesh=mesh)

    def on_fit_start(self) -> None:
        self.first = plain(full_state(self.state_dict(), rank0_only=False))
        self.drawn.append(float(torch.rand(())))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, **self.optimizer)


def strategy_of(name: str, size: int) -> Any:
    return FSDPStrategy() if name == "fsdp" else ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)


def fitted(rank: int, size: int, name: str, seeds: list[int]) -> Any:
    torch.manual_seed(seeds[rank])
    model = Divided()
    quiet(strategy=strategy_of(name, size), devices=size, max_steps=1).fit(model, DataLoader(Vectors(4 * size), batch_size=2))
    return model.first, model.drawn


@pytest.mark.parametrize("name", ["fsdp", "model_parallel"])
def test_weights_that_differently_seeded_processes_draw_and_divide_are_those_of_rank_0(name: str) -> None:
    torch.manual_seed(11)
    torch.rand(())
    expected = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    (first, drawn), (other, others) = run(fitted, 2, name, [11, 12])
    assert first == other == plain({f"net.{name}": value for name, value in expected.state_dict().items()})
    assert drawn[0] == others[0]
    assert drawn[1] != others[1], "afterwards each goes on with its own"


def test_processes_of_one_seed_go_on_alike_after_the_model_is_built() -> None:
    (_, drawn), (_, others) = run(fitted, 2, "fsdp", [11, 11])
    assert drawn == others
    assert drawn[0] != drawn[1]


def mixing(rank: int, size: int, name: str, optimizer: dict[str, Any]) -> None:
    strategy: Any = strategy_of(name, size)
    model = Divided(optimizer)
    if name == "fsdp":
        strategy = FSDPStrategy(ignored_modules=[model.kept]) if hasattr(model, "kept") else FSDPStrategy()
    quiet(strategy=strategy, devices=size, max_steps=1).fit(model, DataLoader(Vectors(4 * size), batch_size=2))


class Ignoring(Divided):
    """With a layer that the strategy is told to leave alone."""

    def __init__(self, optimizer: dict[str, Any] | None = None) -> None:
        super().__init__(optimizer)
        self.kept = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.kept(super().training_step(batch, batch_idx).view(1)).sum()


def ignoring(rank: int, size: int, optimizer: dict[str, Any]) -> float:
    torch.manual_seed(1)
    model = Ignoring(optimizer)
    trainer = quiet(strategy=FSDPStrategy(ignored_modules=[model.kept]), devices=size, max_steps=1)
    trainer.fit(model, DataLoader(Vectors(4 * size), batch_size=2))
    return trainer.global_step


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}])
def test_optimizer_that_takes_divided_and_plain_parameters_at_once_is_refused(optimizer: dict[str, Any]) -> None:
    for function, arguments in ((mixing, ("model_parallel", optimizer)), (ignoring, (optimizer,))):
        outcomes = run_to_end(function, 2, *arguments)
        assert [outcome.error for outcome in outcomes] == ["MisconfigurationException"] * 2, outcomes[0].trace
        assert f"AdamW({next(iter(optimizer))}=True) can't step divided parameters (DTensor) and plain ones" in outcomes[0].message


def test_optimizer_that_takes_one_after_another_steps_both() -> None:
    assert run(ignoring, 2, {}) == [1, 1]


class Watching(Ignoring):
    """Notes how its optimizer steps, and what a checkpoint would say of it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.seen = [optimizer.param_groups[0]["foreach"]]

        def closure() -> Any:
            self.seen.append(optimizer.param_groups[0]["foreach"])
            return optimizer_closure()

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.seen.append(optimizer.state_dict()["param_groups"][0]["foreach"])


def watching(rank: int, size: int) -> list[Any]:
    model = Watching()
    trainer = quiet(strategy=FSDPStrategy(ignored_modules=[model.kept]), devices=size, max_steps=1)
    trainer.fit(model, DataLoader(Vectors(4 * size), batch_size=2))
    return model.seen


def test_optimizer_is_told_to_step_mixed_groups_one_by_one_which_no_checkpoint_holds() -> None:
    # On a GPU it takes them at once by default, which torch refuses: tests/gpu/check_model_parallel_cuda.py.
    assert run(watching, 2) == [[None, False, None]] * 2


class SecondOrder(Divided):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def second_order(rank: int, size: int) -> None:
    quiet(strategy=FSDPStrategy(), devices=size, max_steps=1).fit(SecondOrder(), DataLoader(Vectors(4 * size), batch_size=2))


def test_optimizer_that_makes_one_vector_of_all_parameters_is_refused() -> None:
    outcomes = run_to_end(second_order, 2)
    assert [outcome.error for outcome in outcomes] == ["MisconfigurationException"] * 2
    assert "LBFGS makes one vector of all parameters" in outcomes[0].message


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


@pytest.mark.parametrize("module", [nn.Linear(4, 4), Scale(), Block()], ids=["chosen", "without children", "chosen, with children"])
def test_module_that_is_one_unit_itself_needs_none_below_it(module: nn.Module) -> None:
    assert choose_units(module, (nn.Linear if isinstance(module, nn.Linear) else Block,), False, set()) == []
