"""Check FSDPStrategy on one or two GPUs with NCCL: ``python tests/gpu/check_fsdp_cuda.py [--host]``.

A plain script that needs torch and numpy only, so that it runs where nothing can be installed. Each check asserts and prints a line.
``--host`` runs those that can on the CPU with gloo, to find out whether the script itself is sound.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from sharded import fit, optimizer_state, set_up, weights
from torch import Tensor, nn
from training import Net, batches, largest_difference, part

from lightning.fabric import collectives
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.precision import HalfPrecision, MixedPrecision
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.sharding import total_norm
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

ON_HOST = "--host" in sys.argv
SIZE = 2 if ON_HOST else min(torch.cuda.device_count(), 2)
DEVICES = [torch.device("cpu")] * 2 if ON_HOST else [torch.device("cuda", index) for index in range(SIZE)]
KIND = DEVICES[0].type


def fsdp(environment: Any = None, **kwargs: Any) -> FSDPStrategy:
    from lightning.fabric.accelerators.cpu import CPUAccelerator
    from lightning.fabric.accelerators.cuda import CUDAAccelerator

    accelerator: Any = CPUAccelerator() if ON_HOST else CUDAAccelerator()
    options = {"auto_wrap_policy": {nn.Linear}, "timeout": timedelta(seconds=60), **kwargs}
    return FSDPStrategy(accelerator, DEVICES, environment, **options)


class Odd(Net):
    """With a number, a weight in two places, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.optional.weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.tied(self.optional(torch.tanh(self.first(batch))))
        return (self.last(hidden) * self.scale - batch.sum(1, keepdim=True)).square().mean()


def alone(**kwargs: Any) -> list[Any]:
    strategy = SingleDeviceStrategy(DEVICES[0])
    optimizer = set_up(strategy, Odd(), torch.optim.AdamW, lr=0.01)
    losses = fit(strategy, optimizer, [batch.to(DEVICES[0]) for batch in batches()], **kwargs)
    return [weights(strategy), optimizer_state(optimizer), losses]


def local(rank: int) -> list[Tensor]:
    return [part(batch, rank, SIZE).to(DEVICES[rank]) for batch in batches()]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"sharding_strategy": "SHARD_GRAD_OP"},
    {"sharding_strategy": "NO_SHARD"},
    {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (SIZE, 1)},
    {"cpu_offload": True},
    {"activation_checkpointing_policy": {nn.Linear}},
    {"forward_prefetch": True},
]


def check_weights_are_those_of_one_gpu(rank: int) -> None:
    for kwargs in VARIANTS:
        for fused in (False, True):
            strategy = fsdp(**kwargs)
            optimizer = set_up(strategy, Odd(), torch.optim.AdamW, lr=0.01, fused=fused)
            fit(strategy, optimizer, local(rank))
            expected = alone()
            assert largest_difference(weights(strategy), expected[0]) < 1e-5, (kwargs, fused)
            strategy.teardown()


def check_accumulation_and_clipping(rank: int) -> None:
    pieces = [piece for batch in local(rank) for piece in batch.split(1)]
    for kwargs in VARIANTS[:5]:
        for clip in ((0.1, "norm"), (0.01, "value")):
            strategy = fsdp(**kwargs)
            optimizer = set_up(strategy, Odd(), torch.optim.AdamW, lr=0.01)
            fit(strategy, optimizer, pieces, accumulate=len(pieces) // 4, clip=clip)
            assert largest_difference(weights(strategy), alone(clip=clip)[0]) < 1e-5, (kwargs, clip)
            strategy.teardown()


def check_norm(rank: int) -> None:
    reference = Odd().to(DEVICES[0])
    reference.training_step(batches()[0].to(DEVICES[0]), 0).backward()
    expected = torch.linalg.vector_norm(torch.cat([p.grad.reshape(-1) for p in reference.parameters() if p.grad is not None]))
    for kwargs in VARIANTS[:5]:
        strategy = fsdp(**kwargs)
        optimizer = set_up(strategy, Odd(), lr=0.1)
        strategy.backward(strategy.bind("training_step")(local(rank)[0], 0))
        found = total_norm([p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None])
        torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-6, atol=0)
        strategy.teardown()


def check_scaler(rank: int) -> None:
    for kwargs in ({}, {"cpu_offload": True}):
        for fused in (False, True):
            scaler = torch.amp.GradScaler(KIND, init_scale=2.0**10, growth_interval=100)  # type: ignore[attr-defined]
            strategy = fsdp(precision=MixedPrecision("16-mixed", KIND, scaler), **kwargs)
            optimizer = set_up(strategy, Odd(), torch.optim.AdamW, lr=0.01, fused=fused)
            before, data = weights(strategy), local(rank)
            if rank == SIZE - 1:
                data[1] = data[1] * float("inf")
            fit(strategy, optimizer, data[1:2])
            assert weights(strategy) == before, (kwargs, fused)
            assert strategy.precision.scaler.get_scale() == 2.0**9  # type: ignore[attr-defined]
            fit(strategy, optimizer, [data[0], data[2]])
            assert weights(strategy) != before
            strategy.teardown()


