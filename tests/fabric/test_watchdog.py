"""The watchdog: whom it blames, what it leaves alone, and how a run ends that stands still."""

from __future__ import annotations

import io
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.launchers import PeerFailure
from lightning.fabric.side_channel import SideChannel
from lightning.fabric.watchdog import Status, Watchdog, Watched, standing_still

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from processes import Outcome, run, run_to_end

LIMIT = 1.0


def watched(rank: int, still: float = 0.0, position: Any = (1,), waits: bool = False, state: str = "runs") -> Watched:
    numbers = None if position is None else list(position)
    return Watched(rank, Status(position=numbers, waits=waits, state=state), still)


@pytest.mark.parametrize(
    ("processes", "guilty"),
    [
        pytest.param([watched(0, 1), watched(1, 2)], [], id="all get on"),
        pytest.param([watched(0, 99, waits=True), watched(1, 99)], [1], id="one stands still, one waits for it"),
        pytest.param([watched(0, 99, (2,)), watched(1, 99, (1,)), watched(2, 99, (2,))], [1], id="one is behind"),
        pytest.param([watched(0, 99, waits=True), watched(1, 2)], [], id="one gets on, the other waits for it"),
        pytest.param([watched(0, 99, (7,)), watched(1, 2, (7,))], [], id="one gets on at the same place"),
        pytest.param([watched(0, 99, (7,)), watched(1, 2, (8,))], [0], id="the others left it behind"),
        pytest.param([watched(0, 99, (7,), True), watched(1, 2, (8,))], [], id="its evaluation is shorter, and it waits"),
        pytest.param([watched(0, 99, (2,), True), watched(1, 99, (1,), True)], [1], id="all wait"),
        pytest.param([watched(0, 99, waits=True), watched(1, 99, state="done")], [0], id="it waits for one that is done"),
        pytest.param([watched(0, 0, state="done"), watched(1, 99)], [1], id="the last one stands still"),
        pytest.param([watched(0, 99, (3,)), watched(1, 99, None)], [1], id="it has not reached the loop"),
        pytest.param([watched(0, 99, waits=True), Watched(1, None, 99)], [1], id="it has not begun"),
        pytest.param(
            [watched(0, 99, waits=True), Watched(1, Status(position=[1], waits=True), 99, 99, 9)], [1], id="it waited when last heard"
        ),
        pytest.param([watched(0, 99), watched(1, 99), watched(2, 99, (5,))], [0, 1], id="two are equally far"),
    ],
)
def test_who_holds_up_the_run(processes: list[Watched], guilty: list[int]) -> None:
    assert [each.rank for each in standing_still(processes, limit=10)] == guilty


class Loop:
    """Counts, as a loop of the trainer does, and is watched."""

    def __init__(self, limit: float = LIMIT, grace: float = 5) -> None:
        self.batches: int | None = 0
        self.channel = SideChannel.to_all()
        self.channel.grace = grace
        self.watchdog = Watchdog(self.channel, timedelta(seconds=limit), lambda: self.batches)
        self.watchdog.start()

    def run(self, seconds: float, batch: float = 0.1) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(batch)
            if self.batches is not None:
                self.batches += 1
            torch.distributed.all_reduce(torch.ones(1))

    def close(self) -> None:
        self.watchdog.stop()
        self.channel.close()


def stand_still(rank: int, size: int, how: str, log: str) -> str | None:
    sys.stderr = open(log, "a")  # noqa: SIM115
    loop = Loop()
    loop.run(0.5)
    try:
        if rank == 1:
            {"sleep": lambda: time.sleep(60), "spin": spin, "hold": hold, "barrier": torch.distributed.barrier}[how]()
        torch.distributed.all_reduce(torch.ones(1))
    except BaseException as error:
        loop.channel.fail(error)
        loop.close()
        raise PeerFailure from error
    return "went on"


def spin() -> None:
    while True:
        pass


def hold() -> None:
    """No other thread of this process runs Python meanwhile."""
    re.match("(a+)+$", "a" * 60 + "b")


