"""Check Fabric on CUDA machines: ``python tests/gpu/check_fabric_cuda.py``, with two GPUs also in two processes.

A plain script that needs torch only. Each check asserts and prints a line. ``--device cpu`` runs what needs no GPU, in two gloo
processes where it takes two.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from torch import Tensor, nn

from lightning.fabric import Fabric
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.sharding import full_state

STEPS, SAMPLES = 40, 32
WAYS = {"32-true": None, "64-true": torch.float64, "bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 16))


def make_batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(SAMPLES, 64, generator=generator).to(device) for _ in range(STEPS)]
    return [(x, x[:, :16].argmax(1)) for x in inputs]


def train(fabric: Fabric, batches: list[tuple[Tensor, Tensor]], watch: bool = False) -> tuple[list[Tensor], Any, Any]:
    module = fabric.to_device(make_model())
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True))
    losses = []
    for index, (x, y) in enumerate(batches):
        if watch and index == 1:
            torch.cuda.set_sync_debug_mode("error")
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    if watch:
        torch.cuda.set_sync_debug_mode("default")
    return losses, model, optimizer


def train_by_hand(name: str, device: torch.device) -> tuple[list[Tensor], nn.Module]:
    dtype = WAYS[name]
    true = dtype if name.endswith("true") and dtype is not None else torch.float32
    model = make_model().to(device, true)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=name == "16-mixed")
    losses = []
    for x, y in make_batches(device):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype) if name.endswith("mixed") else nullcontext():
            output = model(x.to(true))
        loss = nn.functional.cross_entropy(output.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return losses, model


def check_parity(name: str, device: torch.device) -> None:
    fabric = Fabric(accelerator=device.type, devices=1, precision=name)  # type: ignore[arg-type]
    losses, model, _ = train(fabric, make_batches(fabric.device))
    expected, by_hand = train_by_hand(name, fabric.device)
    assert torch.equal(torch.stack(losses), torch.stack(expected)), name
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), by_hand.parameters())), name
    assert torch.stack(losses[-5:]).mean() < 0.95 * losses[0], name


def check_runs_ahead(name: str) -> None:
    """From the second step on nothing waits for the GPU."""
    fabric = Fabric(accelerator="cuda", devices=1, precision=name)  # type: ignore[arg-type]
    train(fabric, make_batches(fabric.device), watch=True)


def check_memory_and_speed(name: str, device: torch.device) -> None:
    fabric = Fabric(accelerator="cuda", devices=1, precision=name)  # type: ignore[arg-type]
    peaks, seconds = [], []
    for run in (lambda: train(fabric, make_batches(device)), lambda: train_by_hand(name, device)) * 2:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.02 * peaks[3], peaks
    print(f"    {name}: {1e6 * seconds[2] / STEPS:.0f} us a step, by hand {1e6 * seconds[3] / STEPS:.0f} us")


def in_two(fabric: Fabric, folder: str) -> tuple[dict[str, Any], float]:
    """Train on a half of each batch, save, load, and return the weights that were loaded."""
    batches = [(x[fabric.global_rank :: 2], y[fabric.global_rank :: 2]) for x, y in make_batches(fabric.device)]
    _, model, optimizer = train(fabric, batches)
    fabric.backward(nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]))
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
    fabric.save(Path(folder, "last.ckpt"), {"model": model, "optimizer": optimizer})
    _, other, other_optimizer = train(fabric, [])
    fabric.load(Path(folder, "last.ckpt"), {"model": other, "optimizer": other_optimizer})
    weights = full_state(dict(other.state_dict()), rank0_only=False)
    return {name: value.cpu() for name, value in weights.items()}, float(full_state(norm, rank0_only=False))


def strategies() -> dict[str, Callable[[], Any]]:
    def fsdp(kind: Any) -> FSDPStrategy:
        strategy = FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type=kind)
        strategy.start_method = "spawn"
        return strategy

    return {"ddp": lambda: "ddp_spawn", "fsdp, full": lambda: fsdp("full"), "fsdp, sharded": lambda: fsdp("sharded")}


def check_two_processes(name: str, device: torch.device) -> None:
    fabric = Fabric(accelerator=device.type, devices=1)
    _, model, optimizer = train(fabric, make_batches(fabric.device))
    x, y = make_batches(fabric.device)[0]
    fabric.backward(nn.functional.cross_entropy(model(x), y))
    expected = fabric.clip_gradients(model, optimizer, max_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        two = Fabric(accelerator=device.type, devices=2, strategy=strategies()[name]())
        weights, norm = two.launch(in_two, folder)
    for key, value in model.state_dict().items():
        assert torch.allclose(value.cpu(), weights[key], atol=2e-4), (name, key, (value.cpu() - weights[key]).abs().max())
    assert expected is not None
    assert abs(expected.item() - norm) < 1e-2 * expected.item(), (name, expected, norm)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    cuda = device.type == "cuda"
    checks: list[tuple[str, Callable[[], None]]] = []
    checks += [(f"parity {name}", partial(check_parity, name, device)) for name in WAYS if cuda or name != "16-mixed"]
    if cuda:
        checks += [(f"runs ahead {name}", partial(check_runs_ahead, name)) for name in WAYS]
        checks += [(f"memory {name}", partial(check_memory_and_speed, name, torch.device("cuda:0"))) for name in ("32-true", "bf16-mixed")]
    if not cuda or torch.cuda.device_count() > 1:
        checks += [(f"two processes, {name}", partial(check_two_processes, name, device)) for name in strategies()]
    else:
        print("there is one GPU: two processes are not checked")
    for title, check in checks:
        check()
        print(f"ok  {title}", flush=True)
    print(f"all {len(checks)} checks passed, torch {torch.__version__}")


if __name__ == "__main__":
    main()
