"""What a slow logger costs training: runs with none, with one that takes 200 ms for each row, and with those of the package, in turns.

The time is that from ``on_train_start`` to ``on_train_end``, the wait at the end of the epoch included; that after it, in which
the logger takes the rest of its rows, is told beside it.

    python benchmarks/slow_logger.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger


class Slow(Logger):
    """Takes so many seconds for each row, and counts them."""

    name, version = "slow", 0  # type: ignore[assignment]

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        time.sleep(self.seconds)
        self.steps.append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Model(LightningModule):
    """Some milliseconds of work, and two logged values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        self.log("mean", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Clock(Callback):
    """Times the training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.wall, self.cpu = time.perf_counter(), time.thread_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.thread_time() - self.cpu


VARIANTS: dict[str, Callable[[], Any]] = {
    "none": lambda: False,
    "200 ms": lambda: Slow(0.2),
    "CSV": lambda: CSVLogger("."),
    "TensorBoard": lambda: TensorBoardLogger("."),
}


def measure(make: Callable[[], Any], steps: int, every: int, width: int) -> dict[str, float]:
    """One run: milliseconds of a step, and seconds after training."""
    logger, clock = make(), Clock()
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": every,
    }  # fmt: skip
    data = DataLoader(torch.randn(steps, 64, width), batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(logger=logger, callbacks=clock, **options)
    began = time.perf_counter()
    trainer.fit(Model(width), data)
    total = time.perf_counter() - began
    if isinstance(logger, Slow):
        rows = [*range(every - 1, steps, every), steps - 1]
        assert logger.steps == rows, f"lost: {set(rows) - set(logger.steps)}"
    return {"wall": clock.wall / steps * 1e3, "cpu": clock.cpu / steps * 1e3, "rest": total - clock.wall}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="runs of each variant")
    parser.add_argument("--steps", type=int, default=400, help="steps of a run")
    parser.add_argument("--every", type=int, default=10, help="log_every_n_steps")
    parser.add_argument("--width", type=int, default=768, help="of the layers")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "slow_logger.json", help="where the figures go")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = list(dict.fromkeys(["none", *args.only]))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    json_path = args.json.resolve()
    outer = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.chdir(folder)
        for number in range(args.rounds + 1):
            for name in names if number % 2 else names[::-1]:
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    result = measure(VARIANTS[name], args.steps, args.every, args.width)
                if number:  # the first round warms up
                    found[name].append(result)
        os.chdir(outer)
    machine = describe_machine()
    print(f"Milliseconds per step: medians of {args.rounds} runs of {args.steps} steps, a row every {args.every}; ratios are paired.")
    print(f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, load {machine['load']}, torch {torch.__version__}\n")
    print(f"{'':12}  {'wall':>7}  {'ratio':>7}  {'CPU':>7}  {'ratio':>7}  {'after it, s':>12}")
    summary: dict[str, dict[str, float]] = {}
    for name in names:
        row = {key: statistics.median(each[key] for each in found[name]) for key in ("wall", "cpu", "rest")}
        for key in ("wall", "cpu"):
            row[f"{key}_ratio"] = statistics.median(each[key] / base[key] for each, base in zip(found[name], found["none"]))
        summary[name] = row
        print(f"{name:12}  {row['wall']:7.3f}  {row['wall_ratio']:7.4f}  {row['cpu']:7.3f}  {row['cpu_ratio']:7.4f}  {row['rest']:12.2f}")
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps({**machine, **vars(args), "json": None, "variants": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
