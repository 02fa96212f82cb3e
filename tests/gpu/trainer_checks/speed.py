"""What a step costs beside the same step in a hand-written loop, by ``benchmarks/gpu_step.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .common import Check, Place, run_python
from .devices import REPOSITORY, paths_for_child

# A step of the trainer may take at most so many times the hand-written one's time; further variants are reported only.
LIMITS = {"bare": 1.15, "bf16-mixed": 1.15, "1 log": 1.25, "progress bar, 1 log": 1.3}


def checks(place: Place, upstream: str | None) -> list[Check]:
    return [("time per step beside a plain loop", lambda: measure(place, upstream))]


def measure(place: Place, upstream: str | None) -> str:
    python = upstream or sys.executable
    found = version_of(python)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "gpu_step.json")
        arguments = ["--device", str(place.device), "--json", str(results)]
        if not place.is_cuda:
            arguments += ["--blocks", "2", "--steps", "10"]
        if found:
            arguments += ["--lightning", python]
        printed = run_python([str(REPOSITORY / "benchmarks" / "gpu_step.py"), *arguments], PYTHONPATH=paths_for_child())
        measured: dict[str, Any] = json.loads(results.read_text())
    print(printed, file=sys.__stdout__)
    ratios = {name: row["ratio"] for name, row in measured["ours"]["variants"].items()}
    note = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    note += f"; lightning {found} measured too" if found else "; no upstream lightning here"
    slow = {name: round(ratios[name], 2) for name, limit in LIMITS.items() if ratios[name] > limit}
    assert not slow or not place.is_cuda, f"slower than {LIMITS}: {slow}"
    return note


def version_of(python: str) -> str:
    """The version of upstream's lightning that an interpreter has by itself; empty if none."""
    code = "import lightning, lightning.pytorch; print(lightning.__version__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment, cwd=elsewhere, timeout=120)
    version = done.stdout.strip()
    return version if done.returncode == 0 and "keraunos" not in version else ""
