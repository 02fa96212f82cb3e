"""Check collectives and DDPStrategy on two GPUs with NCCL: ``python tests/gpu/check_ddp_cuda.py``.

A plain script that needs torch and numpy only, so that it runs where nothing can be installed. Each check asserts and prints a line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import Net, batches, largest_difference, part, plain, train

from lightning.fabric import collectives
from lightning.fabric.accelerators.cuda import CUDAAccelerator
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.plugins.layer_sync import TorchSyncBatchNorm
from lightning.fabric.precision import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.uneven import Lockstep
from lightning.fabric.utilities.exceptions import MisconfigurationException

DEVICES = [torch.device("cuda", 0), torch.device("cuda", 1)]


def ddp(**kwargs: Any) -> DDPStrategy:
    return DDPStrategy(CUDAAccelerator(), DEVICES, LightningEnvironment(), timeout=timedelta(seconds=60), **kwargs)


def here(rank: int) -> torch.device:
    return DEVICES[rank]


# ---- collectives --------------------------------------------------------------------------------------------------------


def check_values_travel(rank: int, backend: str) -> None:
    on_gpu, on_host = torch.tensor([float(rank)], device=here(rank)), torch.tensor([float(rank)])
    for tensor in (on_gpu, on_host):
        assert collectives.reduce(tensor, "sum").tolist() == [1.0]
        assert collectives.reduce(tensor, "sum").device == tensor.device
        assert collectives.all_gather(tensor).tolist() == [[0.0], [1.0]]
    sent = collectives.broadcast({"tensor": on_gpu, "host": on_host, "rank": rank}, src=1)
    assert (sent["tensor"].device, sent["host"].device.type, sent["rank"]) == (here(rank), "cpu", 1)
    assert collectives.gather_object("x" * rank) == ["", "x"]
    assert collectives.reduce_boolean_decision(rank == 1, all=False)
    assert not collectives.reduce_boolean_decision(rank == 1)
    collectives.barrier()
    tensors = [torch.full((3,), float(rank), device=here(rank)), torch.tensor(rank)]
    collectives.broadcast_tensors(tensors, src=1)
    assert [tensor.tolist() for tensor in tensors] == [[1.0] * 3, 1]
    leaf = on_gpu.clone().requires_grad_()
    (collectives.all_gather(leaf, sync_grads=True).sum() * (rank + 1)).backward()
    assert leaf.grad is not None
    assert leaf.grad.item() == 3.0


def check_reduction_by_name(rank: int, backend: str) -> None:
    values = {"loss": (torch.tensor(float(rank), device=here(rank)), "mean"), "count": (torch.tensor(2, device=here(rank)), "sum")}
    collectives.reduce_named(values)
    torch.cuda.synchronize()
    if "gloo" in backend:  # names are compared on the host: the device is not read
        torch.cuda.set_sync_debug_mode("error")
    result = collectives.reduce_named(values)
    torch.cuda.set_sync_debug_mode("default")
    assert {name: value.item() for name, value in result.items()} == {"loss": 0.5, "count": 4}
    started = time.perf_counter()
    try:
        collectives.reduce_named({"loss" if rank else "other": values["loss"]})
    except MisconfigurationException as error:
        assert "rank 0 has no 'loss'; rank 1 has no 'other'" in str(error)  # noqa: PT017
    else:
        raise AssertionError("no error")
    assert time.perf_counter() - started < 5


# ---- training -----------------------------------------------------------------------------------------------------------


def alone(**net: Any) -> dict[str, Any]:
    return train(SingleDeviceStrategy(DEVICES[0]), Net(**net), [batch.to(DEVICES[0]) for batch in batches()])


def local(rank: int) -> list[torch.Tensor]:
    return [part(batch, rank, 2).to(here(rank)) for batch in batches()]


def check_weights_are_those_of_one_gpu(rank: int, backend: str) -> None:
    for kwargs in ({}, {"static_graph": True}, {"gradient_as_bucket_view": False}, {"find_unused_parameters": True}):
        net = {"skips": "find_unused_parameters" in kwargs}
        assert largest_difference(train(ddp(**kwargs), Net(**net), local(rank)), alone(**net)) < 1e-6, kwargs
    pieces = [piece for batch in local(rank) for piece in batch.split(1)]
    assert largest_difference(train(ddp(), Net(), pieces, accumulate=3), alone()) < 1e-6


def check_scaler(rank: int, backend: str) -> None:
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=100)  # type: ignore[attr-defined]
    data = local(rank)
    if rank == 1:
        data[1] = data[1] * float("inf")
    weights = train(ddp(precision=MixedPrecision("16-mixed", "cuda", scaler)), Net(), data)
    assert scaler.get_scale() == 2.0**9
    assert collectives.gather_object(weights)[0] == weights


def check_uneven_loaders_with_synchronised_batch_norm(rank: int, backend: str) -> None:
    lengths = [3, 6]
    everything = [list(torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(r)).to(here(rank))) for r, n in enumerate(lengths)]
    for known in (True, False):
        strategy, module = ddp(), Net(normalises=True)
        strategy.layer_sync = TorchSyncBatchNorm()
        strategy.connect(module)
        strategy.model = strategy.setup_module(module)
        assert type(module.norm) is nn.SyncBatchNorm
        step, optimizer = strategy.bind("training_step"), torch.optim.SGD(module.parameters(), 0.1)
        loader = Lockstep(everything[rank] if known else Stream(everything[rank]), "join")
        for index, batch in enumerate(loader):
            with torch.enable_grad() if index % 2 else strategy.no_backward_sync(), loader.turn(index, module):
                strategy.backward(step(batch, index) * loader.weight(index) / 2)
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        weights = plain(strategy.lightning_module_state_dict())
        strategy.teardown()
        reference = Net(normalises=True).to(here(rank))
        optimizer = torch.optim.SGD(reference.parameters(), 0.1)
        for index in range(max(lengths)):
            (reference.training_step(torch.cat([b[index] for b in everything if index < len(b)]), index) / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert largest_difference(weights, plain(reference.state_dict())) < 1e-5


class Stream:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


class Block(nn.Module):
    """A small GPT without an embedding: enough parameters to make averaging them cost something."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 16, enable_nested_tensor=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return self.layers(batch).square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch)  # type: ignore[no-any-return]


