"""Trainings in SLURM jobs whose time is nearly over."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import free_port

Start = Callable[..., Any]
PREEMPTED = [sys.executable, str(Path(__file__).parent / "preempted.py")]
TERMINATED = 128 + signal.SIGTERM


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """A program of that name that writes down its arguments and then, as SLURM does, ends the job; returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text('#!/bin/sh\necho "$@" >> scontrol-calls\nkill -TERM $(cat pid-*)\n')
    (folder / "scontrol").chmod(0o755)
    return folder


@pytest.fixture
def job(start: Start, scontrol: Path) -> Callable[..., list[Any]]:
    """Run the tasks of a job to their ends."""

    def run(*arguments: str, tasks: int = 2, **variables: str) -> list[Any]:
        variables |= {
            "PATH": f"{scontrol}:{os.environ['PATH']}",
            "MASTER_PORT": str(free_port()),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": str(tasks),
            "SLURM_NTASKS_PER_NODE": str(tasks),
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_NODELIST": "localhost",
            "OMP_NUM_THREADS": "1",
        }
        ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]
        started = [start("--devices", str(tasks), *arguments, command=PREEMPTED, **variables, **rank) for rank in ranks]
        done = [task.finish() for task in started]
        assert [task.left() for task in done] == [[]] * tasks
        return done

    return run


def number_in(name: str) -> int:
    return int(Path(name).read_text())


def test_signal_to_one_task_saves_requeues_and_the_next_job_goes_on(job: Callable[..., list[Any]]) -> None:
    done = job("--rank", "1", "--at", "5")
    assert [task.code for task in done] == [TERMINATED] * 2, done[0].error + done[1].error
    assert Path("scontrol-calls").read_text() == "requeue 4711\n"
    assert [path.name for path in Path("runs").iterdir()] == ["hpc_ckpt_1.ckpt"]
    saved = torch.load("runs/hpc_ckpt_1.ckpt", weights_only=True)
    assert 6 <= saved["global_step"] < 1000
    assert Path("heard-0").read_text() == Path("heard-1").read_text() == "SIGTERMException"

    again = job("--steps", str(saved["global_step"] + 3), "--resume", "hpc")
    assert [task.code for task in again] == [0, 0], again[0].error
    assert [number_in(f"began-{rank}") for rank in range(2)] == [saved["global_step"]] * 2
    assert [number_in(f"step-{rank}") for rank in range(2)] == [saved["global_step"] + 3] * 2


def test_long_validation_is_left_for_the_checkpoint(job: Callable[..., list[Any]]) -> None:
    done = job("--rank", "0", "--validating")
    assert [task.code for task in done] == [TERMINATED] * 2, done[0].error + done[1].error
    saved = torch.load("runs/hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 20
    assert saved["loops"]["fit_loop"]["progress"]["next"] == "validate"


def test_task_of_an_array_with_one_process(job: Callable[..., list[Any]]) -> None:
    done = job("--rank", "0", tasks=1, SLURM_ARRAY_JOB_ID="99", SLURM_ARRAY_TASK_ID="7")
    assert done[0].code == TERMINATED, done[0].error
    assert Path("scontrol-calls").read_text() == "requeue 99_7\n"
    assert torch.load("runs/hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 4


def test_term_ends_all_tasks_between_two_batches(job: Callable[..., list[Any]]) -> None:
    done = job("--rank", "1", "--signal", "SIGTERM")
    assert [task.code for task in done] == [TERMINATED] * 2, done[0].error
    assert not Path("scontrol-calls").exists()
    assert number_in("step-0") == number_in("step-1") < 1000
