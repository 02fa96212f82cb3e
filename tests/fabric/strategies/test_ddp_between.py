"""Gradients and buffers that processes share between the passes of a step are those that DistributedDataParallel shares within."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end

from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.ddp_between import BetweenPasses


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(3, 1))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * rank + step))


def trained(rank: int, size: int, apart: bool, accumulate: int) -> list[Any]:
    """Gradients, and buffers as they are after each forward pass."""
    module = network()
    model: Any = module if apart else DistributedDataParallel(module)
    between = BetweenPasses(module)
    found: list[Any] = []
    for step in range(4):
        last = (step + 1) % accumulate == 0
        if apart and step % accumulate == 0:
            between.begin_window()
        if apart or last:
            model(batch(rank, step)).square().sum().backward()
        else:
            with model.no_sync():
                model(batch(rank, step)).square().sum().backward()
        if apart and last:
            between.average()
        found.append([buffer.tolist() for buffer in module.buffers()])
        if last:
            found.append([parameter.grad.tolist() for parameter in module.parameters()])
            module.zero_grad()
    return found


def compared(rank: int, size: int) -> list[bool]:
    return [trained(rank, size, True, accumulate) == trained(rank, size, False, accumulate) for accumulate in (1, 2)]


def test_two_processes_get_what_ddp_gives_them() -> None:
    assert run(compared, 2) == [[True, True], [True, True]]


def several_dtypes(rank: int, size: int) -> list[list[float]]:
    module = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False).to(torch.bfloat16), nn.Linear(2, 1, bias=False)])
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float(rank))
    between = BetweenPasses(module, ignored=["2.weight"])
    between.average()
    return [parameter.grad.flatten().tolist() for parameter in module.parameters()]  # type: ignore[union-attr]


def test_all_dtypes_are_averaged_and_what_is_ignored_is_not() -> None:
    found = run(several_dtypes, 3)
    assert [each[:2] for each in found] == [[[1.0, 1.0], [1.0, 1.0]]] * 3
    assert [each[2] for each in found] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def without_a_gradient(rank: int, size: int) -> None:
    module = network()
    module[0](batch(rank, 0)).sum().backward()
    BetweenPasses(module).average()


def test_a_parameter_without_a_gradient_is_an_error_that_names_it() -> None:
    for outcome in run_to_end(without_a_gradient, 2):
        assert outcome.error == "RuntimeError"
        assert "1.weight, 1.bias, 2.weight" in outcome.message


@pytest.mark.parametrize("arguments", [{"find_unused_parameters": True}, {"static_graph": True}, {"ddp_comm_hook": print}])
def test_what_only_ddp_does_is_refused(arguments: dict[str, Any]) -> None:
    strategy = DDPStrategy(**arguments)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        strategy.talk_between_passes(True)
    strategy.talk_between_passes(False)


def window(rank: int, size: int) -> list[bool]:
    module = network()
    between = BetweenPasses(module)
    found = [between.within_window]
    between.begin_window()
    found.append(between.within_window)
    module(batch(rank, 0)).sum().backward()
    between.average()
    return [*found, between.within_window]


def test_it_knows_whether_a_window_is_open() -> None:
    assert run(window, 2) == [[False, True, False]] * 2
