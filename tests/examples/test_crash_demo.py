"""The demonstration of crashes kills a run as often as it is asked to, and says truly what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "crash_demo.py"


@pytest.mark.slow
def test_killed_run_ends_with_the_same_weights() -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--kills", "3", "--seed", "3", "--output", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0].split() for line in done.stdout.splitlines() if line.startswith("  kill")] == [["kill", n] for n in "123"]
    assert done.stdout.count("started from step") >= 3  # two of three kills, at least, came after a checkpoint
    assert done.stdout.splitlines()[-5].startswith("Killed 3 times, resumed 3 times")
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()[-4:]] == ["yes"] * 4
