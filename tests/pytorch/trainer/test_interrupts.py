"""Listening for Ctrl-C beside the main thread: nobody else loses anything by it."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from lightning.pytorch.trainer.interrupts import FIRST, Interrupts


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    """Started, with a handler that lets them know."""
    made = Interrupts()
    before = signal.signal(signal.SIGINT, lambda number, frame: made.note())
    made.start()
    yield made
    made.stop()
    signal.signal(signal.SIGINT, before)


def wait_for(reader: int) -> bytes:
    assert select.select([reader], [], [], 10)[0]
    return os.read(reader, 64)


def test_first_interrupt_is_told_and_heard(interrupts: Interrupts, capfd: pytest.CaptureFixture[str]) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.heard == 1
    interrupts.stop()
    assert FIRST in capfd.readouterr().err


def test_whoever_listened_before_still_hears_of_signals_and_listens_afterwards() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    interrupts = Interrupts()
    try:
        interrupts.start()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wait_for(reader) == bytes([signal.SIGUSR1])
        interrupts.stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wait_for(reader) == bytes([signal.SIGUSR1])
    finally:
        signal.signal(signal.SIGUSR1, before)
        assert signal.set_wakeup_fd(former) == writer


def test_whoever_has_closed_what_it_listened_to_is_left_alone() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    interrupts = Interrupts()
    interrupts.start()
    os.close(writer)
    os.close(reader)
    interrupts.stop()
    assert signal.set_wakeup_fd(-1) == -1


def test_interrupts_of_a_fork_are_not_those_of_its_parent(interrupts: Interrupts) -> None:
    child = os.fork()
    if child == 0:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0 if signal.set_wakeup_fd(-1) == -1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert interrupts.heard == 0
