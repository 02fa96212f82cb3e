"""What ModelParallelStrategy refuses, and what it looks after so that processes which compute one model together stay together."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import test_model_parallel as grids
from processes import run
from test_model_parallel import Network, by_tensor, full, made, train
from training import batches, largest_difference, part

from lightning.fabric import collectives
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.layer_sync import TorchSyncBatchNorm
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.replicas import AveragedGradients
from lightning.fabric.strategies.sharding import full_tensor, local_tensor
from lightning.fabric.utilities.exceptions import MisconfigurationException

# ---- the grid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{"data_parallel_size": 0}, {"tensor_parallel_size": "two"}, {"tensor_parallel_size": True}])
def test_size_that_is_no_number_of_processes_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        ModelParallelStrategy(**kwargs)


def test_function_in_the_place_of_a_size_is_told_its_name() -> None:
    with pytest.raises(ValueError, match="goes to parallelize_fn="):
        ModelParallelStrategy(by_tensor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "devices", "sizes", "expected"),
    [(1, 4, {}, (1, 4)), (2, 4, {}, (2, 4)), (1, 4, {"data_parallel_size": 2, "tensor_parallel_size": 2}, (2, 2))],
)
def test_auto_means_machines_for_data_and_their_devices_for_tensors(
    nodes: int, devices: int, sizes: dict[str, int], expected: tuple[int, int]
) -> None:
    strategy = in_environment(nodes, devices, **sizes)
    strategy.configure_launcher()
    assert strategy.sizes() == expected
    assert strategy.distributed_sampler_kwargs == {"num_replicas": expected[0], "rank": 0}


@pytest.mark.parametrize("sizes", [{"data_parallel_size": 2, "tensor_parallel_size": 4}, {"tensor_parallel_size": 2}])
def test_sizes_whose_product_is_not_the_number_of_processes_are_refused_before_any_starts(sizes: dict[str, int]) -> None:
    strategy = in_environment(1, 4, **sizes)
    with pytest.raises(RuntimeError, match=r"the run has 4 .* product is 4"):
        strategy.configure_launcher()


def in_environment(nodes: int, devices: int, **sizes: Any) -> ModelParallelStrategy:
    strategy = ModelParallelStrategy(**sizes, parallel_devices=[torch.device("cpu")] * devices, cluster_environment=LightningEnvironment())
    strategy.num_nodes = nodes
    strategy.set_world_ranks()
    return strategy


def test_mesh_is_not_there_before_the_processes_have_met() -> None:
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = ModelParallelStrategy().device_mesh


def placed(rank: int, size: int, grid: tuple[int, int]) -> Any:
    strategy = made(size, data_parallel_size=grid[0], tensor_parallel_size=grid[1])
    torch.manual_seed(rank)
    random.seed(rank)
    strategy.setup_environment()
    mesh = strategy.device_mesh
    drawn = torch.rand(1).item(), random.random()
    summed = strategy.reduce_named({"count": (torch.tensor(rank + 1), "sum")})["count"].item()
    return strategy.distributed_sampler_kwargs, mesh.mesh_dim_names, tuple(mesh.shape), drawn, summed


def test_processes_that_compute_one_model_get_the_same_data_and_random_numbers_and_count_once() -> None:
    first, second = run(placed, 2, (1, 2))
    assert first[:3] == second[:3] == ({"num_replicas": 1, "rank": 0}, ("data_parallel", "tensor_parallel"), (1, 2))
    assert first[3] == second[3]
    assert (first[4], second[4]) == (1, 2)
    first, second = run(placed, 2, (2, 1))
    assert (first[0], second[0]) == ({"num_replicas": 2, "rank": 0}, {"num_replicas": 2, "rank": 1})
    assert first[3] != second[3]
    assert (first[4], second[4]) == (3, 3)


# ---- the module and its optimizer -----------------------------------------------------------------------------------------


def refused(rank: int, size: int) -> None:
    strategy = made(size)
    strategy.setup_environment()
    with pytest.raises(TypeError, match=r"No parameter of Network is divided.*configure_model"):
        strategy.setup_module(Network())
    with pytest.raises(TypeError, match="`parallelize_fn` returned None"):
        made_again(strategy, lambda module, mesh: None).setup_module(Network())
    strategy = made_again(strategy, by_tensor)
    model: Any = Network()
    strategy.module = model
    stale = torch.optim.SGD(model.block.parameters(), 0.1)
    strategy.setup_module(model)
    with pytest.raises(MisconfigurationException, match="SGD holds no parameter of the model as it is now"):
        strategy.setup_optimizer(stale)
    with pytest.raises(MisconfigurationException, match=r"AdamW\(fused=True\).*two: "):
        strategy.setup_optimizer(torch.optim.AdamW(model.parameters(), fused=True))
    strategy.setup_optimizer(torch.optim.AdamW(model.block.up.parameters(), fused=True))
    strategy.layer_sync = TorchSyncBatchNorm()
    model = Network()
    model.norm = nn.BatchNorm1d(8)
    with pytest.raises(MisconfigurationException, match="convert_sync_batchnorm"):
        strategy.setup_module(model)


def made_again(strategy: ModelParallelStrategy, divide: Any) -> ModelParallelStrategy:
    strategy._parallelize_fn = divide
    return strategy


def test_module_that_is_not_divided_and_optimizers_that_cannot_step_are_refused() -> None:
    run(refused, 2)


# ---- the first step -------------------------------------------------------------------------------------------------------


def given_other_data(rank: int, size: int) -> None:
    with pytest.raises(MisconfigurationException, match=r"`training_step` was given different batches.*distributed_sampler_kwargs"):
        train(made(size, by_tensor), Network(), [part(batch, rank, size) for batch in batches()])


def test_different_batches_within_a_tensor_parallel_group_are_an_error_in_all_of_it() -> None:
    run(given_other_data, 2)


class Divided(Network):
    """One layer sees only the samples of its process, as after SequenceParallel, and nobody sums its gradients."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(self.norm(self.first(x)))
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return collectives.all_gather(self.last(hidden[rank::size]), sync_grads=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()  # type: ignore[no-any-return]


def with_partial_gradients(rank: int, size: int) -> str:
    with pytest.raises(RuntimeError) as raised:
        train(made(size, by_tensor), Divided(), batches())
    return str(raised.value)


def test_gradients_that_differ_within_a_tensor_parallel_group_are_an_error_that_names_them() -> None:
    first, second = run(with_partial_gradients, 2)
    assert first == second
    assert "different gradients of" in first
    assert "'last.weight'" in first
    assert "SequenceParallel" in first


def with_other_weights(rank: int, size: int, grid: tuple[int, int], divide: str) -> Any:
    strategy = made(size, getattr(grids, divide), data_parallel_size=grid[0], tensor_parallel_size=grid[1])
    strategy.setup_environment()
    model: Any = Network()
    if rank:
        for parameter in model.parameters():
            nn.init.ones_(parameter)
    strategy.setup_module(model)
    return {name: value for name, value in full(model).items() if not name.startswith("block.")}


@pytest.mark.parametrize(("grid", "divide"), [((1, 2), "by_tensor"), ((2, 1), "by_data_in_part")])
def test_what_is_not_divided_starts_as_on_rank_0(grid: tuple[int, int], divide: str) -> None:
    expected = {name: value for name, value in full(Network()).items() if not name.startswith("block.")}
    assert run(with_other_weights, 2, grid, divide) == [expected, expected]


# ---- gradients that are averaged ---------------------------------------------------------------------------------------------


def averaged(rank: int, size: int) -> Any:
    both, one, none = (nn.Parameter(torch.ones(2)) for _ in range(3))
    gradients = AveragedGradients([both, one, none], None)
    (both.sum() * (rank + 1) + (one.sum() if rank == 0 else 0)).backward()
    first = [None if p.grad is None else p.grad.tolist() for p in (both, one, none)]
    gradients.enabled = False
    both.sum().backward()
    local = both.grad.tolist()  # type: ignore[union-attr]
    gradients.enabled = True
    (both.sum() * rank).backward()
    both.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        both.sum().backward()
    both._backward_hooks.clear()  # type: ignore[union-attr]
    both.grad = None
    (both.sum() * rank).backward()  # after one that failed
    again = both.grad.tolist()  # type: ignore[attr-defined]
    gradients.remove()
    both.grad = None
    (both.sum() * rank).backward()
    return first, local, again, both.grad.tolist()  # type: ignore[attr-defined]


def test_gradients_are_averaged_over_processes_also_where_one_has_none() -> None:
    results = run(averaged, 2)
    for rank, (first, local, again, alone) in enumerate(results):
        assert first == [[1.5, 1.5], [0.5, 0.5], None]
        assert local == [2.5, 2.5]
        assert again == [0.5, 0.5]
        assert alone == [rank, rank]


def held_back(rank: int, size: int) -> Any:
    strategy = made(size, grids.by_data_in_part, data_parallel_size=2, tensor_parallel_size=1)
    strategy.setup_environment()
    model: Any = Network()
    strategy.connect(model)
    strategy.model = strategy.setup_module(model)
    data = part(batches()[0], rank, size)
    with strategy.no_backward_sync():
        model.training_step(data, 0).backward()
    before = model.block.up.weight.grad is None, model.last.weight.grad.tolist()
    model.training_step(data, 0).backward()
    return before, model.last.weight.grad.tolist(), local_tensor(model.block.up.weight.grad).abs().sum().item() > 0


def test_no_backward_sync_keeps_all_gradients_local() -> None:
    first, second = run(held_back, 2)
    assert first[0][0], second[0][0]
    assert first[0][1] != second[0][1]
    assert first[1] == second[1]
    assert first[2], second[2]


def broken_off(rank: int, size: int, grid: tuple[int, int], divide: str) -> Any:
    """A window of three batches, after two of which the gradients go to another model."""
    strategy = made(size, getattr(grids, divide), data_parallel_size=grid[0], tensor_parallel_size=grid[1])
    strategy.setup_environment()
    pieces = part(batches()[0], rank // grid[1], grid[0])
    pieces = pieces.split(len(pieces) // 3)
    first: Any = strategy.setup_module(Network())
    with strategy.no_backward_sync():
        for piece in pieces[:2]:
            (first.training_step(piece, 0) / 3).backward()
    strategy.module = first
    gradients = strategy.accumulated_gradients()
    strategy.module = second = strategy.setup_module(Network())
    strategy.load_accumulated_gradients(gradients)
    (second.training_step(pieces[2], 0) / 3).backward()
    return {name: full_tensor(parameter.grad).tolist() for name, parameter in second.named_parameters()}


@pytest.mark.parametrize(
    ("size", "grid", "divide"), [(2, (1, 2), "by_tensor"), (2, (2, 1), "by_data"), (4, (2, 2), "by_both_in_part"), (4, (2, 2), "by_tensor")]
)
def test_accumulated_gradients_go_on_in_another_model(size: int, grid: tuple[int, int], divide: str) -> None:
    model = Network()
    model.training_step(batches()[0], 0).backward()
    expected = {name: parameter.grad.tolist() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    for gradients in run(broken_off, size, grid, divide):
        assert largest_difference(gradients, expected) < 1e-6
