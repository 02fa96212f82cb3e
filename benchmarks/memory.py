"""What a run takes in memory beside the hand-written loop: at its peak, and after a great many batches.

Peaks are bytes of live tensors, counted where operations make them (CPU), or what the allocator says (CUDA): no other process, and
no garbage of Python changes them. Both loops see batches of the same size, made when they are asked for. Growth is
that of the process's resident memory from a tenth of the run to its end.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda
    python benchmarks/memory.py --steps 10000 --batches 50000         shorter
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))
from live_tensors import LiveTensors
from machine import describe_machine

from lightning.pytorch import LightningModule, Trainer

BATCH, WIDTH, COUNT = 512, 512, 12
GOAL = 1.01  # of the hand-written loop's peak
QUIET: dict[str, Any] = {
    "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 2,
}  # fmt: skip


class Samples(Dataset[Tensor]):
    """Batches that are made when they are asked for."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(BATCH, WIDTH)


def batches() -> DataLoader[Tensor]:
    return DataLoader(Samples(), batch_size=None)


class Perceptron(LightningModule):
    """Weights, activations and batches of about one size."""

    def __init__(self, logs: int = 0, extra: bool = False) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.layers = nn.Sequential(*layers)
        self.names, self.extra = [f"metric_{i}" for i in range(logs)], extra

    def loss_of(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers(batch)
        return hidden.square().mean(), hidden

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss, hidden = self.loss_of(batch)
        for name in self.names:
            self.log(name, loss, prog_bar=True, on_step=True, on_epoch=True)
        return {"loss": loss, "hidden": hidden} if self.extra else loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validation", self.loss_of(batch)[0])

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


# ---- by hand ------------------------------------------------------------------------------------------------------------


def fit_by_hand(model: Perceptron, device: str, accumulate: int = 1, validates: bool = False) -> None:
    model.to(device)
    optimizer = model.configure_optimizers()
    for index, batch in enumerate(batches()):
        batch = batch.to(device)
        if index % accumulate == 0:
            optimizer.zero_grad()
        loss, hidden = model.loss_of(batch)
        if not model.extra:
            del hidden
        (loss / accumulate).backward()
        if index % accumulate == accumulate - 1:
            optimizer.step()
    if validates:
        optimizer.zero_grad()
        with torch.no_grad():
            for batch in batches():
                loss, _ = model.loss_of(batch.to(device))


def validate_by_hand(model: Perceptron, device: str) -> None:
    model.to(device)
    with torch.no_grad():
        for batch in batches():
            model.loss_of(batch.to(device))


def predict_by_hand(model: Perceptron, device: str) -> None:
    model.to(device)
    with torch.inference_mode():
        for batch in batches():
            output = model.layers(batch.to(device)).cpu()  # noqa: F841


# ---- by the trainer -----------------------------------------------------------------------------------------------------


def trainer_for(device: str, **arguments: Any) -> Trainer:
    return Trainer(**{**QUIET, "accelerator": "gpu" if device == "cuda" else "cpu", **arguments})


def everything() -> dict[str, Any]:
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger

    callbacks = [TQDMProgressBar(), LearningRateMonitor(), ModelCheckpoint(every_n_train_steps=4)]
    return {"callbacks": callbacks, "enable_progress_bar": True, "enable_checkpointing": True, "logger": CSVLogger(".")}


def consume(outputs: Iterator[Any]) -> None:
    for _ in outputs:
        pass


Run = Callable[[str], Any]
# name: (the trainer's, the hand-written loop's)
VARIANTS: dict[str, tuple[Run, Run]] = {
    "fit": (
        lambda device: trainer_for(device).fit(Perceptron(), batches()),
        lambda device: fit_by_hand(Perceptron(), device),
    ),
    "fit, 10 logs": (
        lambda device: trainer_for(device).fit(Perceptron(10), batches()),
        lambda device: fit_by_hand(Perceptron(), device),
    ),
    "fit, outputs": (
        lambda device: trainer_for(device).fit(Perceptron(extra=True), batches()),
        lambda device: fit_by_hand(Perceptron(extra=True), device),
    ),
    "fit, accumulation": (
        lambda device: trainer_for(device, accumulate_grad_batches=4).fit(Perceptron(), batches()),
        lambda device: fit_by_hand(Perceptron(), device, accumulate=4),
    ),
    "fit, validation": (
        lambda device: trainer_for(device).fit(Perceptron(), batches(), batches()),
        lambda device: fit_by_hand(Perceptron(), device, validates=True),
    ),
    "fit, bar, rows, checkpoints": (
        lambda device: trainer_for(device, **everything()).fit(Perceptron(1), batches()),
        lambda device: fit_by_hand(Perceptron(), device),
    ),
    "validate": (
        lambda device: trainer_for(device).validate(Perceptron(), batches(), verbose=False),
        lambda device: validate_by_hand(Perceptron(), device),
    ),
    "predict": (
        lambda device: trainer_for(device).predict(Perceptron(), batches(), return_predictions=False),
        lambda device: predict_by_hand(Perceptron(), device),
    ),
    "predict_stream": (
        lambda device: consume(trainer_for(device).predict_stream(Perceptron(), batches())),
        lambda device: predict_by_hand(Perceptron(), device),
    ),
}


def peak_of(run: Run, device: str) -> int:
    """The most bytes of live tensors, the model's own included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(device)
        return torch.cuda.max_memory_allocated() - before
    with LiveTensors() as tensors:
        run(device)
    return tensors.peak


# ---- growth ---------------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Tiny(LightningModule):
    """A model of one weight that measures the process it runs in."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.every, self.measured = max(steps // 10, 1), list[int]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.weight * batch).sum()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.note(batch_idx)
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note(batch_idx)
        return self.weight * batch

    def note(self, batch_idx: int) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.measured.append(resident())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Repeated:
    """The same batch again and again."""

    def __init__(self, count: int) -> None:
        self.count, self.batch = count, torch.ones(1)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batch + 0 for _ in range(self.count))


