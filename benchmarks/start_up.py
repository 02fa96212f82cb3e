"""How long a small fit takes to its first step: ``Trainer()``, ``fit`` up to the end of the first step, and to its return.

Each run is a fresh process with cached bytecode. What torch imports when an optimizer is first made (``torch._dynamo``: a second or two)
belongs to any loop, so a hand-written step runs before; the imports that ours takes on its first run count.

    python benchmarks/start_up.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

GOAL_MILLISECONDS = 50.0
VARIANTS = {
    "bare": "logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False",
    "progress bar, summary": "logger=False, enable_checkpointing=False",
    "everything that is on by default": "",
}

CHILD = """
import json, logging, sys, time, warnings
import torch
from torch.utils.data import DataLoader
from lightning.pytorch import LightningModule, Trainer
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)

class Small(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not marks:
            marks.append((time.perf_counter(), time.process_time()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = DataLoader([torch.ones(8)] * 8, batch_size=4)
twin = Small()
optimizer = twin.configure_optimizers()
for batch in data:
    optimizer.zero_grad()
    twin.layer(batch).square().mean().backward()
    optimizer.step()
marks = []
begun = time.perf_counter(), time.process_time()
trainer = Trainer(max_epochs=1, accelerator="cpu", ARGUMENTS)
made = time.perf_counter(), time.process_time()
trainer.fit(Small(), data)
ended = time.perf_counter(), time.process_time()
row = [(b - a) * 1e3 for mark in (made, marks[0], ended) for a, b in zip(begun, mark)]
sys.stderr.write("@" + json.dumps(row) + "\\n")
"""


def run(arguments: str, cache: str) -> list[float]:
    """Milliseconds, wall and CPU, until the trainer is made, the first step is done, and ``fit`` returns."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        code = CHILD.replace("ARGUMENTS", arguments)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder)
    line = next((line for line in done.stderr.splitlines() if line.startswith("@")), None)
    if line is None:
        sys.exit(f"The run failed:\n{done.stderr}")
    return json.loads(line[1:])  # type: ignore[no-any-return]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="processes for each variant, after one that fills the cache")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "start_up.json", help="where the figures go")
    args = parser.parse_args()
    machine, results = describe_machine(), dict[str, Any]()
    print(f"Milliseconds, medians of {args.runs} processes. {machine['date']}, {machine['cpu']}, load {machine['load']}\n")
    print(f"{'':<34}{'Trainer()':>10}{'first step':>12}{'of CPU':>8}{'fit returns':>13}{'of CPU':>8}")
    with tempfile.TemporaryDirectory() as cache:
        for name in args.only:
            run(VARIANTS[name], cache)
            rows = [run(VARIANTS[name], cache) for _ in range(args.runs)]
            made, _, step, step_cpu, whole, whole_cpu = (round(statistics.median(column), 1) for column in zip(*rows))
            results[name] = {"trainer": made, "first_step": step, "first_step_cpu": step_cpu, "fit": whole, "fit_cpu": whole_cpu}
            print(f"{name:<34}{made:>10}{step:>12}{step_cpu:>8}{whole:>13}{whole_cpu:>8}", flush=True)
    if "bare" in results:
        print(f"\nbare: {results['bare']['first_step']} to the end of the first step; the goal is at most {GOAL_MILLISECONDS:.0f}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**machine, "milliseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
