"""XLALauncher on CPU devices of torch_xla: what comes back, how failures are told, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from xla_devices import IS_MISSING, REASON, run

from lightning.fabric.launchers.xla import ThreadRank, XLALauncher
from lightning.fabric.plugins.environments import XLAEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

needs_xla = pytest.mark.skipif(IS_MISSING, reason=REASON)


def launcher(start_method: Any = "fork", **options: Any) -> XLALauncher:
    return XLALauncher(XLAEnvironment(), 2, start_method, **options)


def descendants() -> list[str]:
    """The processes that this one, or one that it has started, has started and that still run."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found if Path(f"/proc/{pid}").exists()}
    return [line.decode() for line in lines.values() if line and b"resource_tracker" not in line]


# ---- what comes back ----------------------------------------------------------------------------------------------------


class Own:
    """An object that each device changes: it has to have one of its own."""

    def __init__(self) -> None:
        self.seen: list[int] = []


def working(own: Own, lock_free: Any, key: int = 0) -> dict[str, Any]:
    import torch_xla
    import torch_xla.runtime

    environment = XLAEnvironment()
    own.seen.append(environment.global_rank())
    return {
        "ranks": (environment.world_size(), environment.global_rank(), environment.local_rank(), environment.node_rank()),
        "device": str(torch_xla.device()),
        "seen": own.seen,
        "rank_zero_only": int(rank_zero_only.rank),  # type: ignore[attr-defined]
        "tensor": torch.ones(2, device=torch_xla.device()),
        "called": lock_free() if lock_free is not None else None,
        "key": key,
        "threads": torch.get_num_threads(),
        "variable": os.environ.get("SOME_VARIABLE"),
    }


def launching(start_method: str) -> dict[str, Any]:
    own = Own()
    before = XLAEnvironment()
    told = [before.world_size(), before.global_rank(), before.is_started]
    starter = launcher(start_method, variables={"SOME_VARIABLE": "1"})
    found = starter.launch(working, own, (lambda: "a lambda") if start_method == "fork" else None, key=3)
    found["tensor"] = (found["tensor"].tolist(), str(found["tensor"].device))
    return {
        **found,
        "own": own.seen,
        "before": told,
        "left": descendants(),
        "interactive": starter.is_interactive_compatible,
        "again": starter.launch(working, own, None)["seen"] if start_method == "fork" else [0],
    }


@needs_xla
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_result_of_the_first_device_comes_back(start_method: str) -> None:
    found = run(launching, start_method, devices=2)
    assert found["before"] == [1, 0, False]
    assert found["ranks"] == (2, 0, 0, 0)
    assert found["device"] == "xla:0"
    assert found["rank_zero_only"] == 0
    assert found["tensor"] == ([1.0, 1.0], "cpu")
    assert found["key"] == 3
    assert found["variable"] == "1"
    assert found["called"] == ("a lambda" if start_method == "fork" else None)
    assert found["seen"] == found["again"] == [0], "each device has a copy of the arguments"
    assert found["own"] == [], "and so has the process that launches"
    assert found["interactive"] == (start_method == "fork")
    assert found["left"] == []


# ---- failures -----------------------------------------------------------------------------------------------------------


def failing(kind: str) -> None:
    """Rank 1 fails, while rank 0 waits for it."""
    import torch_xla
    import torch_xla.core.xla_model as xm

    if XLAEnvironment().global_rank() == 1:
        if kind == "raises":
            raise KeyError("of rank 1")
        if kind == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(3)
    value = xm.all_reduce(xm.REDUCE_SUM, torch.ones(1).to(torch_xla.device()))
    torch_xla.sync()
    value.item()


def failures(kinds: list[str]) -> list[dict[str, Any]]:
    found = []
    for kind in kinds:
        began = time.monotonic()
        try:
            launcher().launch(failing, kind)
        except Exception as error:
            found.append({"kind": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began, "left": descendants()})
    return found


@needs_xla
def test_failure_of_one_device_ends_the_run_and_names_it() -> None:
    raised, killed, left = run(failures, ["raises", "is killed", "exits"], devices=2)
    assert raised["kind"] == ProcessRaisedException.__name__
    assert "rank 1 raised KeyError: 'of rank 1'" in raised["message"]
    assert "in failing" in raised["message"], "with its traceback"
    assert killed["kind"] == ProcessRaisedException.__name__
    assert "a process that torch_xla has started was killed" in killed["message"]
    assert "rank 1 ended with exit code 3" in left["message"]
    for each in (raised, killed, left):
        assert each["left"] == []
        assert each["seconds"] < 60


def refusals() -> list[str]:
    import torch_xla

    found = []
    for devices, use in ((3, False), (2, True)):
        if use:
            torch.ones(1, device=torch_xla.device())
        try:
            XLALauncher(XLAEnvironment(), devices).launch(print)
        except (ValueError, RuntimeError) as error:
            found.append(str(error))
    try:
        os.environ["TORCHELASTIC_RUN_ID"] = "1"  # as torchrun does
        launcher().launch(print)
    except MisconfigurationException as error:
        found.append(str(error))
    return found


@needs_xla
def test_what_cannot_work_is_refused_before_any_process_starts() -> None:
    too_many, in_use, torchrun = run(refusals, devices=2)
    assert "devices=3 was given, and torch_xla uses one device of a machine, or all, of which this one has 2" in too_many
    assert "CPU_NUM_DEVICES" in too_many
    assert "has already used an XLA device" in in_use
    assert "Run the script without torchrun" in torchrun


# ---- without torch_xla --------------------------------------------------------------------------------------------------


def test_rank_of_a_thread_is_its_own_and_that_of_the_threads_in_its_context() -> None:
    rank = ThreadRank()
    rank.value.set(2)
    seen: list[Any] = []

    def look() -> None:
        seen.extend([int(rank), bool(rank), rank == 0])

    for target, arguments in ((look, ()), (copy_context().run, (look,))):
        thread = threading.Thread(target=target, args=arguments)
        thread.start()
        thread.join()
    assert seen == [0, False, True, 2, True, False]
    assert rank == 2
    assert bool(rank)
    assert [10, 11, 12][rank] == 12
    assert f"{rank!r} {hash(rank) == hash(2)}" == "2 True"
