"""The benchmark on several GPUs runs, on the CPU with a tiny model: every variant trains, and to the same loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "multi_gpu.py"


@pytest.mark.slow
def test_trainer_and_hand_written_loops_reach_the_same_loss() -> None:
    options = ["--tiny", "--device", "cpu", "--rounds", "1", "--precision", "32-true", "--json", "figures.json"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, encoding="utf-8", timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr

    figures = json.loads(Path("figures.json").read_text())
    assert set(figures["table"]) == {"ddp-hand", "ddp-trainer", "fsdp-hand", "fsdp-trainer"}
    for row in figures["table"].values():
        assert row["loss_difference"] < 1e-5
        assert row["tokens_per_second"] > 0
    assert figures["settings"]["devices"] == 2
