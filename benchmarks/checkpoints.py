"""What checkpoints cost: saving, checking, loading, and how long training waits for a save in the background.

python benchmarks/checkpoints.py [--megabytes 100] [--rounds 15] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lightning.fabric.checkpoint import io, seal
from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


def make_checkpoint(megabytes: int) -> dict[str, Any]:
    """Weights and the two moments of Adam, as a run saves them."""
    side = int((megabytes * 1e6 / 4 / 3 / 8) ** 0.5)
    weights = {f"layers.{i}.weight": torch.randn(side, side) for i in range(8)}
    state = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn(side, side), "exp_avg_sq": torch.rand(side, side)} for i in range(8)}
    return {"epoch": 0, "global_step": 1, "state_dict": weights, "optimizer_states": [{"state": state, "param_groups": []}]}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


class Large(LightningModule):
    """Weights, most of which a step does not touch, so that steps are quick; with Adam's moments for all of them."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList([torch.nn.Parameter(each) for each in make_checkpoint(megabytes)["state_dict"].values()])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return sum(layer[0].square().sum() for layer in self.layers) * batch.mean()  # type: ignore[return-value]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), foreach=False)


class Saving(Callback):
    """Saves after every fourth step, and notes how long training waits; the save is over before the next one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.waits: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 4 == 3:
            trainer.strategy.checkpoint_io.wait()
            self.waits.append(milliseconds(lambda: trainer.save_checkpoint(self.path)))


def in_the_trainer(megabytes: int, path: str, background: bool, saves: int = 4) -> list[float]:
    """How long training waits for each save but the first."""
    saving = Saving(path)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saving], async_checkpointing=background,
    )  # fmt: skip
    trainer.fit(Large(megabytes), torch.utils.data.DataLoader(torch.ones(4 * saves, 1)))
    return saving.waits[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", default=None, help="on the disk to be measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tempfile.mkdtemp(dir=options.folder)
    path = os.path.join(folder, "last.ckpt")
    checkpoint = make_checkpoint(options.megabytes)
    io.save(checkpoint, path)
    size = os.path.getsize(path) / 1e6

    def torch_saves() -> None:
        with open(path + ".torch", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def check() -> None:
        with open(path, "rb", buffering=0) as file:
            seal.verify(file, path)

    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)])
    optimizer = torch.optim.Adam(model.parameters())
    batch = torch.randn(256, 512)
    writer = AsyncCheckpointIO()
    first = milliseconds(lambda: writer.save_checkpoint(checkpoint, path))
    writer.wait()
    figures: dict[str, list[float]] = {}
    for _ in range(options.rounds):  # in turns, so that all meet the same state of the machine
        for name, function in {
            "torch.save and fsync": torch_saves,
            "save": lambda: io.save(checkpoint, path),
            "verify": check,
            "load": lambda: io.load(path),
            "load without verify": lambda: io.load(path, verify=False),
            "load mapped": lambda: io.load(path, mmap=True),
            "load mapped without verify": lambda: io.load(path, mmap=True, verify=False),
            "read the generation": lambda: seal.read_seal(open(path, "rb"), path),  # noqa: SIM115
            "save in the background, the wait": lambda: writer.save_checkpoint(checkpoint, path),
        }.items():
            figures.setdefault(name, []).append(milliseconds(function))
        steps = figures.setdefault("a step during a save in the background", [])
        while writer.is_pending(path):
            steps.append(milliseconds(lambda: step(model, optimizer, batch)))
        writer.wait()
        quiet = figures.setdefault("a step otherwise", [])
        quiet += [milliseconds(lambda: step(model, optimizer, batch)) for _ in range(10)]
    writer.teardown()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for _ in range(max(2, options.rounds // 4)):
        for name, background in (("in the Trainer, save", False), ("in the Trainer, save in the background, the wait", True)):
            figures.setdefault(name, []).extend(in_the_trainer(options.megabytes, path, background))
    median = {name: statistics.median(values) for name, values in figures.items() if values}
    best = {name: min(values) for name, values in figures.items() if values}
    print(f"{'ms':50s} {'median':>9s} {'best':>9s}    load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, value in median.items():
        print(f"{name:50s} {value:9.2f} {best[name]:9.2f}")
    print(f"{size:.1f} MB; verify {size / best['verify'] * 1000:.0f} MB/s; the first save in the background {first:.1f} ms")
    shares = {}
    for where in ("", "in the Trainer, "):
        for kind, each in (("median", median), ("best", best)):
            shares[f"{where}{kind}"] = each[f"{where}save in the background, the wait"] / each[f"{where}save"]
    print("the wait as a share of a save: " + "; ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print(json.dumps({"megabytes": size, "share": shares, "first": first, "median": median, "best": best}))


if __name__ == "__main__":
    main()
