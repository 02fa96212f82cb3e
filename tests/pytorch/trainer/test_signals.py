"""Signals: noted by a handler, agreed on by all processes, and given back to those that had them before."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run

from lightning.fabric.launchers import failures
from lightning.fabric.side_channel import SideChannel
from lightning.pytorch.trainer.signals import Decision, Signals
from lightning.pytorch.trainer.stopping import call_scontrol, next_path


def alone() -> Signals:
    return Signals([signal.SIGUSR1, signal.SIGTERM], lambda: (0, 0, True))


def test_handler_notes_the_signal_and_calls_the_original_one() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    original = signal.getsignal(signal.SIGUSR1)
    try:
        signals = alone()
        signals.install()
        assert not signals.pending
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (signals.pending, signals.requested, heard) == (True, True, [signal.SIGUSR1])
        assert signals.settle(3, 3) == signal.SIGUSR1
        assert not signals.pending
        assert not signals.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.settle(4, 4) == signal.SIGTERM
        signals.restore()
        assert signal.getsignal(signal.SIGUSR1) is original
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_are_acted_upon_one_after_the_other() -> None:
    signals = alone()
    signals.install()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert [signals.settle(1, 1), signals.pending, signals.settle(1, 1), signals.pending] == [signal.SIGUSR1, True, signal.SIGTERM, False]
    signals.restore()
    assert signals.received == [signal.SIGUSR1, signal.SIGTERM]


def test_term_that_comes_too_late_is_told_when_the_handlers_are_restored() -> None:
    signals = alone()
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    signals.finish()
    assert not signals.pending
    assert signals.restore() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signal_whose_own_handler_was_called_is_not_told_again() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        signals = alone()
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.finish()
        assert signals.restore() is None
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handler_that_came_later_stays() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    later = lambda number, frame: None  # noqa: E731
    try:
        signals = alone()
        signals.install()
        signal.signal(signal.SIGUSR1, later)
        signals.restore()
        assert signal.getsignal(signal.SIGUSR1) is later
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_than_the_main_one_install_nothing() -> None:
    signals = alone()
    thread = threading.Thread(target=signals.install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_fork_that_inherits_the_handler_is_ended_by_the_signal() -> None:
    signals = alone()
    signals.install()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not signals.requested
    finally:
        signals.restore()


@pytest.mark.parametrize(
    ("decision", "due"),
    [
        (Decision(10, here=True), [True, True, True]),
        (Decision(10, step=5), [False, True, True]),
        (Decision(10, serial=8), [False, False, True]),
    ],
)
def test_place_to_stop_is_the_first_that_is_far_enough(decision: Decision, due: list[bool]) -> None:
    assert [decision.is_due(4, 6), decision.is_due(5, 7), decision.is_due(6, 8)] == due


# ---- several processes --------------------------------------------------------------------------------------------------


class Loop:
    """Trains and evaluates as the trainer does, with a collective in each step, and asks for signals at each boundary."""

    def __init__(self, rank: int, steps: int, evaluations: list[int], lockstep: bool) -> None:
        self.rank, self.steps, self.evaluations, self.lockstep = rank, steps, evaluations, lockstep
        self.step = self.serial = 0
        self.training = True
        self.channel = SideChannel.to_all()
        self.signals = Signals([signal.SIGUSR1], lambda: (self.step, self.serial, self.training), self.channel, lockstep)

    def run(self, signalled_after: float | None = None) -> tuple[int | None, int, int]:
        """Returns the signal and where it stopped: training step, and batches in all; (None, ...) at the end."""
        self.signals.install()
        if signalled_after is not None:
            threading.Timer(signalled_after, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        try:
            while self.step < self.steps:
                self.serial += 1
                self.training = True
                time.sleep(random.random() * 0.01)
                torch.distributed.all_reduce(torch.ones(1))
                self.step += 1
                if number := self.ask():
                    return number, self.step, self.serial
                for _ in range(self.evaluations[self.rank] if self.step % 10 == 0 else 0):
                    self.training = False
                    self.serial += 1
                    time.sleep(random.random() * 0.02)
                    if self.lockstep:
                        torch.distributed.all_reduce(torch.ones(1))
                    if number := self.ask():
                        return number, self.step, self.serial
            return None, self.step, self.serial
        finally:
            self.signals.restore()

    def ask(self) -> int | None:
        return self.signals.settle(self.step, self.serial) if self.signals.pending else None


def stop(rank: int, size: int, seed: int, lockstep: bool, evaluations: list[int], steps: int) -> Any:
    random.seed(seed)
    signalled = random.sample(range(size), random.randint(1, size))
    moments = [random.random() * 1.5 for _ in range(size)]
    random.seed(rank)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one that comes after the end
    loop = Loop(rank, steps, evaluations, lockstep)
    outcome = loop.run(moments[rank] if rank in signalled else None)
    torch.distributed.all_reduce(torch.ones(1))  # as saving a checkpoint would
    loop.channel.close()
    return outcome


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("lockstep", "evaluations"), [(True, [30, 30, 30]), (False, [5, 40, 1]), (False, [0, 0, 0])])
def test_any_subset_of_processes_is_signalled_and_all_stop_at_the_same_place(seed: int, lockstep: bool, evaluations: list[int]) -> None:
    outcomes = run(stop, 2 + seed % 2, seed, lockstep, evaluations, 10_000)
    assert {number for number, _, _ in outcomes} == {signal.SIGUSR1}
    assert len({step for _, step, _ in outcomes}) == 1
    if lockstep:
        assert len({serial for _, _, serial in outcomes}) == 1


def test_signal_at_the_end_lets_all_come_to_it() -> None:
    assert {number for number, *_ in run(stop, 2, 4, False, [0, 0], 60)} <= {None, signal.SIGUSR1}


def stop_while_evaluating(rank: int, size: int) -> Any:
    loop = Loop(rank, 10_000, [10_000, 10_000], lockstep=False)
    outcome = loop.run(1.0 if rank == 1 else None)
    loop.channel.close()
    return outcome


def test_long_evaluation_is_stopped_in_its_middle() -> None:
    outcomes = run(stop_while_evaluating, 2)
    assert [(number, step) for number, step, _ in outcomes] == [(signal.SIGUSR1, 10)] * 2
    assert all(10 < serial < 1000 for _, _, serial in outcomes)


def stop_twice(rank: int, size: int) -> list[Any]:
    loop = Loop(rank, 10_000, [0, 0], lockstep=False)
    loop.signals.install()
    places: list[Any] = []
    for sender in (0, 1):
        if rank == sender:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        while len(places) == sender:
            torch.distributed.all_reduce(torch.ones(1))
            loop.step += 1
            if loop.ask():
                places.append((sender + 1, loop.step))
    loop.signals.restore()
    loop.channel.close()
    return places


def test_second_signal_stops_the_run_that_went_on() -> None:
    first, second = run(stop_twice, 2)
    assert first == second
    assert [place for place, _ in first] == [1, 2]


def ignored_by_a_failed_run(rank: int, size: int, folder: str) -> None:
    os.environ[failures.RUN_DIRECTORY] = folder
    loop = Loop(rank, 10_000, [0, 0], lockstep=False)
    loop.signals.numbers = [signal.SIGTERM]
    loop.signals.install()
    if rank == 1:
        failures.report_exit(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20 if rank == 1 else 3)


def test_term_of_a_launcher_whose_run_has_failed_ends_the_process(tmp_path: Path) -> None:
    from processes import run_to_end

    _, one = run_to_end(ignored_by_a_failed_run, 2, str(tmp_path))
    assert one.trace == "it died with exit code 143"


# ---- SLURM --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name on the PATH, which writes down its arguments; returns the file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\n[ -z "$FAILS" ] || {{ echo down >&2; exit 1; }}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return tmp_path / "arguments"


def test_job_is_requeued_by_its_number(scontrol: Path) -> None:
    assert call_scontrol()
    assert scontrol.read_text() == "requeue 4711\n"


def test_task_of_an_array_is_requeued_by_array_and_task(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "99")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert call_scontrol()
    assert scontrol.read_text() == "requeue 99_7\n"


def test_requeue_that_fails_is_a_warning(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "1")
    with pytest.warns(UserWarning, match=r"SLURM job 4711 could not be requeued: `scontrol requeue 4711` failed \(down\)"):
        assert not call_scontrol()


def test_requeue_without_scontrol_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="Submit it again by hand"):
        assert not call_scontrol()


def test_checkpoints_are_numbered_from_one(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path / "new", logger=False, enable_checkpointing=False)
    assert next_path(trainer) == str(tmp_path / "new" / "hpc_ckpt_1.ckpt")
    (tmp_path / "new").mkdir()
    for name in ("hpc_ckpt_2.ckpt", "hpc_ckpt_10.ckpt", "hpc_ckpt_x.ckpt", "last.ckpt"):
        (tmp_path / "new" / name).touch()
    assert next_path(trainer) == str(tmp_path / "new" / "hpc_ckpt_11.ckpt")
