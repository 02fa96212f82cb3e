"""Signals that ask a run to stop: noted where they arrive, agreed on by all processes, acted upon between two batches.

A handler only sets an attribute. The loops look at one attribute of their process, :attr:`Signals.pending`, after each batch,
which takes neither a call nor a collective. The processes agree through their side channel, and only once a signal
has come to one of them:

1. Whoever got a signal says so; all threads see it within a second, set ``pending``, and then read how far their process is.
   From here on its main thread stops at its next boundary between two batches, in :meth:`Signals.settle`.
2. If all main threads have come to a stop after the same training batch, the run stops right here: perhaps inside of a validation.
   Else a process waits in a collective for one that was stopped, and they all go on to the first boundary that nobody can have
   passed: one more than the farthest has counted after ``pending`` was set.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.fabric.launchers.failures import first_failure
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.side_channel import SideChannel, leave
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

LISTEN = 0.5  # seconds between two looks whether a signal has come to any process
AGREE = 0.1  # the same, once one has
HOLD = 1.0  # seconds in which all main threads may come to a stop before they are let go on to a common boundary
TAKE_OVER = 5.0  # seconds after which another process decides in place of rank 0
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
        position: the number of training batches, and of batches of any kind, that this process has taken. Called from another thread.
        channel: to the other processes; None if there is one process only.
        act: called with the number of a signal where the run stops.
        lockstep: whether all processes take the same number of batches in evaluation too, since a forward pass needs all of them.

    Attributes:
        pending: True if :meth:`settle` is to be called at the next boundary between two batches.
        received: the signals that were acted upon, or are to be: those that have come to this process, and to others.
    """

    def __init__(
        self,
        numbers: Iterable[int],
        position: Callable[[], tuple[int, int]],
        channel: SideChannel | None = None,
        lockstep: bool = False,
        act: Callable[[int], None] | None = None,
    ) -> None:
        self.act = act
        self.numbers = list(dict.fromkeys(numbers))
        self.position = position
        self.channel = channel
        self.lockstep = lockstep
        self.pending = False
        self.received: list[int] = []
        self._open: list[int] = []  # those that have come to this process and were not acted upon
        self._originals: dict[int, Any] = {}
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
            self._originals[number] = signal.getsignal(number)
            signal.signal(number, self._note)
        if self.channel is not None:
            self.channel.every(self._listen, LISTEN)

    def restore(self) -> None:
        """Give the signals back to those that had them before, and expect no boundary any more.

        A SIGTERM that has come too late for a boundary then does what it would have done without this class.
        """
        if not self._over:
            self.finish()
        for number, original in self._originals.items():
            if signal.getsignal(number) == self._note and original is not None:
                signal.signal(number, original)
        late = signal.SIGTERM in self._open and self._originals.get(signal.SIGTERM) is signal.SIG_DFL
        self._originals.clear()
        if late:
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker of a loader, which has inherited this handler, and is to be ended
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for numbers in (self.received, self._open):
            if number not in numbers:
                numbers.append(number)
        if self.channel is None:
            self.pending = True
        original = self._originals.get(number)
        if callable(original):
            original(number, frame)

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
        self._over, self.pending = True, False
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
            return LISTEN
        round_ = self._round
        name = f"stop/{round_}"
        if self._open:
            number = self._open[0]
            if number == signal.SIGTERM and first_failure() is not None:
                leave(128 + number)  # the launcher ends what is left of a run that has failed
            number = channel.put_first(f"{name}/number", number)
        number = number or channel.get(f"{name}/number")
        if number is None:
            return LISTEN
        self._asked = self._asked or time.monotonic()
        self.pending = True
        step, serial = self.position()  # after `pending` was set: the next boundary is one more at most
        channel.put(self._key(channel.rank), {"round": round_, "step": step, "serial": serial, "held": self._held})
        decision = channel.get(f"{name}/decision") or self._decide(name, round_, number)
        if decision is not None and round_ == self._round:
            self._decision = Decision(**decision) if decision["number"] else None
            self._decided.set()
        return AGREE

    def _decide(self, name: str, round_: int, number: int) -> Any:
        """Decide for all, once all have said where they are."""
        channel = self.channel
        assert channel is not None
        waited = time.monotonic() - self._asked
        if channel.rank > 0 and waited < TAKE_OVER:
            return None
        found = [channel.get(self._key(rank)) for rank in range(channel.world_size)]
        if any(each is not None and each.get("done") for each in found):
            return channel.put_first(f"{name}/decision", {"number": 0})
        if any(each is None or each["round"] != round_ for each in found):
            return None
        if all(each["held"] for each in found) and len({each["step"] for each in found}) == 1:
            decision: dict[str, Any] = {"here": True}
        elif waited < HOLD:
            return None
        elif self.lockstep:
            decision = {"serial": max(each["serial"] for each in found) + 1}
        else:
            decision = {"step": max(each["step"] for each in found) + 1}
        return channel.put_first(f"{name}/decision", {"number": number, **decision})


