"""Signals to programs: with which exit code they end, what they leave behind, and that the same command goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Start = Callable[..., Any]
TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PROGRAM = str(Path(__file__).parent / "program.py")


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def wait_until_ready(size: int = 1) -> None:
    wait_for(lambda: all(Path(f"ready-{rank}").exists() for rank in range(size)), "three batches")


def pid_of(rank: int) -> int:
    return int(Path(f"pid-{rank}").read_text())


def steps_saved() -> int:
    return int(torch.load("run/last.ckpt", weights_only=True)["global_step"])


def check_saved(size: int, error: str) -> None:
    assert [path.name for path in Path("run").iterdir()] == ["last.ckpt"]
    for rank in range(size):
        assert Path(f"heard-{rank}").read_text() == f"{error} {steps_saved()}"


def check_goes_on(start: Start, *arguments: str) -> None:
    saved = steps_saved()
    done = start("--resume", "--steps", str(saved + 2), *arguments).finish()
    assert done.code == 0, done.error
    assert Path("began-0").read_text() == str(saved)


# ---- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
def test_term_saves_and_ends_with_143(start: Start, workers: str) -> None:
    running = start("--workers", workers)
    wait_until_ready()
    running.process.terminate()
    done = running.finish()
    assert done.code == TERMINATED, done.error
    assert "Traceback" not in done.error
    check_saved(1, "SIGTERMException")
    check_goes_on(start, "--workers", workers)
    assert done.left() == []


def test_exception_can_be_caught(start: Start) -> None:
    running = start("--catch")
    wait_until_ready()
    running.process.terminate()
    done = running.finish()
    assert (done.code, done.results) == (0, [["SIGTERMException", 143, True]])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_interrupt_from_the_terminal_saves_and_ends(start: Start, workers: str) -> None:
    running = start("--workers", workers)
    wait_until_ready()
    os.killpg(running.process.pid, signal.SIGINT)  # the workers get it as well
    done = running.finish()
    assert done.code == -signal.SIGINT, done.error
    assert "Press Ctrl-C again" in done.error
    assert "saved at" in done.error
    check_saved(1, "KeyboardInterrupt")
    check_goes_on(start, "--workers", workers)
    assert done.left() == []


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_workers_too_is_what_ended_the_run(start: Start, number: int, context: str) -> None:
    running = start("--workers", "2", "--context", context)
    wait_until_ready()
    os.killpg(running.process.pid, number)
    done = running.finish()
    assert done.code == (TERMINATED if number == signal.SIGTERM else -signal.SIGINT), done.error
    assert Path("heard-0").read_text().split()[0] == ("SIGTERMException" if number == signal.SIGTERM else "KeyboardInterrupt")
    check_goes_on(start)
    assert done.left() == []


@pytest.mark.parametrize(("where", "code"), [("in_python", -signal.SIGINT), ("in_a_library", INTERRUPTED)])
def test_second_interrupt_ends_a_step_that_hangs(start: Start, where: str, code: int) -> None:
    running = start("--stands", where)
    wait_until_ready()
    os.kill(running.process.pid, signal.SIGINT)
    wait_for(lambda: has_come(running), "the first Ctrl-C")
    assert running.process.poll() is None
    os.kill(running.process.pid, signal.SIGINT)
    done = running.finish(timeout=30)
    assert done.code == code, done.error
    assert "Press Ctrl-C again" in done.error
    assert ("has not reacted to Ctrl-C" in done.error) == (where == "in_a_library")
    assert not Path("run/last.ckpt").exists()


def has_come(running: Any) -> bool:
    """Whether the signal has been taken from where the kernel keeps it, so that a second one is no repetition of the same."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return not any(mask & 1 << (signal.SIGINT - 1) for mask in pending)


# ---- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "rank 1"),
        (signal.SIGINT, "all"),
        *(pytest.param(signal.SIGTERM, to, marks=pytest.mark.slow) for to in ("rank 0", "all")),
        *(pytest.param(signal.SIGINT, to, marks=pytest.mark.slow) for to in ("rank 0", "rank 1")),
    ],
)
def test_script_of_two_processes(start: Start, number: int, to: str) -> None:
    running = start("--strategy", "ddp", "--devices", "2")
    wait_until_ready(2)
    if to == "all":
        os.killpg(running.process.pid, number)
    else:
        os.kill(pid_of(int(to[-1])), number)
    done = running.finish()
    assert done.code == (TERMINATED if number == signal.SIGTERM else -signal.SIGINT), done.error
    assert "PeerFailure" not in done.error
    assert done.left() == []
    check_saved(2, "SIGTERMException" if number == signal.SIGTERM else "KeyboardInterrupt")


@pytest.mark.parametrize("to", ["main", pytest.param("rank 1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, -signal.SIGINT)])
def test_copies_in_two_processes(start: Start, number: int, code: int, to: str) -> None:
    running = start("--strategy", "ddp_fork", "--devices", "2")
    wait_until_ready(2)
    ranks = [int(pid) for pid in Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    os.kill(running.process.pid if to == "main" else ranks[1], number)
    done = running.finish()
    assert done.left() == []
    check_saved(2, "SIGTERMException" if number == signal.SIGTERM else "KeyboardInterrupt")
    assert done.code == code, done.error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_the_signal_on(start: Start, number: int) -> None:
    running = start("--strategy", "ddp", "--devices", "2", command=[*TORCHRUN, PROGRAM])
    wait_until_ready(2)
    os.kill(running.process.pid, number)
    done = running.finish(timeout=90)
    assert done.code != 0
    assert done.left() == []
    assert Path("run/last.ckpt").exists()


def test_second_interrupt_ends_processes_of_which_one_hangs(start: Start) -> None:
    running = start("--strategy", "ddp", "--devices", "2", "--stands", "in_python")
    wait_until_ready(2)
    os.killpg(running.process.pid, signal.SIGINT)
    wait_for(lambda: has_come(running), "the first Ctrl-C")
    os.killpg(running.process.pid, signal.SIGINT)
    done = running.finish(timeout=40)
    assert done.code in (-signal.SIGINT, INTERRUPTED), done.error
    assert done.left() == []
