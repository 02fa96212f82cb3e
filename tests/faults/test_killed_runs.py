"""Training runs that are killed anywhere, and started again by the same call, end with the bits of the run that nobody killed.

A few kills by default, a thousand with ``KERAUNOS_FAULTS=full`` (``make test-faults``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FULL = os.environ.get("KERAUNOS_FAULTS") == "full"
PROGRAM = Path(__file__).parent / "kill_storm.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have started threads")


def storm(where: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), "--where", str(where), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 8  # the run that nobody killed has saved them all
    return result


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_nothing_is_lost(workers: int, tmp_path: Path) -> None:
    kills = 500 if FULL else 10
    result = storm(tmp_path, "--kills", str(kills), "--workers", str(workers), "--seed", "3")
    assert result["killed"] == kills
    assert result["resumed"] > kills // 3
    assert result["steps seen"] > (7 if FULL else 3)  # checkpoints of different steps were resumed from


@pytest.mark.slow
def test_killed_at_every_event_nothing_is_lost(tmp_path: Path) -> None:
    result = storm(tmp_path, "--sweep", "1" if FULL else "37")
    assert result["runs"] == result["killed"] > (200 if FULL else 5)


@pytest.mark.slow
@pytest.mark.parametrize("kills", ["1,1,1", "40,40,40,40,40,40", "60,3,60,3,60", "120,17,2,90"])
def test_run_killed_here_goes_on(kills: str, tmp_path: Path) -> None:
    assert storm(tmp_path, "--replay", kills)["runs"] == 1


@pytest.mark.skipif(not FULL, reason="a part of `make test-faults`: takes minutes")
@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_are_told_to_end_or_killed_lose_nothing(size: int, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM.with_name("rank_storm.py")), "--size", str(size), "--where", str(tmp_path)]
    subsets = 2**size - 1
    done = subprocess.run([*command, "--strikes", str(6 * subsets)], capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout.splitlines()[-1])
    result = json.loads(done.stdout.splitlines()[-1])
    assert min(result[how] for how in ("term", "kill", "raise")) >= 2 * subsets
    assert result["resumed"] > subsets
