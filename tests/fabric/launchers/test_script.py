"""Ranks that run the whole script again: how runs end, well or badly."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
QUICK = ("--options", '{"shutdown_timeout": 4}')


def wait_for(paths: list[Path], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not begin"
        time.sleep(0.05)


def test_ranks_run_the_script_and_stay_for_the_next_launch(run: Start) -> None:
    done = run("--ranks", "3", "add", "add")
    assert done.code == 0, done.error
    assert done.error == ""
    results = sorted(done.results, key=lambda result: (result["rank"], result["pid"]))
    assert [result["rank"] for result in results] == [0, 0, 1, 1, 2, 2]
    assert {result["sum"] for result in results} == {6.0}
    assert len({result["pid"] for result in results}) == 3
    assert all(result["argv"] == ["--ranks", "3", "add", "add"] for result in results)
    assert {result["threads"] for result in results} == {max(1, len(os.sched_getaffinity(0)) // 3)}


def test_rank_that_raises_is_named_with_its_traceback(run: Start) -> None:
    done = run("--ranks", "3", "fail")
    assert done.code == 1
    assert done.results == []
    assert "PeerFailure: The run failed: rank 2 raised ValueError: bad batch." in done.error
    said = done.error[done.error.rindex("PeerFailure") :]
    assert "On rank 2, the first to fail:" in said
    assert "in fail" in said


def test_killed_rank_is_named_and_what_it_has_started_ends(run: Start) -> None:
    done = run("kill")
    assert done.code == 1
    assert "The run failed: rank 1 was killed by SIGKILL" in done.error


@pytest.mark.parametrize(("deed", "how"), [("exit", "ended with exit code 3"), ("leave", "left with exit code 0")])
def test_rank_zero_that_computes_is_interrupted(run: Start, deed: str, how: str) -> None:
    done = run(*QUICK, f"{deed}_while_others_compute")
    assert done.code == 1
    assert f"PeerFailure: The run failed: rank 1 {how}" in done.error
    assert "in exit_while_others_compute" in done.error or "in leave_while_others_compute" in done.error


def test_rank_zero_that_hears_nothing_is_ended_in_time(run: Start) -> None:
    done = run("--options", '{"shutdown_timeout": 2}', "exit_while_others_are_deaf")
    assert done.code == 3
    assert "The run failed: rank 1 ended with exit code 3" in done.error
    assert "Rank 0 did not react to this for 2 s" in done.error
    assert "in exit_while_others_are_deaf" in done.error  # where it stood


def test_rank_that_stands_still_is_stopped_and_named(run: Start) -> None:
    done = run("hang")
    assert done.code == 1
    assert "RuntimeError: Operation timed out" in done.error
    assert "Still running when rank 0 ended, and stopped: ranks [1]." in done.error


def test_error_of_rank_zero_keeps_its_type_and_ends_the_others(run: Start) -> None:
    done = run("fail_on_rank_zero")
    assert done.code == 1
    assert "KeyError: 'zero'" in done.error
    assert "PeerFailure" not in done.error


def test_others_that_wait_for_an_error_that_was_caught_are_stopped(run: Start) -> None:
    done = run("--options", '{"shutdown_timeout": 2}', "--catch", "fail_on_rank_zero")
    assert done.results == ["caught KeyError"]
    assert done.code == 1
    assert "Still running when rank 0 ended, and stopped: ranks [1]." in done.error


def test_error_that_all_ranks_catch_leaves_them_running(run: Start) -> None:
    done = run("--catch", "fail_alike", "add")
    assert done.code == 0, done.error
    assert sorted(str(result) for result in done.results)[:2] == ["caught KeyError"] * 2
    assert {result["sum"] for result in done.results if isinstance(result, dict)} == {3.0}


def test_failure_can_be_caught_and_the_next_launch_refuses(run: Start) -> None:
    done = run("--catch", "fail", "add")
    assert done.results == ["caught PeerFailure", "caught PeerFailure"]
    assert done.code == 1


def test_rank_that_fails_after_its_work_fails_the_run(run: Start) -> None:
    done = run("--crash", "1", "add")
    assert done.code == 1
    assert "The run failed: rank 1 raised RuntimeError: after the work" in done.error


def test_exit_by_all_ranks_is_no_failure(run: Start) -> None:
    done = run("quit")
    assert (done.code, done.error) == (0, "")


def test_slower_rank_may_finish(run: Start) -> None:
    done = run("dawdle")
    assert (done.code, done.error) == (0, "")
    assert Path("dawdled").exists()


def test_straggler_is_stopped_after_its_time(run: Start) -> None:
    done = run("--options", '{"straggler_timeout": 0.5}', "dawdle")
    assert done.code == 1
    assert "Still running when rank 0 ended, and stopped: ranks [1]." in done.error
    assert not Path("dawdled").exists()


def test_killed_parent_takes_the_others_along(start: Start) -> None:
    running = start("wait_for_the_end")
    wait_for([Path("pid-0"), Path("pid-1")])
    os.kill(running.process.pid, signal.SIGKILL)
    assert running.left() == []


def test_interrupt_from_the_terminal_ends_all(start: Start) -> None:
    running = start("wait_for_the_end")
    wait_for([Path("pid-0"), Path("pid-1")])
    os.killpg(running.process.pid, signal.SIGINT)
    done = running.finish()
    assert done.code != 0
    assert "KeyboardInterrupt" in done.error
    assert "PeerFailure" not in done.error
    assert done.left() == []


def test_two_machines_meet(start: Start) -> None:
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    shared = {"MASTER_PORT": str(find_free_network_port()), "NODE_SIZE": "2", "MASTER_ADDR": "localhost"}
    nodes = [start("--options", '{"num_nodes": 2}', "add", NODE_RANK=str(node), **shared) for node in range(2)]
    results = [result for node in nodes for result in node.finish().results]
    assert [node.code for node in nodes] == [0, 0]
    assert sorted(result["rank"] for result in results) == [0, 1, 2, 3]
    assert {result["sum"] for result in results} == {10.0}


def test_torchrun_starts_the_ranks_and_shows_the_cause(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os\n"
        "from lightning.fabric.launchers import ScriptLauncher\n"
        "from lightning.fabric.plugins.environments import TorchElasticEnvironment\n"
        "def work():\n"
        "    open(f'seen-{os.environ[\"RANK\"]}', 'w').close()\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('bad batch')\n"
        "if __name__ == '__main__':\n"
        "    ScriptLauncher(TorchElasticEnvironment(), 2).launch(work)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", str(script)]
    done = start(command=torchrun).finish()
    assert done.code == 1
    assert (Path("seen-0").exists(), Path("seen-1").exists()) == (True, True)
    summary = done.error[done.error.index("Root Cause") :]
    assert "rank      : 1" in summary
    assert "ValueError: bad batch" in summary
    assert done.left() == []
