"""Check ``Trainer(compile="step", strategy="ddp")`` with NCCL: ``python tests/gpu/check_replayed_ddp_cuda.py [--devices N]``.

A plain script that needs torch only; it starts itself once for each further GPU. Each check asserts, and the first process prints a line.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from torch import Tensor, nn
from trainer_checks.common import Batches, batches
from trainer_checks.compiled import Losses, Task, weights_of

import lightning.pytorch as L
from lightning.pytorch.loops import graph_recording
from lightning.pytorch.strategies import DDPStrategy

REPLAYS = [0]


class Counted(graph_recording.CudaRecorder):
    """Counts what is replayed."""

    def end(self) -> Any:
        replay = super().end()

        def counted() -> None:
            REPLAYS[0] += 1
            replay()

        return counted


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def trained(devices: int, compile: Any, task: dict[str, Any], data: Any, **options: Any) -> tuple[list[float], list[Tensor], list[str]]:
    """Losses, weights and what was told."""
    losses = Losses()
    plain: dict[str, Any] = {
        "accelerator": "gpu", "devices": devices, "max_epochs": 3, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "strategy": DDPStrategy(gradient_as_bucket_view=False),  # norms of views are rounded otherwise
    }  # fmt: skip
    torch.manual_seed(0)
    module = Task(**task)
    torch.manual_seed(1 + rank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(compile=compile, callbacks=[losses], **{**plain, **options}).fit(module, data)
    told = [str(each.message) for each in caught if "compile='step'" in str(each.message)]
    return [loss.item() for loss in losses.losses], weights_of(module), told


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain, with batch normalisation": ({}, {}),
    "clipping, bf16-mixed": ({}, {"gradient_clip_val": 0.5, "precision": "bf16-mixed"}),
    "accumulation, dropout": ({"dropout": 0.3}, {"accumulate_grad_batches": 2}),
    "16-mixed, logs": ({"log": {"on_step": True, "on_epoch": True, "sync_dist": True}}, {"precision": "16-mixed"}),
    "scheduler per step": ({"schedule": "step"}, {}),
}


def check_equal(devices: int) -> None:
    data = batches(10 + devices, pin=True)
    own = Batches(data.data[rank() : 10 + rank()])  # others than those of other processes
    for name, (task, options) in CASES.items():
        torch.use_deterministic_algorithms(True)
        losses, weights, _ = trained(devices, None, task, own, **options)
        REPLAYS[0] = 0
        ours, replayed, told = trained(devices, "step", task, own, **options)
        torch.use_deterministic_algorithms(False)
        assert not told, told
        assert REPLAYS[0] >= 15, REPLAYS[0]
        if devices <= 2:
            assert ours == losses, (name, [(a, b) for a, b in zip(ours, losses) if a != b][:2])
            assert all(torch.equal(a, b) for a, b in zip(replayed, weights)), name
        else:
            for a, b in zip(replayed, weights):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        say(f"ok  equal to eager steps: {name}, {REPLAYS[0]} replays")


class Deep(L.LightningModule):
    """Many small layers: the host takes longer to launch a step than the GPU to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(layer for _ in range(24) for layer in (nn.Linear(256, 256), nn.GELU())))
        self.times: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 50 == 49:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


def check_speed(devices: int) -> None:
    data = Batches([torch.randn(128, 256).pin_memory() for _ in range(4)] * 100)
    micros = {}
    for compile in (None, "step"):
        module = Deep()
        L.Trainer(
            accelerator="gpu", devices=devices, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, compile=compile,
        ).fit(module, data)  # fmt: skip
        blocks = [b - a for a, b in zip(module.times, module.times[1:])]
        micros[compile] = statistics.median(blocks[1:]) / 50 * 1e6
    say(f"    24 layers on {devices} GPUs: {micros[None]:.0f} microseconds per eager step of DDP, {micros['step']:.0f} replayed")
    assert micros["step"] < 0.7 * micros[None]
    say("ok  speed")


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count())
    devices = parser.parse_args().devices
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    graph_recording.recorder_of = Counted  # type: ignore[assignment]
    check_equal(devices)
    check_speed(devices)
    say(f"all passed on {devices} GPUs, torch {torch.__version__}")


if __name__ == "__main__":
    main()
