"""What runs take in memory at their peak beside hand-written loops, by ``benchmarks/memory.py``; outputs of ``predict_stream``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning.pytorch import LightningModule, Trainer

from .common import Check, Place, run_python
from .devices import REPOSITORY, paths_for_child

LIMIT = 1.01  # times the hand-written loop's peak


def checks(place: Place) -> list[Check]:
    return [("peak memory beside plain loops", lambda: measure(place)), ("predict_stream", lambda: stream(place))]


def measure(place: Place) -> str:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "memory.json")
        device = "cuda" if place.is_cuda else "cpu"
        arguments = ["--device", device, "--steps", "0", "--batches", "0", "--json", str(results)]
        run_python([str(REPOSITORY / "benchmarks" / "memory.py"), *arguments], PYTHONPATH=paths_for_child())
        measured: dict[str, Any] = json.loads(results.read_text())
    ratios = {name: row["ratio"] for name, row in measured["peaks"].items()}
    large = {name: ratio for name, ratio in ratios.items() if ratio > LIMIT}
    assert not large, f"more than {LIMIT} times: {large}"
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())


class Doubling(LightningModule):
    """Gives each batch twice, on the device."""

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return batch * 2


def stream(place: Place) -> str:
    """Outputs arrive on the host, one by one, and the next batches take no more memory."""
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="gpu" if place.is_cuda else "cpu", devices=1, **options)
    batches = [torch.full((256, 1024), float(index)) for index in range(20)]
    taken = []
    for index, output in enumerate(trainer.predict_stream(Doubling(), DataLoader(batches, batch_size=None))):  # type: ignore[arg-type]
        assert output.device.type == "cpu"
        assert torch.equal(output, batches[index] * 2)
        taken.append(torch.cuda.memory_allocated() if place.is_cuda else 0)
    assert len(taken) == 20
    assert taken[-1] <= taken[1], taken
    return f"{len(taken)} outputs, {taken[-1]} bytes on the device"
