"""Training steps on a GPU: this package, hand-written loops, the same steps as one CUDA graph, and Lightning, in one table.

Two models: a perceptron (three layers, 256 wide, fused AdamW, clipping by norm, batches of 128), where a step takes as long as the
host needs to launch it, and a GPT (6 layers, 512 wide, bfloat16, 16 sequences of 256 tokens). Within each measurement a hand-written
loop, its step recorded by hand as one CUDA graph, and the trainer take turns in short blocks, in one process: ratios are medians over
the rounds. All train the same weights on the same batches; what they have learned in the end must agree, or the row is marked.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --quick --lightning /path/to/an/environment/with/lightning/bin/python

Only public names are used, so the same script measures whichever ``lightning`` its interpreter has.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu_loops import SETTINGS, ByHand, Replayed, Setting, mean_loss
from machine import describe_machine
from turns import TurnTaking, be_quiet, run_elsewhere, run_here, silence

TO_BY_HAND, TO_GRAPH, MEMORY = 1.02, 1.15, 1.01  # the goals: eager steps, replayed steps, peak memory of eager steps
AGREEMENT = 0.05  # of what the hand-written loop has learned

# How long: (blocks, steps of the perceptron, steps of the GPT in a block)
FULL, QUICK, TINY = (20, 100, 50), (4, 50, 12), (2, 12, 12)


def bare() -> dict[str, Any]:
    return {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def out_of_the_box() -> dict[str, Any]:
    """As it comes, with a CSV logger: checkpoints, progress bar, summary."""
    of = trainer_module().__name__
    folder = tempfile.mkdtemp(prefix="gpu_benchmark_")
    logger = import_module(of + ".loggers").CSVLogger(folder)
    return {"logger": logger, "callbacks": [import_module(of + ".callbacks").TQDMProgressBar()], "default_root_dir": folder}


def slow_logger() -> dict[str, Any]:
    """A logger that needs 200 ms for each row."""
    base: Any = import_module(trainer_module().__name__ + ".loggers").Logger

    class Slow(base):  # type: ignore[misc]
        name, version = "slow", 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.2)

    return {**bare(), "logger": Slow()}


@dataclass(frozen=True)
class Variant:
    """One way to use a trainer.

    Args:
        log: keywords of ``self.log``; None logs nothing.
        arguments: of the trainer.
        compile: its argument of this name.
    """

    log: dict[str, Any] | None
    arguments: Callable[[], dict[str, Any]]
    compile: str | None = None


VARIANTS = {
    "bare": Variant(None, bare),
    "1 log": Variant({}, bare),
    "out of the box": Variant({"prog_bar": True}, out_of_the_box),
    "200 ms logger": Variant({}, slow_logger),
    'compile="step"': Variant(None, bare, "step"),
    'compile="step", 1 log': Variant({}, bare, "step"),
    'compile="step", out of the box': Variant({"prog_bar": True}, out_of_the_box, "step"),
    'compile="step", 200 ms logger': Variant({}, slow_logger, "step"),
    'compile="default"': Variant(None, bare, "default"),
}


def trainer_module() -> Any:
    """The ``lightning.pytorch`` of this interpreter."""
    try:
        return import_module("lightning.pytorch")
    except ImportError:
        return import_module("pytorch_lightning")


def compiles(module: Any) -> bool:
    """Whether its trainer has the argument ``compile``."""
    return "compile" in inspect.signature(module.Trainer).parameters


def task(setting: Setting, log: dict[str, Any] | None) -> Any:
    """The hand-written step for a trainer."""
    base: Any = trainer_module().LightningModule

    class Task(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = setting.build()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.net(batch)
            if log is not None:
                self.log("loss", loss, **log)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setting.optimizer(self.net)

    return Task()


def trainer_for(setting: Setting, variant: Variant, device: torch.device, steps: int) -> Any:
    """A trainer whose loggers get a row in each block."""
    options: dict[str, Any] = {
        "accelerator": device.type, "devices": [device.index or 0] if device.type == "cuda" else 1, "max_epochs": 1,
        "precision": "bf16-mixed" if setting.bf16 else "32-true", "gradient_clip_val": setting.clip, "log_every_n_steps": min(50, steps),
    }  # fmt: skip
    if variant.compile is not None:
        options["compile"] = variant.compile
    return trainer_module().Trainer(**options, **variant.arguments())


def measure(setting: Setting, variant: Variant, device: torch.device, blocks: int, steps: int, pinned: bool) -> dict[str, Any]:
    """Microseconds per step of the three loops, and what they have learned."""
    batches = setting.batches(device, pinned)
    loops = {"by hand": ByHand(setting, device), "graph": Replayed(setting, device)}
    before = mean_loss(setting, setting.build(), batches, device)
    source = TurnTaking(device, [batches[i % len(batches)] for i in range(steps)], blocks, dict(loops))
    module = task(setting, variant.log)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_for(setting, variant, device, steps).fit(module, source)
    for run in loops.values():
        run(batches[:1])  # as many steps as the trainer
    by_hand, graph, trainer = (source.times[name] for name in ("by hand", "graph", "trainer"))
    losses = {name: mean_loss(setting, run.net, batches, device) for name, run in loops.items()}
    losses["trainer"] = mean_loss(setting, module.net, batches, device)
    learned = before - losses["by hand"]
    return {
        "by_hand": statistics.median(by_hand),
        "graph": statistics.median(graph),
        "trainer": statistics.median(trainer),
        "to_by_hand": statistics.median(a / b for a, b in zip(trainer, by_hand)),
        "to_graph": statistics.median(a / b for a, b in zip(trainer, graph)),
        "loss_before": before,
        "losses": losses,
        "agrees": learned > 0 and all(abs(loss - losses["by hand"]) <= AGREEMENT * learned for loss in losses.values()),
        "told": sorted({str(each.message) for each in caught if "compile=" in str(each.message)}),
    }


# ---- memory ---------------------------------------------------------------------------------------------------------


class Batches:
    """A loader of ready batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors on the device at the most while something runs, above those before; 0 on a CPU."""
    gc.collect()
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def memory(setting: Setting, device: torch.device, pinned: bool) -> dict[str, int]:
    """Peaks of the hand-written loops and of the trainer."""
    batches = setting.batches(device, pinned)

    def fit(variant: Variant) -> None:
        trainer_for(setting, variant, device, len(batches)).fit(task(setting, variant.log), Batches(batches))

    ByHand(setting, device)(batches)  # libraries take their workspaces
    peaks = {
        "by hand": peak(lambda: ByHand(setting, device)(batches), device),
        "graph": peak(lambda: Replayed(setting, device)(batches), device),
    }
    names = ["bare", 'compile="step"'] if compiles(trainer_module()) else ["bare"]
    for name in names:
        peaks[name] = peak(lambda name=name: fit(VARIANTS[name]), device)  # type: ignore[misc]
    return peaks


# ---- all of it ------------------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """All with the ``lightning`` of this interpreter; written after each measurement, so that what follows can't undo it."""
    module = trainer_module()
    be_quiet()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    found: dict[str, Any] = {"version": module.__version__, "torch": torch.__version__, "models": {}, "memory": {}}
    blocks, *steps = length(args)
    for (name, of), count in zip(SETTINGS.items(), steps):
        if name not in args.models:
            continue
        setting, rows = of(args.tiny), found["models"].setdefault(name, {})
        names = [each for each in args.only if VARIANTS[each].compile is None or compiles(module)]
        for variant in names:
            rows[variant] = attempt(f"{name}, {variant}", measure, setting, VARIANTS[variant], device, blocks, count, args.pinned)
            write(args.json, found)
        found["memory"][name] = attempt(f"{name}, memory", memory, setting, device, args.pinned)
        write(args.json, found)
    return found