@pytest.mark.parametrize(("how", "line"), [("sleep", "time.sleep(60)"), ("spin", "in spin")])
def test_process_that_stands_still_is_named_with_its_stack(how: str, line: str, tmp_path: Path) -> None:
    zero, one = run_to_end(stand_still, 2, how, str(tmp_path / "log"))
    assert one == Outcome(error="Died", trace="it died with exit code 1")
    assert zero.error == "PeerFailure"
    assert f"rank 1 stands still: it has made no progress for {LIMIT:g} s" in zero.message
    assert line in zero.message
    said = (tmp_path / "log").read_text()
    assert re.search(r"Rank 1 \(process \d+ of \S+, at position \d+\) stands still", said)
    assert re.search(r"Rank 0 \(process \d+ of \S+, at position \d+\) waits for others, in all_reduce", said)
    assert "watchdog_timeout" in said


def test_process_whose_interpreter_is_held_is_named_and_killed(tmp_path: Path) -> None:
    zero, one = run_to_end(stand_still, 2, "hold", str(tmp_path / "log"))
    assert one.trace == "it died with exit code -9"
    assert "rank 1 stands still" in zero.message
    assert "its interpreter is held" in zero.message
    assert "in hold" in zero.message


def test_processes_that_wait_for_each_other_are_ended(tmp_path: Path) -> None:
    outcomes = run_to_end(collect_differently, 2, str(tmp_path / "log"))
    assert [outcome.error for outcome in outcomes] == ["PeerFailure", "Died"]
    assert "waits for other ranks, which wait too" in outcomes[0].message
    assert "All processes wait for each other" in (tmp_path / "log").read_text()


def collect_differently(rank: int, size: int, log: str) -> None:
    sys.stderr = open(log, "a")  # noqa: SIM115
    loop = Loop()
    try:
        if rank == 0:
            torch.distributed.recv(torch.ones(1), src=1)
        torch.distributed.recv(torch.ones(1), src=0)
    except BaseException as error:
        loop.channel.fail(error)
        loop.close()
        raise PeerFailure from error


def test_runs_that_get_on_are_left_alone(tmp_path: Path) -> None:
    assert run(get_on, 2, str(tmp_path)) == ["done", "done"]


def get_on(rank: int, size: int, folder: str) -> str:
    loop = Loop()
    loop.run(1)
    # A long checkpoint, written by one while the other waits.
    if rank == 0:
        end = time.monotonic() + 2 * LIMIT
        while time.monotonic() < end:
            torch.save(torch.zeros(200_000), Path(folder) / "checkpoint")
    torch.distributed.barrier()
    # Longer evaluation on one than on the other.
    end = time.monotonic() + (2 * LIMIT if rank == 0 else 0)
    while time.monotonic() < end:
        time.sleep(0.1)
        loop.batches += 1  # type: ignore[operator]
    torch.distributed.barrier()
    # Outside of loops work is progress too.
    loop.batches = None
    end = time.monotonic() + (2 * LIMIT if rank == 1 else 0)
    while time.monotonic() < end:
        torch.ones(200, 200) @ torch.ones(200, 200)
    torch.distributed.barrier()
    # Between two runs.
    loop.close()
    time.sleep(1.5 * LIMIT)
    torch.distributed.barrier()
    # And one is done earlier than the other.
    again = Loop()
    again.run(0.5)
    if rank == 0:
        again.close()
    end = time.monotonic() + (2 * LIMIT if rank == 1 else 0)
    while time.monotonic() < end:
        time.sleep(0.1)
        again.batches += 1  # type: ignore[operator]
    again.close()
    return "done"


def test_nobody_is_blamed_while_one_is_looked_at_with_a_debugger() -> None:
    assert run(debug, 2) == ["continued", "continued"]


def debug(rank: int, size: int) -> str:
    import pdb

    class Slow(io.StringIO):
        def readline(self, size: int = -1) -> str:
            time.sleep(2 * LIMIT)
            return "continue\n"

    loop = Loop()
    loop.run(0.5)
    if rank == 1:
        pdb.Pdb(stdin=Slow(), stdout=io.StringIO()).set_trace()
    torch.distributed.all_reduce(torch.ones(1))
    loop.close()
    return "continued"


def test_lone_process_of_a_machine_is_ended_by_its_own_timer(tmp_path: Path) -> None:
    zero, one = run_to_end(hold_alone, 2, str(tmp_path / "log"))
    assert zero.error == "PeerFailure"
    assert "rank 1 stands still" in zero.message
    assert one.trace == "it died with exit code 1"


def hold_alone(rank: int, size: int, log: str) -> None:
    from lightning.fabric import stacks

    machine = stacks.machine()
    stacks.machine = lambda: f"{machine} {rank}"  # type: ignore[assignment]
    stand_still(rank, size, "hold", log)