def timed(step: Callable[[torch.Tensor], torch.Tensor], parameters: Any, rank: int, watched: bool) -> tuple[float, float]:
    """Seconds of a step, and the largest memory in GiB."""
    optimizer = torch.optim.AdamW(parameters, fused=True)
    batch = torch.randn(8, 512, 1024, device=here(rank))

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            step(batch).backward()
            optimizer.step()

    run(5)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if watched:
        torch.cuda.set_sync_debug_mode("error")
        run(3)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    collectives.barrier()
    started = time.perf_counter()
    run(40)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / 40, torch.cuda.max_memory_allocated() / 2**30


def check_speed_and_memory_beside_a_hand_written_loop(rank: int, backend: str) -> None:
    found: dict[str, list[tuple[float, float]]] = {"hand": [], "strategy": []}
    for _ in range(4):
        module = Block().to(here(rank))
        model = DistributedDataParallel(module, device_ids=[rank], gradient_as_bucket_view=True)
        found["hand"].append(timed(model, module.parameters(), rank, watched=False))
        del model, module
        torch.cuda.empty_cache()
        strategy = ddp()
        strategy.connect(Block())
        strategy.model = strategy.setup_module(strategy.module)  # type: ignore[arg-type]
        step = strategy.bind("training_step")
        found["strategy"].append(timed(partial(step, batch_idx=0), strategy.module.parameters(), rank, watched=True))  # type: ignore[union-attr]
        strategy.teardown()
        del step, strategy
        torch.cuda.empty_cache()
    best = {name: min(seconds for seconds, _ in values) for name, values in found.items()}
    memory = {name: max(gib for _, gib in values) for name, values in found.items()}
    if rank == 0:
        print(f"  200 M parameters, seconds a step: {best}; peak GiB: {memory}; all of them: {found}", flush=True)
    assert best["strategy"] < best["hand"] * 1.02
    assert memory["strategy"] < memory["hand"] * 1.02


CHECKS = {
    None: [
        check_values_travel,
        check_reduction_by_name,
        check_weights_are_those_of_one_gpu,
        check_scaler,
        check_uneven_loaders_with_synchronised_batch_norm,
        check_speed_and_memory_beside_a_hand_written_loop,
    ],
    "nccl": [check_values_travel, check_reduction_by_name, check_weights_are_those_of_one_gpu],
}


def main(rank: int, backend: str | None, port: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    torch.backends.cuda.matmul.allow_tf32 = False
    strategy = ddp(process_group_backend=backend)
    strategy.setup_environment()
    assert torch.cuda.current_device() == rank
    used = strategy.process_group_backend
    assert used == (backend or "cpu:gloo,cuda:nccl")
    for check in CHECKS[backend]:
        check(rank, used)
        if rank == 0:
            print(f"ok {check.__name__} ({used})", flush=True)


def fail_alone(rank: int, port: int, told: bool, failed_at: Any) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    strategy = ddp()
    strategy.setup_environment()
    strategy.reduce(torch.ones(1, device=here(rank)))
    torch.cuda.synchronize()
    if rank == 1:
        error = ZeroDivisionError("the user's own")
        if told:
            strategy.on_exception(error)
        strategy.teardown()
        failed_at.value = time.time()
        raise error
    strategy.reduce(torch.ones(1, device=here(rank)))  # nobody answers
    torch.cuda.synchronize()


def check_a_failing_process_ends_soon(told: bool) -> None:
    context = torch.multiprocessing.get_context("spawn")
    port, failed_at = find_free_network_port(), context.Value("d", 0.0)
    children = [context.Process(target=fail_alone, args=(rank, port, told, failed_at)) for rank in range(2)]
    for child in children:
        child.start()
    children[1].join(60)
    seconds = time.time() - failed_at.value
    for child in children:
        child.kill()
    assert children[1].exitcode == 1, children[1].exitcode
    assert seconds < (5 if told else 15), seconds
    print(f"ok check_a_failing_process_ends_soon (after {seconds:.1f} s{'' if told else ', though the strategy was not told'})", flush=True)


if __name__ == "__main__":
    for backend in CHECKS:
        torch.multiprocessing.spawn(main, (backend, find_free_network_port()), nprocs=2)  # type: ignore[no-untyped-call]
    for told in (True, False):
        check_a_failing_process_ends_soon(told)
    print("all is well")
