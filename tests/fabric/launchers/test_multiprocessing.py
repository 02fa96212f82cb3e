"""Ranks in new processes: what comes back, and how failures are told."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lightning.fabric.launchers import MultiprocessingLauncher
from lightning.fabric.launchers.multiprocessing import save_call
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_child_is_left(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "MASTER_ADDR", "KERAUNOS_RUN_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    before = children()
    yield
    assert children() <= before


def children() -> set[int]:
    """The processes that this one has started and that still run, but for multiprocessing's own."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"resource_tracker" not in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def launcher(ranks: int = 2, **options: Any) -> MultiprocessingLauncher:
    return MultiprocessingLauncher(LightningEnvironment(), ranks, "fork", **options)


def in_group(deed: Callable[[int], Any]) -> Callable[[], Any]:
    """All ranks meet, each does the deed, and they meet again."""

    def run() -> Any:
        rank = int(os.environ["LOCAL_RANK"])
        dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
        dist.barrier()
        result = deed(rank)
        dist.barrier()
        dist.destroy_process_group()
        return result

    return run


def on_last(deed: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda rank: deed() if rank == dist.get_world_size() - 1 else None


def test_rank_zero_returns_and_arguments_arrive() -> None:
    def add(rank: int, more: float, scale: float) -> tuple[float, int, int]:
        value = torch.tensor([rank + more])
        dist.all_reduce(value)
        return float(value) * scale, rank_zero_only.rank, torch.get_num_threads()  # type: ignore[attr-defined]

    def work(more: float, *, scale: float) -> Any:
        return in_group(lambda rank: add(rank, more, scale))()

    environment = dict(os.environ)
    assert launcher(3).launch(work, 1.0, scale=10.0) == (60.0, 0, 1)
    assert dict(os.environ) == environment


def test_spawned_ranks_meet_and_get_arguments(run: Start) -> None:
    done = run("--launcher", "spawn", "add")
    assert (done.code, done.error) == (0, "")
    assert (done.results[0]["rank"], done.results[0]["sum"]) == (0, 3.0)
    assert done.results[0]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_rank_of_a_fork_server_returns_tensors(run: Start) -> None:
    done = run("--launcher", "forkserver", "--ranks", "1", "return_tensors")
    assert (done.code, done.error) == (0, "")
    assert done.results == ["[True, True, True, True]"]


def test_fork_works_after_the_parent_has_computed_with_threads(run: Start, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from lightning.fabric.launchers import MultiprocessingLauncher\n"
        "from lightning.fabric.plugins.environments import LightningEnvironment\n"
        "torch.set_num_threads(2)\n"
        "a = torch.ones(700, 700)\n"
        "compute = lambda: float(torch.exp(a @ a).clamp(max=1).sum())\n"
        "assert compute() == MultiprocessingLauncher(LightningEnvironment(), 1, 'fork').launch(compute)\n"
    )
    assert run(command=[sys.executable, str(script)]).error == ""


def test_many_tensors_come_back_without_as_many_files() -> None:
    def make() -> Any:
        shared = torch.arange(3.0)
        return [torch.full((2,), float(index)) for index in range(3000)], shared, shared[1:]

    many, shared, view = launcher(1).launch(make)
    assert torch.stack(many)[:, 1].tolist() == list(range(3000))
    shared += 1
    assert view.tolist() == [2.0, 3.0]


def test_error_of_the_first_failing_rank_is_raised_with_its_traceback() -> None:
    def fail() -> None:
        raise ValueError("bad batch")

    with pytest.raises(ProcessRaisedException, match="The run failed: rank 2 raised ValueError: bad batch") as caught:
        launcher(3).launch(in_group(on_last(fail)))
    assert "in fail" in str(caught.value)
    assert caught.value.error_index == 2


@pytest.mark.parametrize(
    ("deed", "message", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 was killed by SIGKILL", -9),
        (lambda: sys.exit(3), "rank 1 ended with exit code 3", 3),
        (lambda: os._exit(4), "rank 1 ended with exit code 4", 4),
        (lambda: sys.exit(0), "rank 1 left with exit code 0 before the run was over", 0),
        (lambda: os._exit(0), "rank 1 left with exit code 0 before the run was over", 0),
    ],
    ids=["killed", "exit", "_exit", "exit 0", "_exit 0"],
)
def test_rank_that_is_gone_is_named(deed: Callable[[], Any], message: str, code: int) -> None:
    with pytest.raises(ProcessExitedException, match=message) as caught:
        launcher().launch(in_group(on_last(deed)))
    assert caught.value.exit_code == code
    assert caught.value.signal_name == ("SIGKILL" if code == -9 else None)


def test_rank_that_hangs_after_another_has_failed_is_stopped() -> None:
    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ["LOCAL_RANK"] == "0":
            time.sleep(1)
            raise ValueError("bad batch")
        time.sleep(300)

    begin = time.monotonic()
    with pytest.raises(ProcessRaisedException, match=r"rank 0 raised ValueError[^$]*Stopped while still running: ranks 1, 2\."):
        launcher(3, shutdown_timeout=2).launch(work)
    assert time.monotonic() - begin < 6


def test_straggler_is_stopped_after_its_time() -> None:
    def work() -> None:
        if os.environ["LOCAL_RANK"] == "1":
            time.sleep(300)

    with pytest.raises(TimeoutError, match=r"Ranks \[1\] were still running 0.5 s after rank 0 had finished"):
        launcher(straggler_timeout=0.5).launch(work)


def test_interpreter_that_does_not_end_is_stopped_and_the_result_kept() -> None:
    def work() -> str:
        threading.Thread(target=time.sleep, args=(300,)).start()
        return "result"

    with pytest.warns(UserWarning, match=r"Ranks \[0\] did not end within 0.5 s after their work was done"):
        assert launcher(1, shutdown_timeout=0.5).launch(work) == "result"


def test_killed_parent_takes_the_ranks_along(start: Start) -> None:
    running = start("--launcher", "fork", "wait_for_the_end")
    deadline = time.monotonic() + 60
    while not (Path("pid-0").exists() and Path("pid-1").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(running.process.pid, signal.SIGKILL)
    assert running.left() == []


def test_interrupt_ends_the_ranks(start: Start) -> None:
    running = start("--launcher", "fork", "wait_for_the_end")
    deadline = time.monotonic() + 60
    while not (Path("pid-0").exists() and Path("pid-1").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(running.process.pid, signal.SIGINT)
    done = running.finish()
    assert done.code != 0
    assert "KeyboardInterrupt" in done.error
    assert done.left() == []


def test_signal_reaches_the_ranks() -> None:
    def work() -> None:
        Path("ready").touch()
        time.sleep(300)

    starter = launcher(1)

    def send() -> None:
        while not Path("ready").exists():
            time.sleep(0.05)
        starter.kill(signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(ProcessExitedException, match="rank 0 was killed by SIGTERM"):
        starter.launch(work)


def test_result_that_can_not_be_sent_is_refused() -> None:
    with pytest.raises(ProcessRaisedException, match="Rank 0 has returned a function, which pickle can't send"):
        launcher(1).launch(lambda: lambda: 0)


def test_function_that_can_not_be_sent_is_refused(tmp_path: Path) -> None:
    import pickle

    def local() -> None:
        pass

    with pytest.raises(pickle.PicklingError, match=r"local and its arguments have to be sent.*top level of a module"):
        MultiprocessingLauncher(LightningEnvironment(), 1, "spawn").launch(local)
    with pytest.raises(pickle.PicklingError, match="top level"):
        save_call((print, (lambda: 0,), {}), tmp_path / "call")


def test_script_without_a_main_guard_is_told_so(run: Start, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from lightning.fabric.launchers import MultiprocessingLauncher\n"
        "from lightning.fabric.plugins.environments import LightningEnvironment\n"
        "MultiprocessingLauncher(LightningEnvironment(), 1, 'spawn').launch(print)\n"
    )
    done = run(command=[sys.executable, str(script)])
    assert done.code == 1
    assert "if __name__ == '__main__'" in done.error[done.error.rindex("ProcessExitedException") :]


def test_cuda_in_use_can_not_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # no GPU here
    with pytest.raises(RuntimeError, match="has already used CUDA"):
        launcher().launch(print)


def test_interactive_session_may_only_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    spawning = MultiprocessingLauncher(LightningEnvironment(), 1, "spawn")
    assert not spawning.is_interactive_compatible
    with pytest.raises(MisconfigurationException, match="strategy='ddp_notebook'"):
        spawning.launch(print)
    assert launcher().is_interactive_compatible
    assert launcher(1).launch(lambda: 1) == 1


def test_processes_that_exist_already_are_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="TorchElasticEnvironment says that they have been started already"):
        MultiprocessingLauncher(TorchElasticEnvironment(), 2, "fork").launch(print)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(MisconfigurationException, match="LightningEnvironment says"):
        launcher().launch(print)


def test_port_in_use_is_noticed_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(RuntimeError, match="is used by another process"):
            launcher().launch(lambda: Path("ran").touch())
    assert not Path("ran").exists()


def test_unknown_start_method_is_refused() -> None:
    with pytest.raises(ValueError, match="start_method='thread' is not available on this system, which has 'fork', 'spawn'"):
        MultiprocessingLauncher(LightningEnvironment(), 1, "thread")  # type: ignore[arg-type]