def attempt(title: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A measurement, or the error that it ends with."""
    start = time.perf_counter()
    try:
        with silence():
            result = function(*arguments)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", "traceback": traceback.format_exc()}
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    print(f"  {time.perf_counter() - start:5.1f} s  {title}  {result.get('error', '')}", file=sys.stderr, flush=True)
    return result


def write(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")


def length(args: argparse.Namespace) -> tuple[int, int, int]:
    """Blocks, and the steps in one for both models."""
    blocks, *steps = TINY if args.tiny else QUICK if args.quick else FULL
    return args.blocks or blocks, *steps  # type: ignore[return-value]


def measure_in_process(python: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a new process, so that an error of the device ends only that.

    Args:
        python: another interpreter; None for this one.
        args: of the command line.
    """
    path = args.json.with_name(f"{args.json.stem}_{'lightning' if python else 'ours'}_part.json")  # left where this process is killed
    path.unlink(missing_ok=True)
    arguments = ["--measure", "--device", args.device, "--json", str(path), "--only", *args.only, "--models", *args.models]
    arguments += ["--blocks", str(args.blocks)] if args.blocks else []
    arguments += [f"--{name}" for name in ("quick", "tiny") if getattr(args, name)] + ([] if args.pinned else ["--on-device"])
    code: int | str
    try:
        run = partial(run_elsewhere, python) if python else run_here
        code = run(__file__, arguments, timeout=args.limit).returncode
    except subprocess.TimeoutExpired:
        code = f"stopped after {args.limit} s"
    found = json.loads(path.read_text()) if path.exists() else {"version": "?", "torch": "?", "models": {}, "memory": {}}
    path.unlink(missing_ok=True)
    return {**found, "code": code}


def rows_of(model: str, found: dict[str, Any], label: str) -> list[list[str]]:
    """The lines of one trainer in the table of one model."""
    rows = []
    for name, row in found["models"].get(model, {}).items():
        if "error" in row:
            rows.append([f"{label} {name}", "-", "-", "-", "-", "-", row["error"][:60]])
            continue
        variant, notes = VARIANTS[name], []
        goal = 0.0
        if label == "ours" and variant.compile != "default":
            ratio, goal = (row["to_graph"], TO_GRAPH) if variant.compile else (row["to_by_hand"], TO_BY_HAND)
            notes.append(f"goal {goal} {'reached' if ratio <= goal else 'MISSED'}")
        if not row["agrees"]:
            notes.append("WRONG: " + ", ".join(f"{key} {value:.4g}" for key, value in row["losses"].items()))
        if row["told"]:
            notes.append("it said: " + row["told"][0])
        columns = [f"{row['by_hand']:.1f}", f"{row['graph']:.1f}", f"{row['trainer']:.1f}"]
        rows.append([f"{label} {name}", *columns, f"{row['to_by_hand']:.3f}", f"{row['to_graph']:.3f}", "; ".join(notes)])
    return rows


def table(figures: dict[str, Any]) -> str:
    """Microseconds per step of all, and peaks of memory."""
    ours, upstream = figures["ours"], figures["lightning"]
    lines = []
    for model in figures["models"]:
        rows = [[model, "by hand", "graph", "trainer", "x by hand", "x graph", ""], *rows_of(model, ours, "ours")]
        if upstream is not None:
            rows += rows_of(model, upstream, f"lightning {upstream['version']}")
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:6], widths[1:6]), row[6]]).rstrip() for row in rows]
        for label, found in (("ours", ours), ("lightning", upstream)):
            lines.append(f"peak memory, {label}: {memory_line((found or {'memory': {}})['memory'].get(model))}")
        lines.append("")
    return "\n".join(lines)


