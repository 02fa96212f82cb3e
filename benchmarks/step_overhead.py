"""What a step of training, evaluation or prediction costs above the same step in a hand-written loop.

The model is next to nothing, so what remains is the framework's own work. Both loops run in one process and take
turns in short blocks: the trainer's batches come from an iterable that, between two blocks of them, runs a block of
the hand-written loop. Whatever slows the machine down then slows both, and the median of the blocks is compared.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --lightning /path/to/an/environment/with/lightning/bin/python

Only public names are used, so the same script measures whichever ``lightning`` its interpreter has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

GOAL_MICROSECONDS = 25.0  # bare, above the hand-written loop


class Clock:
    """Wall time and the CPU time of this thread, which other processes on the machine do not change."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def stop(self, steps: int) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        self.wall.append((wall - self._wall) / steps * 1e6)
        self.cpu.append((cpu - self._cpu) / steps * 1e6)


class TurnTaking:
    """An iterable of batches which lets the hand-written loop run between two blocks of them.

    Args:
        blocks: blocks of each loop, the first ones unmeasured.
        steps: batches in a block.
        warm_up: how many blocks are not measured.
        by_hand: runs a block of the hand-written loop.
    """

    def __init__(self, blocks: int, steps: int, warm_up: int, by_hand: Callable[[int], None]) -> None:
        self.blocks, self.steps, self.warm_up, self.by_hand = blocks, steps, warm_up, by_hand
        self.ours, self.theirs = Clock(), Clock()
        self.batch = torch.ones(1)

    def __len__(self) -> int:
        return (self.blocks + self.warm_up) * self.steps + 1  # one batch more: asking for it ends the last block

    def __iter__(self) -> Iterator[torch.Tensor]:
        for block in range(self.blocks + self.warm_up):
            self.theirs.start()
            self.by_hand(self.steps)
            self.theirs.stop(self.steps)
            self.ours.start()
            for _ in range(self.steps):
                yield self.batch
            self.ours.stop(self.steps)
            if block < self.warm_up:
                for clock in (self.ours, self.theirs):
                    clock.wall.clear()
                    clock.cpu.clear()
        yield self.batch


