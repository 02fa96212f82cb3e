"""Errors after ``fabric.launch()``, where no function of the launcher's surrounds them: the first cause is told all the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import os, signal, time
import torch
from lightning.fabric import Fabric

def fail():
    raise ValueError("bad batch")

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
fabric.all_reduce(torch.ones(1))
if fabric.global_rank == 1:
    {deed}
fabric.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("deed", "cause"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "The run failed: rank 1 was killed by SIGKILL"),
        ("os._exit(3)", "The run failed: rank 1 ended with exit code 3"),
        ("fail()", "ValueError: bad batch"),
    ],
)
def test_first_cause_is_told(run: Callable[..., Any], tmp_path: Path, deed: str, cause: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(deed=deed))
    done = run(command=[sys.executable, str(script)])
    assert done.code != 0
    assert cause in done.error
