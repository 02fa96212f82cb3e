"""What processes tell each other beside their collectives."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import free_port, run, run_to_end

from lightning.fabric.launchers import PeerFailure, failures
from lightning.fabric.side_channel import SideChannel


def tell(rank: int, size: int) -> list[Any]:
    channel = SideChannel.to_all()
    heard: list[Any] = []

    def talk() -> float | None:
        channel.put(f"from/{rank}", {"rank": rank})
        heard.append(channel.put_first("first", rank))
        channel.add("sum", rank + 1)
        heard.append(channel.get("never written"))
        return None

    def listen() -> float | None:
        others = [channel.get(f"from/{other}") for other in range(size)]
        if None in others or channel.add("sum", 0) < sum(range(size + 1)):
            return 0.05
        heard.append(others)
        return None

    channel.every(talk, 0)
    channel.every(listen, 0)
    wait_for(lambda: len(heard) == 3)
    torch.distributed.barrier()
    channel.close()
    return heard


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_values_reach_all_processes() -> None:
    heard = run(tell, 3)
    assert len({tuple(map(str, [each for each in one if each is not None and not isinstance(each, list)])) for one in heard}) == 1
    assert [one[-1] for one in heard] == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    assert all(None in one for one in heard)


def two_runs(rank: int, size: int) -> list[Any]:
    found = []
    for number in range(2):
        channel = SideChannel.to_all()
        channel.send("value", f"run {number} of {rank}", first=True, wait=5)
        channel.every(lambda channel=channel: found.append(channel.get("value")), 0)  # type: ignore[misc]
        wait_for(lambda number=number: len(found) > number)  # type: ignore[misc]
        channel.close()
        torch.distributed.barrier()
    return found


def test_values_of_an_earlier_run_are_not_seen() -> None:
    first, second = run(two_runs, 2)
    assert first == second
    assert [value[:5] for value in first] == ["run 0", "run 1"]


# ---- failures -------------------------------------------------------------------------------------------------------------


def fail_while_others(rank: int, size: int, what: str) -> str:
    """As processes of different machines, which share no directory."""
    channel = SideChannel.to_all()
    channel.grace = 2
    try:
        if rank == 1:
            time.sleep(0.5)
            raise ValueError("bad batch")
        if what == "compute":
            wait_for(lambda: False)
        if what == "wait":
            torch.distributed.barrier()
        if what == "hear nothing":
            sleep_in_c()
    except BaseException as error:
        channel.fail(error)
        if rank == 1:
            time.sleep(5)  # it saves what it can, so that its connections stay
        cause = failures.first_failure()
        channel.close()
        return f"{type(error).__name__}, because {cause}"
    return "went on"


def sleep_in_c() -> None:
    import ctypes

    ctypes.CDLL(None).sleep(60)


def test_process_that_computes_hears_of_the_failure_of_another() -> None:
    zero, _ = run(fail_while_others, 2, "compute")
    assert zero == "PeerFailure, because rank 1 raised ValueError: bad batch"


def test_process_that_hears_nothing_is_ended_after_a_while() -> None:
    zero, one = run_to_end(fail_while_others, 2, "hear nothing")
    assert zero.trace == "it died with exit code 1"
    assert one.value is not None


def learn_the_cause(rank: int, size: int) -> str:
    """Rank 0 only sees that its connection is gone, and asks why."""
    channel = SideChannel.to_all()
    try:
        if rank == 1:
            raise ValueError("bad batch")
        torch.distributed.barrier()
    except BaseException as error:
        channel.fail(error)
        if rank == 1:
            os._exit(1)
        return f"{type(error).__name__}, because {failures.first_failure()}"
    return "went on"


def test_process_that_sees_another_vanish_learns_why() -> None:
    zero, _ = run_to_end(learn_the_cause, 2)
    assert zero.value in (
        "RuntimeError, because rank 1 raised ValueError: bad batch",
        "PeerFailure, because rank 1 raised ValueError: bad batch",
    )


def end_together(rank: int, size: int) -> bool:
    channel = SideChannel.to_all()
    channel.ends_together = True
    if rank == 0:
        channel.fail(SystemExit(143))
    time.sleep(1.5)
    told = channel.alarm is not None
    channel.close()
    return told


def test_end_that_all_have_agreed_on_is_not_told() -> None:
    assert run(end_together, 2) == [False, False]


def lose_rank_zero(rank: int, size: int, port: int) -> str:
    """Rank 0, which holds the store, is killed; rank 1 stands in a wait that has no end of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    channel = SideChannel.to_all()
    channel.grace = 2
    if rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            time.sleep(30)
    except PeerFailure as error:
        return str(error)


@pytest.mark.slow
def test_loss_of_the_process_that_holds_the_store_ends_those_that_stand_still() -> None:
    _, one = run_to_end(lose_rank_zero, 2, free_port(), group=False)
    assert one.error == "Died" or "rank 0 is gone" in one.value


def get_on_without_rank_zero(rank: int, size: int, port: int, folder: str) -> str:
    os.chdir(folder)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    channel = SideChannel.to_all()
    channel.grace = 1
    if rank == 0:
        time.sleep(1)
        os._exit(0)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        Path(f"part-{rank}").write_bytes(bytes(1_000_000))
        time.sleep(0.1)
    channel.close()
    return "done"


def test_process_that_gets_on_may_outlive_the_one_that_holds_the_store(tmp_path: Path) -> None:
    _, one = run_to_end(get_on_without_rank_zero, 2, free_port(), str(tmp_path), group=False)
    assert one.value == "done"


# ---- many processes -------------------------------------------------------------------------------------------------


class Counting:
    """A store that counts the requests it gets."""

    def __init__(self) -> None:
        self.store, self.requests = torch.distributed.HashStore(), 0

    def clone(self) -> Counting:
        return self

    def has_extended_api(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def test_the_more_processes_there_are_the_more_rarely_each_of_them_asks() -> None:
    each = {size: SideChannel(0, size, None).paced(1.0) for size in (1, 100, 1_000, 10_000)}
    assert each == {1: 1.0, 100: 1.0, 1_000: 1.0, 10_000: 10.0}


@pytest.mark.parametrize("size", [10, 1_000])
def test_the_values_of_all_processes_take_two_requests(size: int) -> None:
    channel, store = SideChannel(0, size, None), Counting()
    channel._copy = store
    keys = [f"at/{rank}" for rank in range(size)]
    for rank, key in enumerate(keys):
        channel.put(key, {"rank": rank})
    store.requests = 0
    assert channel.get_all(keys) == [{"rank": rank} for rank in range(size)]
    assert store.requests == 2
    assert channel.get_all([*keys[:2], "never written"]) == [{"rank": 0}, {"rank": 1}, None]
