"""The loop by hand over Fabric reaches what it promises, also in two processes."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fabric_digits.py"


@pytest.mark.slow
def test_fabric_digits_reads_digits_in_two_processes_and_leaves_log_and_checkpoint() -> None:
    arguments = ["--accelerator", "cpu", "--devices", "2", "--max-epochs", "8", "--output", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", str(EXAMPLE), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    [accuracy] = re.findall(r"Test accuracy: ([0-9.]+)", done.stdout)
    assert float(accuracy) > 0.93
    assert "of 359 digits" in done.stdout  # each once
    saved = torch.load("out/last.ckpt", weights_only=True)
    assert saved["epoch"] == 7
    assert f"{saved['accuracy']:.4f}" == accuracy
    with Path("out/csv/version_0/metrics.csv").open() as lines:
        assert len([row for row in csv.DictReader(lines) if row["test/acc"]]) == 8
