"""Modules that are built without memory get, in several real processes, the weights that they would have had."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from sharded import fit, fsdp, set_up, weights
from training import batches, largest_difference, part

from lightning.fabric.strategies.meta_device import materialize
from lightning.fabric.strategies.single_device import SingleDeviceStrategy


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.out(self.attention(x[None], x[None], x[None], need_weights=False)[0][0])


class Model(nn.Module):
    """Tied, with modules inside of modules that own weights, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 6, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.randn(3))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.normal_(self.shift)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.embed(batch)
        for block in self.blocks:
            hidden = block(hidden)
        return (hidden @ self.head.weight * self.scale + self.shift.sum() - batch).square().mean()


def build(empty: bool) -> Model:
    torch.manual_seed(11)
    with torch.device("meta" if empty else "cpu"):
        return Model()


def built(rank: int, size: int, kwargs: dict[str, Any], other_seed: bool) -> list[Any]:
    strategy = fsdp(size, **{"auto_wrap_policy": {Block}, **kwargs})
    torch.manual_seed(11)
    with strategy.module_init_context(empty_init=True):
        model = Model()
    without_memory = all(tensor.is_meta for tensor in model.parameters())
    if other_seed and rank > 0:
        torch.manual_seed(12)
    optimizer = set_up(strategy, model, lr=0.02)
    after = torch.rand(1).item()
    first = weights(strategy)
    losses = fit(strategy, optimizer, [part(batch, rank, size) for batch in batches()])
    return [without_memory, first, weights(strategy), model.head.weight is model.embed.weight, after, losses]


@pytest.mark.parametrize(("size", "kwargs", "other_seed"), [(2, {}, False), (3, {}, False), (2, {"cpu_offload": True}, True)])
def test_weights_are_those_of_a_module_that_was_built_with_memory(size: int, kwargs: dict[str, Any], other_seed: bool) -> None:
    expected = build(empty=False)
    after = torch.rand(1).item()
    for rank, (without_memory, first, _, tied, mine, losses) in enumerate(run(built, size, kwargs, other_seed)):
        assert without_memory
        assert largest_difference(first, {name: value.tolist() for name, value in expected.state_dict().items()}) == 0
        assert tied
        assert (mine == after) is (not other_seed or rank == 0)  # a process with other random numbers keeps its own
        assert torch.tensor(losses).isfinite().all()


class Positions(nn.Module):
    """A buffer that only the constructor computes, and a weight that nothing initialises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1)
        self.register_buffer("positions", torch.arange(5.0))
        self.offset = nn.Parameter(torch.zeros(5))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch + self.positions + self.offset).mean()  # type: ignore[no-any-return]


def lacking(rank: int, size: int, init: bool, load: bool) -> Any:
    def fill(module: nn.Module) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            nn.init.constant_(tensor, 2.0)

    strategy = fsdp(size, **({"param_init_fn": fill} if init else {}))
    with strategy.module_init_context(empty_init=True):
        model = Positions()
    set_up(strategy, model, lr=0.1)
    if load:
        strategy.load_model_state_dict({"state_dict": Positions().state_dict()})
    try:
        loss = strategy.bind("training_step")(torch.zeros(1, 5), 0)
    except RuntimeError as error:
        return str(error)
    return [loss.item(), weights(strategy)["positions"]]


def test_tensors_without_a_value_are_named_before_the_first_step() -> None:
    for message in run(lacking, 2, False, False):
        assert "nothing gave values to 'offset', 'positions'" in message


def test_checkpoint_or_a_function_gives_values_where_modules_do_not() -> None:
    assert [positions for _, positions in run(lacking, 2, False, True)] == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2
    assert run(lacking, 2, True, False) == [[5 * 2.0 * 4.0 + 2.0, [2.0] * 5]] * 2


def test_one_process_materialises_without_a_group() -> None:
    model = build(empty=True)
    torch.manual_seed(11)
    assert materialize(model, torch.device("cpu")) == []
    torch.testing.assert_close(dict(model.state_dict()), dict(build(empty=False).state_dict()), rtol=0, atol=0)
    strategy = SingleDeviceStrategy()
    fit(strategy, set_up(strategy, model, lr=0.02), batches())
