"""Check DeepSpeedStrategy on the GPUs of this machine, at most two: ``python tests/gpu/check_deepspeed_cuda.py``.

A plain script that needs torch, numpy and deepspeed only. Each check asserts and prints a line; what the machine lacks (a compiler
for DeepSpeed's optimizer on the CPU) is shown as skipped.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from torch import Tensor, nn
from training import Net, batches, largest_difference, part, plain

from lightning.fabric.accelerators.cuda import CUDAAccelerator
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.precision import build_precision
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy

SIZE = min(torch.cuda.device_count(), 2)
DATA = batches(12)


def deepspeed_strategy(precision: str = "32-true", **arguments: Any) -> DeepSpeedStrategy:
    devices = [torch.device("cuda", index) for index in range(SIZE)]
    strategy = DeepSpeedStrategy(
        CUDAAccelerator(),
        parallel_devices=devices,
        cluster_environment=LightningEnvironment(),
        precision=build_precision(precision, "cuda"),
        timeout=timedelta(seconds=60),
        **arguments,
    )
    zero = strategy.config.get("zero_optimization")
    if zero is not None:  # else weights as small as these stay whole everywhere
        zero["stage3_param_persistence_threshold"] = 0
    strategy.setup_environment()
    return strategy


def prepared(strategy: Strategy, optimizer: Callable[..., Any], clip: float | None = None) -> tuple[nn.Module, Any]:
    with strategy.module_init_context():
        module = Net()
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    strategy.prepare_training(1, clip, "norm")
    strategy.optimizers = strategy.wrap_optimizers([optimizer(module.parameters())], [])
    return module, strategy.optimizers[0]


def train(
    strategy: Strategy, data: list[Tensor], optimizer: Callable[..., Any], accumulate: int = 1, clip: float | None = None
) -> tuple[list[float], dict[str, Any]]:
    """Train as the loop of a trainer does; return losses and weights."""
    module, steps = prepared(strategy, optimizer, clip)
    return run_loop(strategy, steps, data, accumulate, clip), weights_of(strategy, module)


def run_loop(strategy: Strategy, steps: Any, data: list[Tensor], accumulate: int = 1, clip: float | None = None) -> list[float]:
    step = strategy.bind("training_step")
    losses = []
    for index, batch in enumerate(data):
        last = (index + 1) % accumulate == 0

        def closure(batch: Tensor = batch, index: int = index, last: bool = last) -> Tensor:
            with strategy.precision.forward_context():
                loss: Tensor = step(strategy.precision.convert_input(batch.to(strategy.root_device)), index)
            if index % accumulate == 0:
                steps.zero_grad()
            strategy.backward(loss / accumulate)
            losses.append(loss.item())
            if last and clip is not None:
                strategy.clip_gradients(steps, clip)
            return loss

        if last:
            strategy.optimizer_step(steps, closure)
        else:
            with strategy.no_backward_sync():
                closure()
    return losses


def weights_of(strategy: Strategy, module: nn.Module) -> dict[str, Any]:
    return plain({name: value.float() for name, value in strategy.get_module_state_dict(module).items()})


def own(rank: int) -> list[Tensor]:
    return [part(batch, rank, SIZE) for batch in DATA]


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


# ---- numbers --------------------------------------------------------------------------------------------------------------


def check_weights_are_those_of_one_gpu(rank: int) -> None:
    for accumulate, clip in ((1, None), (3, 0.3)):
        alone = SingleDeviceStrategy(torch.device("cuda", rank))
        losses, weights = train(alone, DATA, sgd, accumulate, clip)
        for arguments in ({"zero_optimization": False}, {"stage": 1}, {"stage": 2}, {"stage": 3}):
            ours, found = train(deepspeed_strategy(**arguments), own(rank), sgd, accumulate, clip)
            mean = torch.tensor(ours, device="cuda")
            torch.distributed.all_reduce(mean)
            difference = float((mean.cpu() / SIZE - torch.tensor(losses)).abs().max())
            assert difference < 1e-4, (arguments, difference)
            if rank == 0:
                assert largest_difference(found, weights) < 1e-5, arguments


def check_sixteen_bits_learn(rank: int) -> None:
    for precision in ("16-mixed", "bf16-mixed", "16-true", "bf16-true"):
        for stage in (1, 2, 3):
            losses, _ = train(deepspeed_strategy(precision, stage=stage, initial_scale_power=8), own(rank) * 4, adam, clip=1.0)
            assert all(loss == loss for loss in losses)
            assert sum(losses[-12:]) < 0.5 * sum(losses[:12]), (precision, stage, losses[:3], losses[-3:])


def check_overflow_is_skipped_and_the_scale_falls(rank: int) -> None:
    strategy = deepspeed_strategy("16-mixed", stage=2, initial_scale_power=32, hysteresis=1)
    module, steps = prepared(strategy, adam)
    before = weights_of(strategy, module)
    run_loop(strategy, steps, own(rank)[:2])
    engine = strategy.deepspeed_engine
    assert engine.skipped_steps == 2
    assert engine.optimizer.loss_scale < 2**32
    assert weights_of(strategy, module) == before


def check_offloading(rank: int) -> None:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        DeepSpeedCPUAdam([nn.Parameter(torch.ones(8))])
    except Exception as error:
        if rank == 0:
            print(f"skipped check_offloading: DeepSpeed's optimizer on the CPU can't be compiled here ({error!r:.200})", flush=True)
        return
    alone = SingleDeviceStrategy(torch.device("cuda", rank))
    _, weights = train(alone, DATA, lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0), 2, 0.3)
    for arguments in ({"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 3, "offload_parameters": True}):
        strategy = deepspeed_strategy(offload_optimizer=True, pin_memory=True, **arguments)
        _, found = train(strategy, own(rank), lambda p: DeepSpeedCPUAdam(p, lr=0.02), 2, 0.3)
        if rank == 0:
            assert largest_difference(found, weights) < 1e-4, arguments


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


def check_checkpoints(rank: int) -> None:
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    folder = deepspeed_strategy().broadcast(tempfile.mkdtemp() if rank == 0 else "")
    for stage in (1, 2, 3):
        for precision in ("32-true", "bf16-mixed", "16-mixed"):
            path = os.path.join(folder, f"{stage} {precision}.ckpt")
            strategy = deepspeed_strategy(precision, stage=stage, initial_scale_power=8)
            module, steps = prepared(strategy, adam)
            run_loop(strategy, steps, own(rank)[:6])
            strategy.save_checkpoint({"state_dict": {}, "epoch": 0, "lr_schedulers": []}, path)
            run_loop(strategy, steps, own(rank)[6:])
            expected = weights_of(strategy, module)
            other = deepspeed_strategy(precision, stage=stage, initial_scale_power=8)
            module, steps = prepared(other, adam)
            checkpoint = other.load_checkpoint(path)
            assert checkpoint["epoch"] == 0
            other.load_model_state_dict(checkpoint)
            run_loop(other, steps, own(rank)[6:])
            found = weights_of(other, module)
            if rank == 0:
                assert largest_difference(found, expected) < 1e-6, (stage, precision)
                weights = convert_zero_checkpoint_to_fp32_state_dict(path, f"{path}.whole")["state_dict"]
                Net().load_state_dict(weights)


# ---- memory and speed -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """200 million parameters in layers of 4 million."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(48)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).float().square().mean()

    def forward(self, batch: Tensor) -> Tensor:
        return self.training_step(batch, 0)


