"""Saves on storage that fails: at every system call, killed or refused, the old or the new checkpoint is there, and whole.

A part of it by default; all of it with ``KERAUNOS_FAULTS=full`` (``make test-faults``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FULL = os.environ.get("KERAUNOS_FAULTS") == "full"
HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
SCENARIOS = ("overwrite", "rotate", "rotate-linked", "async-overwrite", "async-rotate", "async-rotate-linked", "sharded")
ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the shim takes the place of Linux's libc functions"),
    pytest.mark.skipif(COMPILER is None, reason="the shim has to be compiled, and there is no C compiler"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    assert COMPILER is not None
    library = str(tmp_path_factory.mktemp("shim") / "storage.so")
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", library, str(HERE / "storage.c"), "-ldl"], check=True)
    return library


def run_storm(shim: str, *arguments: str) -> Iterator[dict[str, Any]]:
    environment = {**os.environ, "LD_PRELOAD": shim, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(HERE / "storm.py"), *arguments], env=environment, capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for line in done.stdout.splitlines():
        print(line)
        yield json.loads(line)


@pytest.mark.parametrize("scenario", SCENARIOS if FULL else ["rotate-linked", "async-rotate-linked"])
def test_save_killed_at_every_system_call_leaves_the_old_or_the_new_checkpoint(scenario: str, shim: str, tmp_path: Path) -> None:
    kills = ("kill-before", "kill-half", "kill-after") if FULL else ("kill-half",)
    for result in run_storm(shim, scenario, "--where", str(tmp_path), "--faults", *kills):
        assert result["killed"] == result["calls"] > 7
        assert result["old"] > 0 < result["new"]  # both happened, so the kills came before and after the change


@pytest.mark.parametrize("scenario", SCENARIOS if FULL else ["rotate"])
def test_error_at_every_system_call_is_told_and_leaves_a_whole_checkpoint(scenario: str, shim: str, tmp_path: Path) -> None:
    for result in run_storm(shim, scenario, "--where", str(tmp_path), "--faults", *(ERRORS if FULL else ["ENOSPC"])):
        assert result["refused"] > result["calls"]  # of two tries at each call
        assert result["old"] > 0 < result["new"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sync", "async"])
def test_training_killed_at_every_system_call_of_its_saves_goes_on_to_the_same_bits(how: str, shim: str, tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": shim, "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "fit_storm.py"), how, "--every", "1" if FULL else "19", "--where", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["calls"] > 80  # saves did happen
    assert result["resumed"] > 0.8 * result["killed"] > 0  # the others came before the first of eight checkpoints was whole


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sync", "async"])
def test_training_that_may_try_again_goes_on_whatever_system_call_of_its_saves_is_refused(how: str, shim: str, tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": shim, "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "retry_storm.py"), how, "--every", "1" if FULL else "29", "--where", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["calls"] > 80
    assert result["runs"] > 5


@pytest.mark.skipif(not FULL, reason="a part of `make test-faults`")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_another_file_system_keeps_the_promise_too(scenario: str, shim: str) -> None:
    memory = "/dev/shm"
    if not os.path.isdir(memory):
        pytest.skip("there is no /dev/shm")
    for result in run_storm(shim, scenario, "--where", memory, "--faults", "kill-half", "ENOSPC"):
        assert result["old"] > 0 < result["new"]