# ---- what a signal means ------------------------------------------------------------------------------------------------


def signals_of(trainer: Trainer) -> Signals:
    """The signals that a run of the trainer listens to: SIGTERM, and the one on which SLURM's job is to be requeued."""
    strategy, progress, metrics = trainer.strategy, trainer.fit_loop.progress, trainer._metrics
    numbers: list[int] = [signal.SIGTERM]
    environment = slurm_of(trainer)
    if environment is not None and environment.requeue_signal is not None:
        numbers.append(environment.requeue_signal)
    channel = getattr(strategy, "side_channel", None)
    return Signals(
        numbers, lambda: (progress.total_batches, metrics.serial), channel, strategy.forward_is_collective, partial(act, trainer)
    )


def slurm_of(trainer: Trainer) -> SLURMEnvironment | None:
    """The SLURM job that is put back into the queue before its time is over, if this is one."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None and SLURMEnvironment.job_id() is not None and SLURMEnvironment.detect():
        with suppress(RuntimeError):  # of --ntasks without --ntasks-per-node, which is nothing to a run of one process
            environment = SLURMEnvironment()  # a strategy of one process asks for no environment
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def act(trainer: Trainer, number: int) -> None:
    """Do what the signal asks for, in all processes, between two batches.

    Raises:
        SIGTERMException: on SIGTERM.
    """
    environment = slurm_of(trainer)
    if environment is not None and number == environment.requeue_signal:
        requeue(trainer)
    elif number == signal.SIGTERM:
        if trainer._signals is not None and trainer._signals.channel is not None:
            trainer._signals.channel.ends_together = True
        raise SIGTERMException(128 + number)


def requeue(trainer: Trainer) -> None:
    """Save a checkpoint of a fit, from which the same command goes on, and put the SLURM job back into the queue.

    SLURM then ends the job, with SIGTERM at first, and starts it again when there is room. Until then the run goes on.
    """
    if trainer.state.fn == "fit":
        path = trainer.strategy.broadcast(next_path(trainer) if trainer.is_global_zero else "")
        rank_zero_info(f"The job's time is nearly over: saving {path}, to go on from there in the next job.")
        trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        call_scontrol()


def next_path(trainer: Trainer) -> str:
    """``hpc_ckpt_N.ckpt`` in the trainer's folder, with the next number."""
    folder = str(trainer.default_root_dir)
    filesystem = get_filesystem(folder)
    names = filesystem.ls(folder, detail=False) if filesystem.isdir(folder) else []
    numbers = [int(match.group(1)) for name in names if (match := re.search(r"hpc_ckpt_(\d+)\.ckpt$", str(name)))]
    return os.path.join(folder, f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt")


def call_scontrol() -> bool:
    """Have SLURM requeue the job that this process belongs to; returns whether it will. A failure is a warning."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_JOB_ID", "") if task is None else f"{os.environ.get('SLURM_ARRAY_JOB_ID', '')}_{task}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    else:
        problem = "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
    if problem:
        rank_zero_warn(f"The SLURM job {job} could not be requeued: `scontrol requeue {job}` failed ({problem}). Submit it again by hand.")
        return False
    rank_zero_info(f"SLURM job {job} was put back into the queue.")
    return True