def check_weights_are_divided_while_they_are_built(rank: int) -> None:
    if SIZE == 1:
        return
    strategy = deepspeed_strategy("bf16-true", stage=3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with strategy.module_init_context():
        module = Block()
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    whole = 2 * 48 * 2048 * 2048
    assert all(parameter.numel() == 0 for parameter in module.parameters())
    assert held < 0.6 * whole, held
    assert peak < 0.7 * whole, peak


def timed(step: Callable[[Tensor], None], rank: int, warm_up: int) -> float:
    batch = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(rank))
    for _ in range(warm_up):
        step(batch)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    started = time.perf_counter()
    for _ in range(20):
        step(batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / 20


def check_speed_beside_a_hand_written_loop(rank: int) -> None:
    """One engine, driven by hand and by the strategy, in turns: the median of the ratios of neighbours."""
    for stage in (2, 3):
        strategy = deepspeed_strategy("bf16-mixed", stage=stage)
        module = Block()
        strategy.connect(module)
        strategy.model = strategy.setup_module(module)
        strategy.prepare_training(1, 1.0, "norm")
        (steps,) = strategy.wrap_optimizers([torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)], [])
        bound, engine = strategy.bind("training_step"), strategy.deepspeed_engine

        def by_strategy(batch: Tensor, strategy: Any = strategy, bound: Any = bound, steps: Any = steps) -> None:
            def closure() -> Tensor:
                loss: Tensor = bound(batch, 0)
                steps.zero_grad()
                strategy.backward(loss)
                strategy.clip_gradients(steps, 1.0)
                return loss

            strategy.optimizer_step(steps, closure)

        def by_hand(batch: Tensor, engine: Any = engine) -> None:
            engine.backward(engine(batch))
            engine.step()

        timed(by_hand, rank, 20)
        pairs = []
        for turn in range(16):
            both = [by_strategy, by_hand] if turn % 2 else [by_hand, by_strategy]
            seconds = {step: timed(step, rank, 3) for step in both}
            pairs.append((seconds[by_strategy], seconds[by_hand]))
        ratio = median(strategy / hand for strategy, hand in pairs)
        if rank == 0:
            print(f"  ZeRO {stage}, 200 M parameters: {ratio:.4f} of the time by hand; seconds (strategy, hand): {pairs}", flush=True)
        assert ratio < 1.02, pairs
        assert strategy.engine is not None
        strategy.engine.release()
        del strategy, module, steps, bound, engine, by_strategy, by_hand
        torch.cuda.empty_cache()


CHECKS = [
    check_weights_are_those_of_one_gpu,
    check_sixteen_bits_learn,
    check_overflow_is_skipped_and_the_scale_falls,
    check_offloading,
    check_checkpoints,
    check_weights_are_divided_while_they_are_built,
    check_speed_beside_a_hand_written_loop,
]


def main(rank: int, port: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_PORT=str(port), DS_ACCELERATOR="cuda")
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False
    for check in CHECKS:
        if len(sys.argv) > 1 and not any(word in check.__name__ for word in sys.argv[1:]):
            continue
        started = time.perf_counter()
        check(rank)
        if rank == 0:
            print(f"ok {check.__name__} ({SIZE} GPUs, {time.perf_counter() - started:.1f} s)", flush=True)


if __name__ == "__main__":
    if find_spec("deepspeed") is None:
        print("skipped: the package deepspeed is not installed")
    elif SIZE == 0:
        print("skipped: there is no GPU")
    else:
        torch.multiprocessing.spawn(main, (find_free_network_port(),), nprocs=SIZE)  # type: ignore[no-untyped-call]
        print("all is well")
