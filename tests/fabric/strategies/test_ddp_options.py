"""Communication hooks, manual optimization, sparse gradients, and the meeting of the processes."""

from __future__ import annotations

import logging
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import free_port, run, run_to_end
from training import Net, batches, largest_difference, part, plain, train

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.parallel import Leaving, default_backend
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_only


def ddp(size: int, **kwargs: Any) -> DDPStrategy:
    return DDPStrategy(parallel_devices=[torch.device("cpu")] * size, **kwargs)


def local(rank: int, size: int, count: int = 4) -> list[Tensor]:
    return [part(batch, rank, size) for batch in batches(count)]


# ---- communication hooks ----------------------------------------------------------------------------------------------


def with_half_precision_hook(rank: int, size: int, wrapped: bool) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hooks: dict[str, Any] = {"ddp_comm_hook": default_hooks.fp16_compress_hook}
    if wrapped:
        hooks = {"ddp_comm_hook": default_hooks.allreduce_hook, "ddp_comm_wrapper": default_hooks.fp16_compress_wrapper}
    return train(ddp(size, **hooks), Net(), local(rank, size))


@pytest.mark.parametrize("wrapped", [False, True])
def test_hook_compresses_what_is_averaged(wrapped: bool) -> None:
    weights = run(with_half_precision_hook, 2, wrapped)
    assert weights[0] == weights[1]
    assert 1e-6 < largest_difference(weights[0], train(SingleDeviceStrategy(), Net(), batches())) < 1e-2


def with_power_sgd(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.1)
    return train(ddp(size, ddp_comm_state=state, ddp_comm_hook=powerSGD_hook), Net(), local(rank, size))


def test_hook_with_a_state_approximates_gradients() -> None:
    weights = run(with_power_sgd, 2)
    assert weights[0] == weights[1]
    assert largest_difference(weights[0], train(SingleDeviceStrategy(), Net(), batches())) > 1e-5


def with_local_steps(rank: int, size: int, count: int) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook

    alone, _ = torch.distributed.new_subgroups(1)
    state = PostLocalSGDState(process_group=None, subgroup=alone, start_localSGD_iter=2)
    strategy = ddp(size, ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=2)
    return train(strategy, Net(), local(rank, size, count))


def test_weights_are_averaged_every_so_many_steps() -> None:
    before, after = run(with_local_steps, 2, 4), run(with_local_steps, 2, 5)  # after the second step, every second one
    assert largest_difference(*before) > 1e-4
    assert largest_difference(*after) < 1e-6


# ---- manual optimization ----------------------------------------------------------------------------------------------


