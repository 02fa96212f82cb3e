"""How the cost of a step depends on what has been before it: on steps, epochs, names logged, idle callbacks and checkpoints kept.

Each figure is CPU time of the thread, the lower quartile of some blocks of steps, of a model of one weight with a progress bar, a logger
and one logged name. A cost that grows shows as a slope: microseconds more for each ten times as much. What must never grow is held by
``tests/contracts/test_step_growth.py``.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --only steps epochs
    python benchmarks/scaling.py --quick                    less of everything

Curves go to ``results/scaling.png`` if matplotlib is installed (``pip install matplotlib``).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger

BLOCK = 100  # steps
Points = list[tuple[int, float]]


class Rows(Logger):
    """A logger that drops its rows."""

    name, version = "rows", 0  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Tiny(LightningModule):
    """A model of one weight, which may log many names in its first epoch, and one in each step."""

    def __init__(self, names: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.names = names

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.weight * batch).sum()
        if self.names and batch_idx == 0 and self.trainer.current_epoch == 0:
            for index in range(self.names):
                self.log(f"name_{index}", loss, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Timed:
    """Batches, of which every block is timed.

    Args:
        steps: in an epoch.
        block: steps that are timed together.
    """

    def __init__(self, steps: int, block: int = BLOCK) -> None:
        self.steps, self.block, self.batch = steps, block, torch.ones(1)
        self.times: list[float] = []  # microseconds per step of each block, over all epochs

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        begun = time.thread_time()
        for index in range(self.steps):
            yield self.batch
            if (index + 1) % self.block == 0:
                now = time.thread_time()
                self.times.append((now - begun) / self.block * 1e6)
                begun = now


def fit(model: LightningModule, source: Any, callbacks: list[Any] | None = None, **arguments: Any) -> None:
    """Train with a progress bar and a logger that gets rows."""
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": Rows(), "enable_model_summary": False, "enable_progress_bar": True,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks or []),
    }  # fmt: skip
    Trainer(**{**options, "callbacks": [TQDMProgressBar(), *(callbacks or [])], **arguments}).fit(model, source)


def steps(most: int) -> Points:
    """After so many steps of one epoch."""
    source = Timed(most)
    fit(Tiny(), source)
    return [(at, around(source.times, at // BLOCK)) for at in powers(1000, most)]


def epochs(most: int) -> Points:
    """After so many epochs of 20 steps; the turn of an epoch is counted in."""
    marks: list[float] = []

    class Turns(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            marks.append(time.thread_time())

    fit(Tiny(), Timed(20), [Turns()], max_epochs=most, log_every_n_steps=10)
    times = [(after - before) / 20 * 1e6 for before, after in itertools.pairwise(marks)]
    return [(at, around(times, at, 10)) for at in powers(10, most)]


class Idle(Callback):
    """Overrides no hook."""

    def __init__(self, index: int) -> None:
        self.index = index

    @property
    def state_key(self) -> str:
        return f"Idle{self.index}"


def names(most: int) -> Points:
    """After so many names were logged once, in an epoch before."""
    return [(count, last_epoch(Tiny(count))) for count in [0, *powers(1, most)]]


def names_in_the_epoch(most: int) -> Points:
    """The same within the epoch in which they were logged, when the rest of it logs one name."""
    return [(count, second_half(Tiny(count))) for count in [0, *powers(1, most)]]


def callbacks(most: int) -> Points:
    """With so many callbacks that override nothing."""
    return [(count, second_half(Tiny(), [Idle(i) for i in range(count)])) for count in [0, *powers(1, most)]]


def checkpoints(most: int) -> Points:
    """When so many checkpoints are kept: for each step, of which every tenth saves one."""
    source = Timed(10 * (most + 40), 10)
    fit(Tiny(), source, [ModelCheckpoint("kept", save_top_k=-1, every_n_train_steps=10, filename="{step}")])
    return [(at, around(source.times, at, 20)) for at in powers(10, most)]


def best_checkpoints(most: int) -> Points:
    """The same where they are the best of their metric."""
    source = Timed(10 * (most + 40), 10)
    best = ModelCheckpoint("best", monitor="loss_step", save_top_k=most + 40, every_n_train_steps=10, filename="{step}")
    fit(Tiny(), source, [best], log_every_n_steps=10)
    return [(at, around(source.times, at, 20)) for at in powers(10, most)]


AXES: dict[str, tuple[Callable[[int], Points], int, int]] = {  # with the most, and the most of --quick
    "steps": (steps, 100_000, 10_000),
    "epochs": (epochs, 1_000, 100),
    "names logged before": (names, 1_000, 100),
    "names logged in the epoch": (names_in_the_epoch, 1_000, 100),
    "idle callbacks": (callbacks, 1_000, 100),
    "checkpoints kept": (checkpoints, 500, 50),
    "best checkpoints kept": (best_checkpoints, 500, 50),
}


def last_epoch(model: LightningModule) -> float:
    source = Timed(3000)
    fit(model, source, max_epochs=3)
    return typical(source.times[60:])


def second_half(model: LightningModule, more: list[Any] | None = None) -> float:
    source = Timed(6000)
    fit(model, source, more)
    return typical(source.times[30:])


def typical(times: list[float]) -> float:
    """The lower quartile: what else the machine does makes some blocks slower, and none faster."""
    return statistics.quantiles(times, n=4)[0]


def powers(least: int, most: int) -> list[int]:
    """1, 10, 100, ... and the most."""
    found = [10**k for k in range(12) if least <= 10**k < most]
    return [*found, most]


def around(times: list[float], place: int, width: int = 20) -> float:
    """What is typical of the blocks up to a place, or from it on where there are too few before it."""
    end = min(max(place, width), len(times))
    return typical(times[max(end - width, 0) : end])


def slope(points: Points) -> float:
    """Microseconds more for each ten times as much: the line of least squares."""
    xs, ys = [math.log10(max(x, 1)) for x, _ in points], [y for _, y in points]
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread if spread else 0.0


def draw(results: dict[str, Points], path: Path) -> bool:
    """Draw one curve for each axis; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    rows = -(-len(results) // columns)
    figure, places = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False)
    for axes in places.flat[len(results) :]:
        axes.set_visible(False)
    for axes, (name, points) in zip(places.flat, results.items()):
        axes.plot([max(x, 0.5) for x, _ in points], [y for _, y in points], marker="o")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.5 * max(y for _, y in points))
        axes.set_xlabel(name)
        axes.set_ylabel("µs of CPU time per step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    return True


def main() -> None:
    """Measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(AXES), default=list(AXES), metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scaling.json", help="where the figures go")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    machine, results, outer = describe_machine(), dict[str, Points](), os.getcwd()
    print(f"Microseconds of CPU time per step. {machine['date']}, {machine['cpu']}, load {machine['load']}, torch {torch.__version__}\n")
    for name in args.only:
        measure, most, quick = AXES[name]
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                results[name] = measure(quick if args.quick else most)
            os.chdir(outer)
        shown = "  ".join(f"{x:>6,}: {y:6.1f}" for x, y in results[name])
        print(f"{name:<26}{shown}   slope {slope(results[name]):+.1f}", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**machine, "torch": torch.__version__, "microseconds": results}, indent=1) + "\n")
    picture = args.json.with_suffix(".png")
    print(f"\n{f'Curves: {picture}' if draw(results, picture) else 'No curves: pip install matplotlib'}")


if __name__ == "__main__":
    main()