def memory_line(peaks: dict[str, Any] | None) -> str:
    """Peaks beside that of the hand-written loop."""
    if peaks is None:
        return "not measured"
    if "error" in peaks:
        return str(peaks["error"])
    if not peaks["by hand"]:
        return "not measured on this device"
    return ", ".join(f"{name} {value / 2**20:.1f} MiB ({value / peaks['by hand']:.3f})" for name, value in peaks.items()) + (
        f"; goal: bare within {MEMORY}"
    )


def is_wrong(found: dict[str, Any] | None) -> bool:
    """Whether something failed, or did not learn the same."""
    if found is None:
        return False
    rows = [row for model in found["models"].values() for row in model.values()]
    return found.get("code", 0) != 0 or not rows or any("error" in row or not row["agrees"] for row in rows)


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--lightning", metavar="PYTHON", help="an interpreter that has lightning 2.x, to be measured too")
    parser.add_argument("--quick", action="store_true", help="a minute instead of five: fewer and shorter blocks")
    parser.add_argument("--tiny", action="store_true", help="next to nothing, to see that the script works")
    parser.add_argument("--default", action="store_true", help='measure compile="default" too')
    parser.add_argument("--on-device", dest="pinned", action="store_false", help="batches lie on the device, not in pinned memory")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--models", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="MODEL", help=", ".join(SETTINGS))
    parser.add_argument("--blocks", type=int, help="measured blocks of each loop")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json", help="where the figures go")
    parser.add_argument("--limit", type=float, default=400, help="seconds that one interpreter may take; what it has measured counts")
    parser.add_argument("--measure", action="store_true", help="measure the lightning of this interpreter, and print nothing")
    args = parser.parse_args(given)
    if args.only is None:
        args.only = [name for name, variant in VARIANTS.items() if args.default or variant.compile != "default"]
    return args


def main() -> None:
    """Measure, print, write."""
    args = parsed()
    if args.measure:
        measure_all(args)
        return
    start = time.perf_counter()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA device was found. --device cpu --tiny shows that the script works.")
    blocks, *steps = length(args)
    machine = describe_machine()
    machine["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else machine["cpu"]
    figures = {**machine, "blocks": blocks, "steps": dict(zip(SETTINGS, steps)), "models": args.models, "pinned": args.pinned}
    figures |= {"ours": measure_in_process(None, args), "lightning": None}
    write(args.json, figures)
    if args.lightning:
        figures["lightning"] = measure_in_process(args.lightning, args)
        write(args.json, figures)
    print(f"Microseconds per step, medians of {blocks} blocks of {steps} steps. {machine['date']}, {machine['device']}, {machine['cpu']},")
    print(f"torch {figures['ours']['torch']}, batches {'in pinned memory' if args.pinned else 'on the device'}\n")
    print(table(figures))
    for name in ("ours", "lightning"):
        if figures[name] is not None and figures[name]["code"]:
            print(f"{name}: the process ended with {figures[name]['code']}, and what is missing above was not measured")
    print(f"{time.perf_counter() - start:.0f} s in all")
    sys.exit(1 if is_wrong(figures["ours"]) or is_wrong(figures["lightning"]) else 0)


if __name__ == "__main__":
    main()