def growth(what: str, count: int) -> dict[str, Any]:
    """Megabytes after each tenth of a run."""
    model = Tiny(count)
    trainer = trainer_for("cpu", log_every_n_steps=50)
    if what == "fit":
        trainer.fit(model, Repeated(count))
    elif what == "predict":
        trainer.predict(model, Repeated(count), return_predictions=False)
    else:
        consume(trainer.predict_stream(model, Repeated(count)))
    megabytes = [round(each / 2**20, 2) for each in model.measured]
    return {"count": count, "megabytes": megabytes, "grown": round(megabytes[-1] - megabytes[0], 2)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=100_000, help="of the long fit; 0 for none")
    parser.add_argument("--batches", type=int, default=1_000_000, help="of the long predictions; 0 for none")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "memory.json", help="where the figures go")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    machine = describe_machine()
    results: dict[str, Any] = {**machine, "torch": torch.__version__, "device": args.device, "peaks": {}, "growth": {}}
    outer = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print(f"{machine['date']}, {machine['cpu']}, torch {torch.__version__}, {args.device}. Bytes of tensors at the peak.\n")
        if args.device == "cuda":
            fit_by_hand(Perceptron(), args.device)  # libraries take their workspaces
        print(f"{'':<28}  {'trainer':>12}  {'by hand':>12}  {'ratio':>7}")
        for name, runs in VARIANTS.items():
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                ours, theirs = (peak_of(run, args.device) for run in runs)
            results["peaks"][name] = {"trainer": ours, "by_hand": theirs, "ratio": round(ours / theirs, 5)}
            print(f"{name:<28}  {ours:>12,}  {theirs:>12,}  {ours / theirs:>7.4f}{'' if ours <= GOAL * theirs else '  more than the goal'}")
        print("\nMegabytes of the process at a tenth of a run, and at its end.\n")
        for what, count in (("fit", args.steps), ("predict", args.batches), ("predict_stream", args.batches)):
            if count:
                found = results["growth"][what] = growth(what, count)
                print(f"{what:<16}{count:>10,} batches  {found['megabytes'][0]:>9}  {found['megabytes'][-1]:>9}  grown by {found['grown']}")
        os.chdir(outer)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
