"""Signals that ask a run to stop: noted where they arrive, agreed on by all processes, acted upon between two batches.

A handler only sets an attribute. The loops look at one attribute of their process, :attr:`Signals.pending`, after each batch,
which takes neither a call nor a collective. The processes agree through their side channel, and only once a signal
has come to one of them, or one has set ``trainer.should_stop``:

1. Whoever got a signal says so; all threads see it within a second, set ``pending``, and then read how far their process is.
   From here on its main thread stops at its next boundary between two batches, in :meth:`Signals.settle`.
2. If all main threads have come to a stop after the same training batch, the run stops right here: perhaps inside of a validation.
   Else a process waits in a collective for one that was stopped, and they all go on to the first boundary that nobody can have
   passed: one more than the farthest has counted after ``pending`` was set.

What is done there is up to ``stopping.py``.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from lightning.fabric.launchers.failures import first_failure
from lightning.fabric.side_channel import SideChannel, leave
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.trainer.interrupts import Interrupts

LISTEN = 0.5  # seconds between two looks whether a signal has come to any process
AGREE = 0.1  # the same, once one has
HOLD = 1.0  # seconds in which all main threads may come to a stop before they are let go on to a common boundary
HOLD_IN_EVALUATION = 10.0  # the same where a batch need not wait for other processes
TAKE_OVER = 5.0  # seconds after which rank 1 decides in place of rank 0, after as many more rank 2, and so on
STOP = 1000  # in the place of a signal's number: a process has set `trainer.should_stop`
GIVE_UP = 60.0  # seconds after which a process goes on that hears nothing from the others


@dataclass(frozen=True)
class Decision:
    """Where all processes stop.

    Args:
        number: of the signal.
        here: where they stand.
        step: after this many training batches; 0 if something else decides.
        serial: after this many batches of any kind; 0 if something else decides.
    """

    number: int
    here: bool = False
    step: int = 0
    serial: int = 0

    def is_due(self, step: int, serial: int) -> bool:
        """Whether a process stops that is so far."""
        return self.here or 0 < self.step <= step or 0 < self.serial <= serial


class Signals:
    """Takes note of signals during a run, and has all processes stop at the same place.

    Args:
        numbers: the signals.
        position: the number of training batches, and of batches of any kind, that this process has taken, and whether it is training.
            Called from another thread.
        channel: to the other processes; None if there is one process only.
        act: called with the number of a signal where the run stops.
        lockstep: whether all processes take the same number of batches in evaluation too, since a forward pass needs all of them.
        trains: whether there are training batches at all.

    Attributes:
        pending: True if :meth:`settle` is to be called at the next boundary between two batches.
        listens: whether the processes hear from each other.
        is_saved: whether the run was saved for the job that goes on with it, so that its end needs no other checkpoint.
        in_loop: whether boundaries between batches come. Where none does, Ctrl-C is an error at once, for it has nothing to save.
        received: the signals that were acted upon, or are to be: those that have come to this process, and to others.
    """

    def __init__(
        self,
        numbers: Iterable[int],
        position: Callable[[], tuple[int, int, bool]],
        channel: SideChannel | None = None,
        lockstep: bool = False,
        act: Callable[[int], None] | None = None,
        trains: bool = True,
    ) -> None:
        self.act = act
        self.numbers = list(dict.fromkeys(numbers))
        self.position = position
        self.channel = channel
        self.lockstep = lockstep
        self.trains = trains
        self.pending = self.listens = self.in_loop = self.is_saved = False
        self.received: list[int] = []
        self._open: list[int] = []  # those that have come to this process and were not acted upon
        self._originals: dict[int, Any] = {}
        self._of_children: Any = None  # the handler that is told when a worker of a loader has ended
        self._interrupts = Interrupts(speaks=channel is None or channel.rank == 0)
        self._owner = os.getpid()
        self._round = 0  # of agreeing
        self._asked = 0.0  # when this process has heard of the round's signal
        self._held = False  # the main thread has come to a stop
        self._over = False  # no more boundary comes
        self._decision: Decision | None = None
        self._decided = threading.Event()

    # ---- handlers -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Take over the signals; only the main thread may do so, and elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.numbers:
            original = signal.getsignal(number)
            if number == signal.SIGINT and original is not signal.default_int_handler:
                continue  # somebody else has plans for it, or it is to be ignored, as in the background of a shell
            self._originals[number] = original
            signal.signal(number, self._note)
        if signal.SIGINT in self._originals:
            self._interrupts.start()
        if self.channel is not None:
            self.listens = True
            self.channel.every(self._listen, LISTEN)

    def restore(self) -> int | None:
        """Give the signals back to those that had them before, and expect no boundary any more.

        Returns:
            the number of a signal that has come too late for a boundary, and would have ended the process without this class.
        """
        if not self._over:
            self.finish()
        ends: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        late = next((number for number in self._open if number in ends and self._originals.get(number) is ends[number]), None)
        self._interrupts.stop()
        for number, original in self._originals.items():
            if signal.getsignal(number) == self._note and original is not None:
                signal.signal(number, original)
        self._originals.clear()
        if self._of_children is not None:
            signal.signal(signal.SIGCHLD, self._of_children)
            self._of_children = None
        return late

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A worker of a loader has inherited this handler. What is sent to a whole group of processes, as by a terminal, must
            # not end it, for the run needs it up to its stop; its parent ends it with SIGTERM.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        original = self._originals.get(number)
        if number == signal.SIGINT:
            if self._interrupts.note() > 1 or not self.in_loop:
                signal.default_int_handler(number, frame)
        elif callable(original):
            original(number, frame)
        self._bear_with_workers()
        for numbers in (self.received, self._open):
            if number not in numbers:
                numbers.append(number)
        if self.channel is None:
            self.pending = True

    def _bear_with_workers(self) -> None:
        """Workers may have got the signal too, and end: that is no error as long as no batch is asked of them."""
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if self._of_children is None and callable(handler):
            self._of_children = handler

            def hear(number: int, frame: FrameType | None) -> None:
                with suppress(RuntimeError):
                    handler(number, frame)

            signal.signal(signal.SIGCHLD, hear)

    def ask_for_stop(self) -> None:
        """Treat ``trainer.should_stop``, set in this process, like a signal that has come to it; the next boundary is right here."""
        if STOP not in self._open:
            self._open.append(STOP)
        self.pending = True

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for, as far as this process knows by now."""
        return self.pending or bool(self._open)

    # ---- for the loops --------------------------------------------------------------------------------------------------

    def settle(self, step: int, serial: int) -> int | None:
        """To be called between two batches while :attr:`pending`: wait until it is known where the run stops.

        Args:
            step: training batches that this process has taken.
            serial: batches of any kind.

        Returns:
            the number of the signal if the run stops here, in all processes; None if it goes on.
        """
        if self.channel is None:
            number = self._open.pop(0)
            self.pending = bool(self._open)
            return number
        self._held = True
        deadline = time.monotonic() + GIVE_UP
        while not self._decided.wait(AGREE):
            if time.monotonic() > deadline or not self.channel.is_open:
                rank_zero_warn(f"A signal asked for a stop, and the processes could not agree where within {GIVE_UP:g} s: the run goes on.")
                self._end_round()
                return None
        self._held = False
        decision = self._decision
        if decision is None:  # some processes have come to the end already, so that all will
            self.pending = False
            return None
        if not decision.is_due(step, serial):
            return None
        self._end_round()
        if decision.number in self._open:
            self._open.remove(decision.number)
        if decision.number not in self.received:
            self.received.append(decision.number)
        return decision.number

    def heed(self, step: int, serial: int) -> None:
        """Settle, and do what the signal asks for if that is here."""
        number = self.settle(step, serial)
        if number is not None and self.act is not None:
            self.act(number)

    def finish(self) -> None:
        """The loop is over: this process comes to no boundary any more."""
        self._over, self.pending, self.in_loop = True, False, False
        if self.channel is not None:
            self.channel.send(self._key(self.channel.rank), {"done": True})

    def _end_round(self) -> None:
        self.pending = self._held = False
        self._decision = None
        self._decided.clear()
        self._asked = 0.0
        self._round += 1

    # ---- the thread -----------------------------------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"stop/at/{rank}"

    def _listen(self) -> float | None:
        channel, number = self.channel, None
        assert channel is not None
        if self._over:
            return None
        if self._decided.is_set():  # the main thread is on its way to where the run stops
            return channel.paced(LISTEN)
        round_ = self._round
        name = f"stop/{round_}"
        if self._open:
            number = self._open[0]
            if number == signal.SIGTERM and first_failure() is not None:
                leave(128 + number)  # the launcher ends what is left of a run that has failed
            number = channel.put_first(f"{name}/number", number)
        number = number or channel.get(f"{name}/number")
        if number is None:
            return channel.paced(LISTEN)
        self._asked = self._asked or time.monotonic()
        self.pending = True
        step, serial, training = self.position()  # after `pending` was set: the next boundary is one more at most
        here = {"round": round_, "step": step, "serial": serial, "training": training, "held": self._held}
        channel.put(self._key(channel.rank), here)
        decision = channel.get(f"{name}/decision") or self._decide(name, round_, number)
        if decision is not None and round_ == self._round:
            self._decision = Decision(**decision) if decision["number"] else None
            self._decided.set()
        return channel.paced(AGREE)

    def _decide(self, name: str, round_: int, number: int) -> Any:
        """Decide for all, once all have said where they are."""
        channel = self.channel
        assert channel is not None
        waited = time.monotonic() - self._asked
        if waited < TAKE_OVER * channel.rank:
            return None
        found = channel.get_all([self._key(rank) for rank in range(channel.world_size)])
        if any(each is not None and each.get("done") for each in found):
            return channel.put_first(f"{name}/decision", {"number": 0})
        if any(each is None or each["round"] != round_ for each in found):
            return None
        if all(each["held"] for each in found) and len({each["step"] for each in found}) == 1:
            decision: dict[str, Any] = {"here": True}
        elif waited < (HOLD if any(each["training"] for each in found) else HOLD_IN_EVALUATION):
            return None
        elif self.lockstep or not self.trains:
            decision = {"serial": max(each["serial"] for each in found) + 1}
        else:
            decision = {"step": max(each["step"] for each in found) + 1}
        return channel.put_first(f"{name}/decision", {"number": number, **decision})
