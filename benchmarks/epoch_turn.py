"""What lies between the last step of an epoch and the first of the next, beside a hand-written loop over a loader of its own.

Epochs of both take turns in one process: a callback runs one by hand before each of the trainer's. A turn is the time from the end of
the last step to the start of the first one, in which workers end and start, or go on where they are persistent.

    python benchmarks/epoch_turn.py
    python benchmarks/epoch_turn.py --workers 4 --epochs 100
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

from lightning.pytorch import Callback, LightningModule, Trainer

STEPS = 20  # of an epoch


class Samples(Dataset[Tensor]):
    """Samples that take next to no time."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Tensor:
        return torch.ones(8)


class Turns:
    """The times between epochs, wall clock and CPU of this process, in milliseconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.begun: tuple[float, float] | None = None

    def begin(self) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def end(self) -> None:
        if self.begun is not None:
            self.wall.append((time.perf_counter() - self.begun[0]) * 1e3)
            self.cpu.append((time.process_time() - self.begun[1]) * 1e3)
        self.begun = None


class Net(LightningModule):
    """A small model, whose steps say when they begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.turns = Turns()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.turns.end()
        loss = self.layer(batch).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss  # type: ignore[no-any-return]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS - 1:
            self.turns.begin()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class ByHand(Callback):
    """An epoch of a hand-written loop before each of the trainer's, whose turn does not count it."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.turns, self.layer = loader, Turns(), nn.Linear(8, 1)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1e-3)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        begun, cpu = time.perf_counter(), time.process_time()
        self.turns.begin()
        for index, batch in enumerate(self.loader):
            if index == 0:
                self.turns.end()
            self.optimizer.zero_grad()
            self.layer(batch).sum().backward()
            self.optimizer.step()
            if index == STEPS - 1:
                ended = time.perf_counter(), time.process_time()
        if self.turns.wall:  # what follows the last batch belongs to the turn too
            self.turns.wall[-1] += (time.perf_counter() - ended[0]) * 1e3
            self.turns.cpu[-1] += (time.process_time() - ended[1]) * 1e3
        own = pl_module.turns
        if own.begun is not None:
            own.begun = (own.begun[0] + time.perf_counter() - begun, own.begun[1] + time.process_time() - cpu)


def measure(workers: int, persistent: bool, epochs: int, arguments: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a turn of both: medians, and the median of the differences of neighbours."""

    def loader() -> Any:
        return DataLoader(Samples(), batch_size=None, num_workers=workers, persistent_workers=persistent)

    model, by_hand = Net(), ByHand(loader())
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": epochs, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, **arguments,
    }  # fmt: skip
    trainer = Trainer(**{**options, "callbacks": [*options.get("callbacks", []), by_hand]})
    trainer.fit(model, loader())
    found: dict[str, float] = {}
    for clock in ("wall", "cpu"):
        theirs, ours = getattr(by_hand.turns, clock)[3:], getattr(model.turns, clock)[2:]
        found[f"by_hand_{clock}"], found[f"trainer_{clock}"] = statistics.median(theirs), statistics.median(ours)
        found[f"more_{clock}"] = statistics.median(a - b for a, b in zip(ours, theirs))
    return found


def bar() -> dict[str, Any]:
    from lightning.pytorch.callbacks import TQDMProgressBar

    return {"callbacks": [TQDMProgressBar()], "enable_progress_bar": True}


def rows() -> dict[str, Any]:
    from lightning.pytorch.loggers import CSVLogger

    return {"logger": CSVLogger(".")}


def saves() -> dict[str, Any]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return {"callbacks": [ModelCheckpoint()], "enable_checkpointing": True}


WITH: dict[str, Callable[[], dict[str, Any]]] = {"bare": dict, "progress bar": bar, "CSVLogger": rows, "a checkpoint": saves}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="of the loaders")
    parser.add_argument("--epochs", type=int, default=43, help="of each loop, the first three of which do not count")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "epoch_turn.json", help="where the figures go")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    machine, outer, results = describe_machine(), os.getcwd(), dict[str, Any]()
    print(f"{machine['date']}, {machine['cpu']}, load {machine['load']}. Milliseconds between the steps of two epochs.\n")
    print(f"{'':<44}{'by hand':>9}{'trainer':>9}{'more':>8}{'more, CPU':>12}")
    kinds = {"no workers": (0, False), f"{args.workers} workers": (args.workers, False), "persistent": (args.workers, True)}
    for kind, (workers, persistent) in kinds.items():
        for name, arguments in WITH.items():
            with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
                os.chdir(folder)
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    found = results[f"{kind}, {name}"] = measure(workers, persistent, args.epochs, arguments())
                os.chdir(outer)
            shown = f"{found['by_hand_wall']:>9.2f}{found['trainer_wall']:>9.2f}{found['more_wall']:>8.2f}{found['more_cpu']:>12.2f}"
            print(f"{kind + ', ' + name:<44}{shown}", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**machine, "torch": torch.__version__, "milliseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