class Varied(nn.Module):
    """Layers that treat the dtypes of their inputs and weights in different ways; the first one gets float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.batch_norm = nn.BatchNorm1d(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 8)
        self.embedding = nn.Embedding(4, 8)
        self.act = nn.PReLU()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.rms = nn.RMSNorm(8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(8, 3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.encoder(self.norm(batch)) + self.embedding(torch.arange(4, device=batch.device))
        x = self.group_norm(self.conv(self.batch_norm(x.transpose(1, 2)))).transpose(1, 2)
        x = self.rms(self.lstm(self.act(x))[0]) * self.scale
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), torch.zeros(len(batch) * 4, dtype=torch.int64, device=batch.device))


def check_mixed_precision_is_that_of_autocast(rank: int) -> None:
    data = [torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICES[rank]) for seed in range(4)]
    torch.manual_seed(3)
    reference = SingleDeviceStrategy(DEVICES[rank], precision=MixedPrecision("bf16-mixed", KIND))
    optimizer = set_up(reference, Varied(), lr=0.05)
    expected = fit(reference, optimizer, data)
    for policy in ({nn.Linear}, {nn.TransformerEncoderLayer}, {nn.TransformerEncoderLayer, nn.LSTM, nn.Conv1d}):
        torch.manual_seed(3)
        strategy = fsdp(precision=MixedPrecision("bf16-mixed", KIND), auto_wrap_policy=policy)
        losses = fit(strategy, set_up(strategy, Varied(), lr=0.05), data)
        assert max(abs(found - wanted) for found, wanted in zip(losses, expected)) < 0.03, (losses, expected)
        gathered = strategy.mixed_precision_config.param_dtype
        assert gathered == (None if ON_HOST else torch.bfloat16), gathered
        strategy.teardown()


class Checkpoints:
    """Save under one form and number of devices, go on under another."""

    folder = ""

    def __call__(self, rank: int) -> None:
        expected = alone()
        for kind in ("full", "sharded"):
            for kwargs in ({}, {"cpu_offload": True}, {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (SIZE, 1)}):
                path = os.path.join(Checkpoints.folder, f"{kind}-{len(kwargs)}-{'cpu_offload' in kwargs}.ckpt")
                strategy = fsdp(state_dict_type=kind, **kwargs)
                optimizer = set_up(strategy, Odd(), torch.optim.AdamW, lr=0.01)
                fit(strategy, optimizer, local(rank)[:2])
                state = {"state_dict": strategy.lightning_module_state_dict(), "optimizer_states": [strategy.optimizer_state(optimizer)]}
                strategy.save_checkpoint(state, path)
                kept = weights(strategy)
                strategy.teardown()
                assert all(parameter.device.type == "cpu" for parameter in strategy.module.parameters())  # type: ignore[union-attr]
                assert weights(strategy) == kept  # also gathered from the host
                collectives.barrier()
                after = fsdp()
                optimizer = set_up(after, Odd(), torch.optim.AdamW, lr=0.01)
                checkpoint = after.load_checkpoint(path)
                after.load_model_state_dict(checkpoint)
                after.load_optimizer_state(optimizer, checkpoint["optimizer_states"][0])
                fit(after, optimizer, local(rank)[2:])
                assert largest_difference(weights(after), expected[0]) < 1e-5, (kind, kwargs)
                again = fsdp()
                again.connect(after.module)  # type: ignore[arg-type]
                after.teardown()
                again.setup_module(after.module, training=False)  # type: ignore[arg-type]
                assert all(parameter.device.type == KIND for parameter in again.module.parameters())  # type: ignore[union-attr]
                with torch.no_grad():
                    again.bind("validation_step")(local(rank)[0], 0)
                alone_again = SingleDeviceStrategy(DEVICES[rank])
                alone_again.connect(Odd())
                alone_again.load_model_state_dict(alone_again.load_checkpoint(path))
                assert weights(alone_again) == kept


check_checkpoints = Checkpoints()
check_checkpoints.__name__ = "check_checkpoints"  # type: ignore[attr-defined]


def check_meta_device(rank: int) -> None:
    torch.manual_seed(7)
    with DEVICES[rank]:
        eager = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3))
    for kwargs in ({}, {"cpu_offload": True}):
        torch.manual_seed(7)
        strategy = fsdp(**kwargs)
        with strategy.module_init_context(empty_init=True):
            module = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3))
        strategy.connect(module)
        strategy.setup_module(module)
        assert weights(strategy) == {name: value.tolist() for name, value in eager.state_dict().items()}


# ---- speed --------------------------------------------------------------------------------------------------------------

WIDTH, LAYERS, TOKENS, BATCH = (64, 2, 16, 4) if ON_HOST else (2048, 12, 1024, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.blocks(batch)).square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)  # type: ignore[no-any-return]


class Loop:
    """Trains a model, by hand or by the strategy, so much per step that the GPU, and not the host, decides how long it takes."""

    def __init__(self, rank: int, by_strategy: bool) -> None:
        torch.manual_seed(rank)
        self.batch = torch.randn(BATCH, TOKENS, WIDTH, device=DEVICES[rank], dtype=torch.bfloat16)
        self.strategy: FSDPStrategy | None = None
        if not by_strategy:
            self.by_hand(rank)
            return
        self.strategy = strategy = fsdp(auto_wrap_policy={Block}, precision=HalfPrecision("bf16-true"))
        self.optimizer = optimizer = set_up(strategy, Model(), torch.optim.AdamW, fused=True)
        self.step = partial(strategy.bind("training_step"), batch_idx=0)
        self.clip: Callable[[], Any] = lambda: strategy.clip_gradients(optimizer, 1.0)

    def by_hand(self, rank: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(KIND, (SIZE,))
        model = Model().to(DEVICES[rank], torch.bfloat16)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.step = model  # type: ignore[assignment]
        self.clip = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def run(self, count: int) -> float:
        """Seconds of a step."""
        collectives.barrier()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad()
            self.step(self.batch).backward()
            self.clip()
            self.optimizer.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / count


def peak_memory(rank: int, by_strategy: bool) -> float:
    """GiB."""
    gc.collect()  # what the models before held
    torch.cuda.empty_cache()
    loop = Loop(rank, by_strategy)
    loop.run(5)
    torch.cuda.reset_peak_memory_stats()
    loop.run(5)
    if loop.strategy is not None:
        loop.strategy.teardown()
    return torch.cuda.max_memory_allocated() / 2**30


def check_speed_and_memory_beside_a_hand_written_loop(rank: int) -> None:
    """Memory of each alone; the median ratio of the times of neighbouring blocks of steps."""
    hand_gib, strategy_gib = peak_memory(rank, by_strategy=False), peak_memory(rank, by_strategy=True)
    torch.cuda.empty_cache()
    hand, strategy = Loop(rank, by_strategy=False), Loop(rank, by_strategy=True)
    hand.run(5)
    strategy.run(5)
    torch.cuda.set_sync_debug_mode("error")  # a step, and clipping, read nothing from the device
    for _ in range(3):
        strategy.optimizer.zero_grad()
        strategy.step(strategy.batch).backward()
        strategy.clip()
        strategy.optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    pairs = []
    for turn in range(10):
        both = (hand, strategy) if turn % 2 else (strategy, hand)
        seconds = {loop: loop.run(5) for loop in both}
        pairs.append((seconds[strategy], seconds[hand]))
    ratio = median(ours / by_hand for ours, by_hand in pairs)
    if rank == 0:
        print(
            f"  {LAYERS} layers of {WIDTH}: {ratio:.4f} of the time by hand; peak GiB {strategy_gib:.3f}, by hand {hand_gib:.3f}",
            flush=True,
        )
        print(f"  seconds a step (strategy, hand): {[(round(ours, 4), round(by_hand, 4)) for ours, by_hand in pairs]}", flush=True)
    assert ratio < 1.02
    assert strategy_gib < hand_gib * 1.02


CHECKS: list[Any] = [
    check_norm,
    check_weights_are_those_of_one_gpu,
    check_accumulation_and_clipping,
    check_scaler,
    check_mixed_precision_is_that_of_autocast,
    check_checkpoints,
    check_meta_device,
    *([] if ON_HOST else [check_speed_and_memory_beside_a_hand_written_loop]),
]


def main(rank: int, port: int, folder: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    Checkpoints.folder = folder
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    strategy = fsdp(LightningEnvironment())
    strategy.setup_environment()
    for check in CHECKS:
        started = time.perf_counter()
        check(rank)
        if rank == 0:
            print(
                f"ok {check.__name__} ({strategy.process_group_backend}, {SIZE} processes, {time.perf_counter() - started:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    where = tempfile.mkdtemp()
    try:
        torch.multiprocessing.spawn(main, (find_free_network_port(), where), nprocs=SIZE)  # type: ignore[no-untyped-call]
    finally:
        shutil.rmtree(where)
    print("all is well")
