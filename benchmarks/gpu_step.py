"""What a training step costs on a GPU beside the same step in a hand-written loop.

A perceptron of three layers, 256 wide, batches of 128, fused AdamW, clipping by norm: the GPU has little to do, so the time is
what the host needs to launch the work, and a framework's own work shows. Both loops run in one process and take turns in
short blocks, each ended by waiting for the GPU: the trainer's batches come from an iterable that, between two blocks of
them, runs a block of the hand-written loop. Whatever slows the machine down slows both; medians of the blocks are compared.

    python benchmarks/gpu_step.py
    python benchmarks/gpu_step.py --lightning /path/to/an/environment/with/lightning/bin/python

Only public names are used, so the same script measures whichever ``lightning`` its interpreter has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine
from turns import TurnTaking, be_quiet, run_elsewhere, silence

try:
    import lightning.pytorch as L
except ImportError:
    import pytorch_lightning as L

WIDTH, BATCH, CLIP = 256, 128, 1.0
Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)


class Perceptron(L.LightningModule):
    """The same step as :func:`by_hand` takes, for the trainer.

    Args:
        log: keywords of ``self.log``; None logs nothing.
    """

    def __init__(self, log: dict[str, Any] | None) -> None:
        super().__init__()
        self.net = network()
        self.log_options = log

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.log_options is not None:
            self.log("loss", loss, **self.log_options)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


def by_hand(device: torch.device, mixed: bool) -> Callable[[list[Batch]], None]:
    """The loop that one would write."""
    net = network().to(device)
    optimizer = optimizer_of(net)
    parameters = list(net.parameters())

    def run(batches: list[Batch]) -> None:
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16) if mixed else nullcontext():
                loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()

    return run


def progress_bar() -> dict[str, Any]:
    from importlib import import_module

    return {"callbacks": [import_module(L.__name__ + ".callbacks").TQDMProgressBar()], "enable_progress_bar": True}


def csv_logger() -> dict[str, Any]:
    from importlib import import_module

    return {"logger": import_module(L.__name__ + ".loggers").CSVLogger(tempfile.mkdtemp(prefix="gpu_step_"))}


# name: (precision, keywords of self.log, arguments of the trainer)
VARIANTS: dict[str, tuple[str, dict[str, Any] | None, Callable[[], dict[str, Any]]]] = {
    "bare": ("32-true", None, dict),
    "bf16-mixed": ("bf16-mixed", None, dict),
    "1 log": ("32-true", {}, dict),
    "1 log, step and epoch": ("32-true", {"on_step": True, "on_epoch": True}, dict),
    "progress bar": ("32-true", None, progress_bar),
    "progress bar, 1 log": ("32-true", {"prog_bar": True}, progress_bar),
    "CSV logger, 1 log": ("32-true", {}, csv_logger),
}


def measure(name: str, device: torch.device, blocks: int, steps: int) -> dict[str, Any]:
    """Microseconds per step of both loops, or the error that the trainer raises."""
    precision, log, arguments = VARIANTS[name]
    torch.manual_seed(0)
    run = by_hand(device, precision == "bf16-mixed")
    data = [(torch.randn(BATCH, WIDTH, device=device), torch.randint(10, (BATCH,), device=device)) for _ in range(8)]
    source = TurnTaking(device, [data[i % len(data)] for i in range(steps)], blocks, {"by hand": run})
    options: dict[str, Any] = {
        "accelerator": device.type, "devices": [device.index or 0] if device.type == "cuda" else 1, "precision": precision, "max_epochs": 1,
        "gradient_clip_val": CLIP, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    try:
        L.Trainer(**{**options, **arguments()}).fit(Perceptron(log), source)
    except RuntimeError as error:  # Lightning refuses to clip in mixed precision with a fused optimizer
        return {"error": str(error).splitlines()[0]}
    ours, theirs = source.times["trainer"], source.times["by hand"]
    return {
        "by_hand": statistics.median(theirs),
        "trainer": statistics.median(ours),
        "overhead": statistics.median(a - b for a, b in zip(ours, theirs)),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs)),
    }


def measure_all(names: list[str], device: torch.device, blocks: int, steps: int) -> dict[str, Any]:
    """All variants with the ``lightning`` of this interpreter."""
    be_quiet()
    results = {}
    for name in names:
        with silence():
            results[name] = measure(name, device, blocks, steps)
    return {"version": L.__version__, "torch": torch.__version__, "variants": results}


def measure_elsewhere(python: str, arguments: list[str]) -> dict[str, Any]:
    """The same with the ``lightning`` of another interpreter."""
    done = run_elsewhere(python, __file__, ["--measure", *arguments], capture_output=True)
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table(ours: dict[str, Any], upstream: dict[str, Any] | None) -> str:
    """Microseconds per step, side by side."""
    head = ["", "by hand", "trainer", "overhead", "ratio"]
    rows = []
    for name, row in ours["variants"].items():
        cells = [name, *cells_of(row)]
        if upstream is not None:
            other = upstream["variants"][name]
            cells += cells_of(other)[1:]
        rows.append(cells)
    if upstream is not None:
        head += [f"lightning {upstream['version']}", "overhead", "ratio"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in [head, *rows]]
    errors = {row["error"] for row in (upstream or {"variants": {}})["variants"].values() if "error" in row}
    return "\n".join([*lines, *(f"refused: {error}" for error in errors)])


def cells_of(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return ["", "refused", "", ""]
    return [f"{row['by_hand']:.1f}", f"{row['trainer']:.1f}", f"{row['overhead']:.1f}", f"{row['ratio']:.3f}"]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--lightning", metavar="PYTHON", help="an interpreter that has lightning 2.x, to be measured too")
    parser.add_argument("--blocks", type=int, default=30, help="measured blocks of each loop")
    parser.add_argument("--steps", type=int, default=100, help="steps in a block")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu_step.json", help="where the figures go")
    parser.add_argument("--measure", action="store_true", help="print the figures as JSON, and nothing else")
    args = parser.parse_args()
    device = torch.device(args.device)
    ours = measure_all(args.only, device, args.blocks, args.steps)
    if args.measure:
        print(json.dumps(ours))
        return
    arguments = ["--device", args.device, "--blocks", str(args.blocks), "--steps", str(args.steps), "--only", *args.only]
    upstream = measure_elsewhere(args.lightning, arguments) if args.lightning else None
    machine = describe_machine()
    machine["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else machine["cpu"]
    where = f"{machine['device']}, torch {ours['torch']}, lightning {ours['version']}"
    print(f"Microseconds per step, medians of {args.blocks} blocks of {args.steps} steps. {where}")
    print(table(ours, upstream))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {**machine, "blocks": args.blocks, "steps": args.steps, "ours": ours, "lightning": upstream}
    args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
