"""What ``import lightning.pytorch`` adds to ``import torch``: seconds, and memory.

A fresh interpreter imports torch, then the package, and looks at the clock and at its own size in between. If an interpreter
with the upstream package is given the two take turns, so that whatever slows the machine down slows both. Medians are shown.

    python benchmarks/import_cost.py
    python benchmarks/import_cost.py --lightning /path/to/an/environment/with/lightning/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

GOAL_PERCENT = 15.0

SCRIPT = """
import json, resource, time

def now():
    # The size is in kilobytes on Linux and in bytes on macOS: the percentage is right on both.
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

start = now()
import torch
between = now()
import lightning.pytorch
print(json.dumps([start, between, now()]))
"""


def measure(python: str) -> dict[str, float]:
    """Both imports in a fresh interpreter."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([python, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{python} cannot import lightning.pytorch:\n{done.stderr}")
    start, between, end = json.loads(done.stdout.splitlines()[-1])
    torch_wall, torch_cpu, _ = (after - before for before, after in zip(start, between))
    wall, cpu, megabytes = (after - before for before, after in zip(between, end))
    return {
        "torch_wall": torch_wall,
        "torch_cpu": torch_cpu,
        "torch_megabytes": between[2],
        "added_wall": wall,
        "added_cpu": cpu,
        "added_megabytes": megabytes,
        "percent_wall": 100 * wall / torch_wall,
        "percent_cpu": 100 * cpu / torch_cpu,
        "percent_megabytes": 100 * megabytes / between[2],
    }


def compare(pythons: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians for each interpreter."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for turn in range(rounds + 1):
        for name, python in pythons.items():
            sample = measure(python)
            if turn:  # the first turn writes byte code and fills the file cache
                samples[name].append(sample)
    return {name: {key: statistics.median(sample[key] for sample in taken) for key in taken[0]} for name, taken in samples.items()}


def line(name: str, row: dict[str, Any]) -> str:
    """One package's figures as text."""
    return (
        f"{name}: {row['added_cpu']:.2f} s of CPU time on top of {row['torch_cpu']:.2f} s ({row['percent_cpu']:.1f} %), "
        f"{row['added_wall']:.2f} s on top of {row['torch_wall']:.2f} s on the clock ({row['percent_wall']:.1f} %), "
        f"{row['added_megabytes']:.0f} MB on top of {row['torch_megabytes']:.0f} MB ({row['percent_megabytes']:.1f} %)"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lightning", metavar="PYTHON", help="an interpreter that has lightning 2.x, to be measured too")
    parser.add_argument("--rounds", type=int, default=11, help="measured turns")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "import_cost.json", help="where the figures go")
    args = parser.parse_args()
    pythons = {"ours": sys.executable} | ({"lightning": args.lightning} if args.lightning else {})
    machine = describe_machine()
    results = compare(pythons, args.rounds)
    print(f"import lightning.pytorch after import torch: medians of {args.rounds} turns.")
    print(f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, load {machine['load']}\n")
    for name, row in results.items():
        print(line(name, row))
    print(f"\nthe goal is at most {GOAL_PERCENT:.0f} % in time and in memory")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**machine, "rounds": args.rounds, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