class Manual(nn.Module):
    """Two networks with an optimizer each; both are stepped within one training step, as in a GAN."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.other = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        self.optimizers = [torch.optim.SGD(self.one.parameters(), 0.1), torch.optim.SGD(self.other.parameters(), 0.1)]
        self.strategy: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for network, optimizer in zip((self.one, self.other), self.optimizers):
            loss = (network(batch).sum(1) - batch.sum(1)).square().mean()
            optimizer.zero_grad()
            self.strategy[0].pre_backward(loss)
            self.strategy[0].backward(loss)
            optimizer.step()


def manual(strategy: Any, data: list[Tensor]) -> dict[str, Any]:
    module = Manual().eval()  # so that the statistics stay those of the start
    module.strategy.append(strategy)
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    step = strategy.bind("training_step")
    for index, batch in enumerate(data):
        step(batch, index)
    return plain(strategy.lightning_module_state_dict())


class Alone(SingleDeviceStrategy):
    def pre_backward(self, tensor: Tensor) -> None:
        """One process has nothing to prepare."""


def manual_in_processes(rank: int, size: int) -> dict[str, Any]:
    return manual(ddp(size, find_unused_parameters=True), local(rank, size))


def test_every_backward_of_a_manual_step_averages() -> None:
    expected = manual(Alone(), batches())
    for weights in run(manual_in_processes, 2):
        assert largest_difference(weights, expected) < 1e-6


def manual_held_back(rank: int, size: int) -> list[float]:
    strategy, seen = ddp(size, find_unused_parameters=True), []

    class Held(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for held in (True, False):
                self.zero_grad()
                loss = self.other(self.one(batch)).mean()
                with strategy.block_backward_sync() if held else torch.enable_grad():
                    strategy.pre_backward(loss)
                    strategy.backward(loss)
                seen.append(self.one.bias.grad.sum().item())  # type: ignore[union-attr]

    module = Held().eval()
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    strategy.bind("training_step")(local(rank, size)[0] * (rank + 1), 0)
    return seen


def test_a_manual_step_can_hold_gradients_back() -> None:
    (first, averaged), (second, same) = run(manual_held_back, 2)
    assert averaged == same == pytest.approx((first + second) / 2)


# ---- sparse gradients -------------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.linear = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.linear(self.embedding(batch)).square().mean()  # type: ignore[no-any-return]


def sparse(strategy: Any, data: list[Tensor]) -> dict[str, Any]:
    module = Sparse()
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for index, batch in enumerate(data):
        optimizer.zero_grad()
        strategy.backward(strategy.bind("training_step")(batch, index))
        optimizer.step()
    return plain(strategy.lightning_module_state_dict())


def sparse_in_processes(rank: int, size: int) -> dict[str, Any]:
    return sparse(ddp(size), [torch.arange(6)[rank::size], torch.arange(3, 9)[rank::size]])


def test_sparse_gradients_are_averaged_beside_bucket_views() -> None:
    expected = sparse(SingleDeviceStrategy(), [torch.arange(6), torch.arange(3, 9)])
    for weights in run(sparse_in_processes, 2):
        assert largest_difference(weights, expected) < 1e-6


# ---- meeting ----------------------------------------------------------------------------------------------------------


def met(rank: int, size: int, port: int) -> dict[str, Any]:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    strategy = ddp(size, accelerator=CPUAccelerator(), cluster_environment=LightningEnvironment())
    strategy.setup_environment()
    strategy.setup_environment()  # a second run in the same processes
    facts = {
        "ranks": (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size, strategy.num_processes),
        "sampler": strategy.distributed_sampler_kwargs,
        "speaks": (strategy.is_global_zero, rank_zero_only.rank),  # type: ignore[attr-defined]
        "device": str(strategy.root_device),
        "backend": strategy.process_group_backend,
        "sum": strategy.reduce(torch.tensor(1.0), reduce_op="sum").item(),
        "broadcast": strategy.broadcast(f"from {rank}"),
        "gathered": strategy.all_gather(torch.tensor(rank)).tolist(),
        "decided": strategy.reduce_boolean_decision(rank == 0, all=False),
        "named": strategy.reduce_named({"a": (torch.tensor(1.0), "sum")})["a"].item(),
    }
    strategy.barrier("name")
    strategy.teardown()
    strategy.cluster_environment.set_world_size(3)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="needs 3 processes, and this process is already in a group of 2"):
        strategy.setup_distributed()
    return facts


def test_processes_meet_where_the_environment_says() -> None:
    common = {"device": "cpu", "backend": "gloo", "sum": 2.0, "broadcast": "from 0", "gathered": [0, 1], "decided": True, "named": 2.0}
    for rank, facts in enumerate(run(met, 2, free_port(), group=False)):
        expected = {"ranks": (rank, rank, 0, 2, 2), "sampler": {"num_replicas": 2, "rank": rank}, "speaks": (rank == 0, rank)}
        assert facts == {**expected, **common}


def on_a_used_port(rank: int, size: int) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
        ddp(2, cluster_environment=LightningEnvironment()).setup_environment()


def test_port_in_use_is_an_error_that_says_what_to_change() -> None:
    (outcome,) = run_to_end(on_a_used_port, 1, group=False)
    assert outcome.error == "RuntimeError"
    assert "the port is in use. Set the environment variable MASTER_PORT" in outcome.message


def without_the_other(rank: int, size: int, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    ddp(2, cluster_environment=LightningEnvironment(), timeout=timedelta(seconds=2)).setup_environment()


def test_processes_that_never_come_are_waited_for_no_longer_than_the_timeout() -> None:
    (outcome,) = run_to_end(without_the_other, 1, free_port(), group=False, timeout=20)
    assert outcome.error == "RuntimeError"
    assert "did not all meet at 127.0.0.1" in outcome.message
    assert outcome.seconds < 7


def torn_down_alone(rank: int, size: int) -> float:
    strategy = ddp(size)
    train(strategy, Net(), local(rank, size))
    if rank == 0:  # the other process never comes here
        strategy.teardown()
    return 1.0


def test_teardown_waits_for_nobody() -> None:
    outcomes = run_to_end(torn_down_alone, 2)
    assert all(outcome.value == 1.0 and outcome.seconds < 5 for outcome in outcomes)


def leaving(rank: int, size: int, port: int, failed: bool) -> bool:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    strategy = ddp(size, cluster_environment=LightningEnvironment())
    strategy.setup_environment()
    if rank == 0:
        with pytest.raises(RuntimeError):
            strategy.barrier()  # the other process leaves instead of coming here
        return True
    if failed:
        strategy.on_exception(ZeroDivisionError())
    Leaving.at_exit()
    if failed:  # what gloo holds is closed when the process ends, as it does next
        os._exit(7 if torch.distributed.is_initialized() else 5)
    return torch.distributed.is_initialized()


@pytest.mark.parametrize("failed", [False, True])
def test_process_leaves_while_others_wait_for_it(failed: bool) -> None:
    outcomes = run_to_end(leaving, 2, free_port(), failed, group=False, timeout=30)
    assert outcomes[0].value is True, outcomes
    assert outcomes[1].trace == "it died with exit code 5" if failed else outcomes[1].value is False, outcomes
    assert all(outcome.seconds < 5 for outcome in outcomes)


def test_strategy_without_other_processes_knows_its_place(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning.fabric")
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")])
    assert (strategy.world_size, strategy.global_rank, strategy.local_rank, strategy.node_rank) == (1, 0, 0, 0)
    assert strategy.broadcast(5) == 5
    assert strategy.reduce(torch.tensor(2.0)).item() == 2.0
    assert strategy.strategy_name == "ddp"
    assert not caplog.records


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl"), ("cuda:1", "cpu:gloo,cuda:nccl"), ("meta", None)]
)
def test_backend_serves_the_device_and_the_host(device: str, backend: str | None) -> None:
    assert default_backend(torch.device(device)) == backend
