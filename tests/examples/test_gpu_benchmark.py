"""The benchmark on a GPU runs, on the CPU with tiny models, also where steps are replayed: every trainer learns the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDED = f"""
import sys
sys.path[:0] = [{str(REPOSITORY / "benchmarks")!r}, {str(REPOSITORY / "tests" / "helpers")!r}]
import gpu
from tape import record_on_tapes

recorders = record_on_tapes()
gpu.measure_all(gpu.parsed(sys.argv[1:]))
assert all(recorder.replays > 20 for recorder in recorders[:4] + recorders[5:9]), [recorder.replays for recorder in recorders]
assert len(recorders) == 10  # the fifth and the last one measured memory
"""


@pytest.mark.slow
def test_trainer_learns_what_hand_written_loops_learn() -> None:
    options = ["--tiny", "--device", "cpu", "--json", "figures.json"]
    done = subprocess.run([sys.executable, "-c", RECORDED, *options], capture_output=True, encoding="utf-8", timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr

    figures = json.loads(Path("figures.json").read_text())
    assert set(figures["models"]) == {"perceptron", "GPT"}
    for rows in figures["models"].values():
        assert len(rows) == 8
        for name, row in rows.items():
            assert row.get("agrees"), (name, row)
            assert not row["told"], row["told"]
