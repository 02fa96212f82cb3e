"""One process of one variant of ``multi_gpu.py``: trains, and writes what it has measured."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))

from models import GPT, LARGE, TINY, Block, Sequences
from multi_gpu import fill_in, parser

CLIP, LR = 1.0, 1e-4


class Stopwatch:
    """Takes the time at the first step of each block, when the device is done, and the most memory that was ever allocated.

    Args:
        device: where the model trains.
        warm_up: steps before the first block.
        blocks: how many are measured.
        steps: in a block.
    """

    def __init__(self, device: torch.device, warm_up: int, blocks: int, steps: int) -> None:
        self.device, self.first, self.last, self.steps = device, warm_up, warm_up + blocks * steps, steps
        self.times: list[float] = []
        self.between: Callable[[], float] | None = None  # another loop's block, to be run before each one; its seconds
        self.others: list[float] = []
        self.paused: list[float] = []
        self.before = self.peak = 0.0

    def step_starts(self, index: int) -> None:
        """To be called before each step."""
        if index < self.first or index > self.last or (index - self.first) % self.steps:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        if self.between is not None:
            self.others.append(self.between())
            self.paused.append(time.perf_counter() - self.times[-1])
        if index == self.first:
            self.before = self.allocated()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        if index == self.last:
            self.peak = self.allocated()

    def allocated(self) -> float:
        """GiB at most: on a GPU since the last reset, else of the whole process since it began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def write(self, folder: str, rank: int, loss: Tensor, model: nn.Module, context: int, version: str | None) -> None:
        """What this process has measured, as JSON."""
        paused = self.paused or [0.0] * len(self.times)
        figures = {
            "seconds": [end - start - pause for start, end, pause in zip(self.times, self.times[1:], paused)],
            "others": self.others,
            "peak_memory": self.peak,
            "peak_memory_with_setup": max(self.before, self.peak),
            "loss": float(loss),
            "context": context,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "torch": torch.__version__,
            "version": version,
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU process",
        }
        Path(folder, f"rank{rank}.json").write_text(json.dumps(figures))


def make_model(size: Any) -> GPT:
    """The same weights in every process and variant."""
    torch.manual_seed(1)
    return GPT(size)


def make_data(args: Any, size: Any) -> Sequences:
    steps = args.warm_up + args.blocks * args.steps + 1  # the first step after the last block ends it
    return Sequences(steps * args.devices * args.batch, size)


# ---- by hand --------------------------------------------------------------------------------------------------------


class HandWritten:
    """The loop that one would write, in a process that is in its group.

    Args:
        args: the options of the benchmark.
        size: of the model.
        device: where it trains.
        rank: of this process.
    """

    def __init__(self, args: Any, size: Any, device: torch.device, rank: int) -> None:
        from torch.utils.data import DistributedSampler

        self.device, self.autocasts = device, args.precision == "bf16-mixed"
        if args.precision == "bf16-true":
            torch.set_default_dtype(torch.bfloat16)
        with device:
            model = make_model(size)
        torch.set_default_dtype(torch.float32)
        self.model = distributed(model, device, args).train()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=True)
        data = make_data(args, size)
        sampler: Any = DistributedSampler(data, args.devices, rank, shuffle=True)
        self.loader = DataLoader(data, args.batch, sampler=sampler, pin_memory=device.type == "cuda")

    def step(self, tokens: Tensor) -> Tensor:
        """Train on a batch; the loss."""
        tokens = tokens.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocasts else nullcontext():
            loss: Tensor = self.model(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def by_hand(args: Any, size: Any) -> None:
    """Train by hand, alone."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    loop = HandWritten(args, size, device, rank)
    watch = Stopwatch(device, args.warm_up, args.blocks, args.steps)
    for index, tokens in enumerate(loop.loader):
        watch.step_starts(index)
        loss = loop.step(tokens)
    watch.write(args.out, rank, loss, loop.model, size.context, None)
    dist.destroy_process_group()


def distributed(model: nn.Module, device: torch.device, args: Any) -> nn.Module:
    """The model under DDP or FSDP2."""
    if args.engine == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: Any = {"mesh": init_device_mesh(device.type, (args.devices,))}
    if args.precision == "bf16-mixed" and device.type == "cuda":  # weights travel in what autocast would convert them to
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)  # type: ignore[arg-type]
    return fully_shard(model, **options)


def blocks_by_hand(args: Any, size: Any, device: torch.device, rank: int) -> Callable[[], float]:
    """What trains another model by hand for a block of steps, and returns their seconds; it is warm."""
    args.blocks += 1  # one more than the trainer: before its first, and after its last
    loop = HandWritten(args, size, device, rank)
    args.blocks -= 1
    batches = iter(loop.loader)

    def block(steps: int = args.steps) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            loop.step(next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    block(args.warm_up)
    return block


# ---- by a trainer ---------------------------------------------------------------------------------------------------


def by_trainer(args: Any, size: Any) -> None:
    """The same with ``Trainer(strategy=...)``, of whichever ``lightning`` is installed; only public names are used."""
    name = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
    L, strategies = import_module(name), import_module(f"{name}.strategies")

    class Model(L.LightningModule):  # type: ignore[name-defined,misc]
        def configure_model(self) -> None:
            with self.trainer.strategy.root_device:
                self.gpt = make_model(size)

        def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.gpt(tokens)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, fused=True)

        def train_dataloader(self) -> DataLoader[Tensor]:
            return DataLoader(make_data(args, size), args.batch, shuffle=True, pin_memory=args.device == "cuda")

    class Watch(L.Callback):  # type: ignore[name-defined,misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.watch = Stopwatch(trainer.strategy.root_device, args.warm_up, args.blocks, args.steps)
                if args.writer == "both":
                    self.watch.between = blocks_by_hand(args, size, trainer.strategy.root_device, trainer.global_rank)
            self.watch.step_starts(batch_idx)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == self.watch.last:
                self.watch.write(args.out, trainer.global_rank, outputs["loss"], pl_module, size.context, L.__version__)

    trainer = L.Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=args.devices,
        strategy="ddp" if args.engine == "ddp" else strategies.FSDPStrategy(auto_wrap_policy={Block}),
        precision=args.precision,
        max_epochs=1,
        gradient_clip_val=CLIP,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model())


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--engine", required=True)
    arguments.add_argument("--writer", required=True)
    arguments.add_argument("--out", required=True)
    chosen = fill_in(arguments.parse_args())
    (by_hand if chosen.writer == "hand" else by_trainer)(chosen, TINY if chosen.tiny else LARGE)
