"""Ctrl-C heard twice: the first asks for a stop, the second is obeyed at once, even where the main thread runs no Python.

Python calls handlers of signals in the main thread, between two of its instructions. In a step that hangs inside of a library that never
comes; so a thread reads the numbers of signals that the interpreter writes down as they arrive.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from lightning.fabric.launchers.crew import say, show_stack
from lightning.fabric.side_channel import leave

FIRST = "Ctrl-C: the run stops after this batch, and is saved if it saves checkpoints. Press Ctrl-C again to end it at once."
ANSWER = 3.0  # seconds in which the main thread may react to the second Ctrl-C
TICK = 0.05
EXIT_CODE = 128 + signal.SIGINT
STOP = b"\0"  # no signal has this number


class Interrupts:
    """Counts how often the user has pressed Ctrl-C, and ends the process if its main thread does not react to the second time.

    Args:
        speaks: whether to tell what the first one does.

    Attributes:
        heard: how often the main thread has; set by the handler.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self.heard = 0
        self._heard_at = 0.0
        self._reader = self._writer = self._former = -1
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to listen; only the main thread can."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _writers.add(self._writer)
        self._thread = threading.Thread(target=self._listen, name="ctrl-c", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        if self._thread is None:
            return
        try:
            current = signal.set_wakeup_fd(self._former)
        except (OSError, ValueError):  # whoever listened before has closed it meanwhile
            current = signal.set_wakeup_fd(-1)
        if current != self._writer:  # somebody came later, and stays
            signal.set_wakeup_fd(current)
        with suppress(OSError):
            os.write(self._writer, STOP)
        thread, self._thread = self._thread, None
        thread.join(1.0)
        _writers.discard(self._writer)
        for end in (self._writer, self._reader):
            os.close(end)

    def note(self) -> int:
        """The main thread has heard of a Ctrl-C; returns how many times by now."""
        self.heard, self._heard_at = self.heard + 1, time.monotonic()
        return self.heard

    def _listen(self) -> None:
        pressed = 0
        while True:
            arrived = os.read(self._reader, 512)
            if self._former >= 0:  # whoever listened before still wants to know
                with suppress(OSError):
                    os.write(self._former, arrived.replace(STOP, b""))
            ends = STOP in arrived or not arrived
            for _ in range(arrived.count(signal.SIGINT)):
                pressed += 1
                if pressed == 1 and self.speaks:
                    say(FIRST)
                elif pressed == 2 and not ends and not self._is_answered():
                    say(f"The main thread has not reacted to Ctrl-C for {ANSWER:g} s, so this process is ended here:")
                    show_stack()
                    leave(EXIT_CODE)
            if ends:
                return

    def _is_answered(self) -> bool:
        began = time.monotonic()
        while time.monotonic() - began < ANSWER:
            if self.heard >= 2 or self._thread is None:
                return True
            if self.heard == 1 and self._heard_at > began:  # of both at once, as one signal
                os.kill(os.getpid(), signal.SIGINT)
                began = time.monotonic()
                while self.heard < 2 and self._thread is not None and time.monotonic() - began < ANSWER:
                    time.sleep(TICK)
                return self.heard >= 2 or self._thread is None
            time.sleep(TICK)
        return False


_writers: set[int] = set()


def _leave_to_parent() -> None:
    """A fork must not write into the pipe of its parent."""
    if _writers:
        with suppress(ValueError):  # of a thread's fork
            current = signal.set_wakeup_fd(-1)
            if current not in _writers:
                signal.set_wakeup_fd(current)
        _writers.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_leave_to_parent)