def hand_written(model: Any, batch: torch.Tensor) -> Callable[[int], None]:
    """The loop that one would write: fetch, forward, zero_grad, backward, step."""
    optimizer = model.configure_optimizers()

    def batches(count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            yield batch

    def run(steps: int) -> None:
        for data in batches(steps):
            loss = model.compute(data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def evaluated_by_hand(model: Any, batch: torch.Tensor) -> Callable[[int], None]:
    """The same for evaluation: fetch, forward."""

    def batches(count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            yield batch

    def run(steps: int) -> None:
        with torch.inference_mode():
            for data in batches(steps):
                model.compute(data)

    return run


def build_model(logs: int, log_options: dict[str, Any]) -> Any:
    """A model of one parameter."""
    from lightning.pytorch import LightningModule

    names = [f"metric_{i}" for i in range(logs)]

    class Tiny(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def compute(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.weight * batch).sum()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.compute(batch)
            for name in names:
                self.log(name, loss, **log_options)
            return loss

        def evaluation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            loss = self.compute(batch)
            for name in names:
                self.log(name, loss, **log_options)

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.compute(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    Tiny.validation_step = Tiny.test_step = Tiny.evaluation_step  # type: ignore[method-assign, assignment]
    return Tiny()


def progress_bar() -> dict[str, Any]:
    from lightning.pytorch.callbacks import TQDMProgressBar

    return {"callbacks": [TQDMProgressBar()], "enable_progress_bar": True}


def csv_logger() -> dict[str, Any]:
    from lightning.pytorch.loggers import CSVLogger

    return {"logger": CSVLogger(".")}


def slow_logger() -> dict[str, Any]:
    from lightning.pytorch.loggers.logger import Logger

    class Slow(Logger):
        name, version = "slow", 0  # type: ignore[assignment]

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            time.sleep(0.2)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return {"logger": Slow()}


def throughput() -> dict[str, Any]:
    from lightning.pytorch.callbacks import ThroughputMonitor

    return {**csv_logger(), "callbacks": ThroughputMonitor(batch_size_fn=len, length_fn=torch.numel)}


def simple_profiler() -> dict[str, Any]:
    return {"profiler": "simple"}


def epoch_profiler() -> dict[str, Any]:
    from lightning.pytorch.profilers import EpochTimes

    return {"profiler": EpochTimes()}


# name: (number of logs, options of log, arguments of the trainer)
VARIANTS: dict[str, tuple[int, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "bare": (0, {}, dict),
    "1 log": (1, {}, dict),
    "10 logs": (10, {}, dict),
    "1 log, step and epoch": (1, {"on_step": True, "on_epoch": True}, dict),
    "progress bar": (0, {}, progress_bar),
    "progress bar, 1 log": (1, {"prog_bar": True}, progress_bar),
    "CSV logger, 1 log": (1, {}, csv_logger),
    "200 ms logger, 1 log": (1, {}, slow_logger),
    "CSV logger, ThroughputMonitor": (0, {}, throughput),
    "profiler simple": (0, {}, simple_profiler),
    "profiler epoch": (0, {}, epoch_profiler),
}

# name: (entry point, number of logs)
EVALUATION: dict[str, tuple[str, int]] = {
    "validate": ("validate", 0),
    "validate, 1 log": ("validate", 1),
    "test, 1 log": ("test", 1),
    "predict": ("predict", 0),
    "predict_stream": ("predict_stream", 0),
}


def run_evaluation(trainer: Any, entry: str, model: Any, source: Any) -> None:
    """Run it to its end, keeping nothing."""
    if entry == "predict_stream":
        for _ in trainer.predict_stream(model, source):
            pass
        return
    getattr(trainer, entry)(model, source, **({"return_predictions": False} if entry == "predict" else {"verbose": False}))


def measure(name: str, blocks: int, steps: int) -> dict[str, float]:
    """Microseconds per step of both loops: medians over the blocks."""
    from lightning.pytorch import Trainer

    entry, (logs, log_options, arguments) = "fit", VARIANTS.get(name, (0, {}, dict))
    if name in EVALUATION:
        entry, logs = EVALUATION[name]
    torch.manual_seed(0)
    model, twin = build_model(logs, log_options), build_model(0, {})
    by_hand = hand_written if entry == "fit" else evaluated_by_hand
    source = TurnTaking(blocks, steps, max(3, blocks // 10), by_hand(twin, torch.ones(1)))
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = Trainer(**{**options, **arguments()})
    if entry == "fit":
        trainer.fit(model, source)
    else:
        run_evaluation(trainer, entry, model, source)
    return {
        "by_hand_wall": statistics.median(source.theirs.wall),
        "trainer_wall": statistics.median(source.ours.wall),
        "overhead_wall": statistics.median(a - b for a, b in zip(source.ours.wall, source.theirs.wall)),
        "by_hand_cpu": statistics.median(source.theirs.cpu),
        "trainer_cpu": statistics.median(source.ours.cpu),
        "overhead_cpu": statistics.median(a - b for a, b in zip(source.ours.cpu, source.theirs.cpu)),
    }


def measure_all(names: list[str], blocks: int, steps: int) -> dict[str, Any]:
    """All variants with the ``lightning`` of this interpreter."""
    import lightning
    import lightning.pytorch

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = {}
    outer = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.chdir(folder)
        for name in names:
            if not hasattr(lightning.pytorch.Trainer, EVALUATION.get(name, ("fit", 0))[0]):
                continue  # upstream has no such entry point
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), contextlib.suppress(ImportError):  # the same
                results[name] = measure(name, blocks, steps)
        os.chdir(outer)
    return {"version": lightning.__version__, "torch": torch.__version__, "variants": results}


def measure_elsewhere(python: str, names: list[str], blocks: int, steps: int) -> dict[str, Any]:
    """The same with the ``lightning`` of another interpreter."""
    command = [python, __file__, "--measure", "--blocks", str(blocks), "--steps", str(steps), "--only", *names]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table(ours: dict[str, Any], upstream: dict[str, Any] | None) -> str:
    """Microseconds per step, side by side."""
    columns = ("by_hand_wall", "overhead_wall", "by_hand_cpu", "overhead_cpu")
    rows = [["", "by hand, wall", "overhead, wall", "by hand, CPU", "overhead, CPU"]]
    if upstream is not None:
        rows[0] += [f"lightning {upstream['version']}: overhead, CPU", "times ours"]
    for name, row in ours["variants"].items():
        rows.append([name, *(f"{row[column]:.1f}" for column in columns)])
        if upstream is not None and name not in upstream["variants"]:
            rows[-1] += ["-", "-"]
        elif upstream is not None:
            other = upstream["variants"][name]["overhead_cpu"]
            # Below a microsecond the difference of the two loops is noise, and a ratio to it says nothing.
            rows[-1] += [f"{other:.1f}", f"{other / row['overhead_cpu']:.1f}" if row["overhead_cpu"] >= 1 else "-"]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def main() -> None:
    """Measure, print, write."""
    names = [*VARIANTS, *EVALUATION]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightning", metavar="PYTHON", help="an interpreter that has lightning 2.x, to be measured too")
    parser.add_argument("--blocks", type=int, default=60, help="measured blocks of each loop")
    parser.add_argument("--steps", type=int, default=200, help="steps in a block")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="VARIANT", help=", ".join(names))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "step_overhead.json", help="where the figures go")
    parser.add_argument("--measure", action="store_true", help="print the figures as JSON, and nothing else")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_all(args.only, args.blocks, args.steps)))
        return
    machine = describe_machine()
    ours = measure_elsewhere(sys.executable, args.only, args.blocks, args.steps)
    upstream = measure_elsewhere(args.lightning, args.only, args.blocks, args.steps) if args.lightning else None
    print(f"Microseconds per step: medians of {args.blocks} blocks of {args.steps} steps.")
    print(f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, load {machine['load']}, torch {ours['torch']}\n")
    print(table(ours, upstream))
    if "bare" in ours["variants"]:
        overhead = ours["variants"]["bare"]["overhead_cpu"]
        print(f"\nbare: {overhead:.1f} of CPU time above the hand-written loop; the goal is at most {GOAL_MICROSECONDS:.0f}")
    results = {**machine, "blocks": args.blocks, "steps": args.steps, "ours": ours, "lightning": upstream}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
