"""Where the wall time of each training epoch went, in one line."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.profilers.profiler import Profiler

if TYPE_CHECKING:
    import lightning.pytorch as pl

DATA, COPY, COMPUTE, HOOKS, LOGGING = "data_wait", "copy", "compute", "hooks", "logging"
CHECKPOINT, VALIDATION, OTHER = "checkpoint", "validation", "other"
CATEGORIES = (DATA, COPY, COMPUTE, HOOKS, LOGGING, CHECKPOINT, VALIDATION, OTHER)
WATCHED = (DATA, LOGGING, CHECKPOINT, VALIDATION)  # where the host may wait while a device is still busy with steps
ALIGN_EVERY = 1.0  # seconds, between the clocks of host and device

EPOCH, STEP = "run_training_epoch", "run_training_batch"
ACTIONS = {
    EPOCH: OTHER,
    STEP: COMPUTE,
    "[_TrainingEpochLoop].train_dataloader_next": DATA,
    "run_validation": VALIDATION,
    "log_metrics": LOGGING,
    "save_checkpoint": CHECKPOINT,
}
TRANSFERS = ("batch_to_device", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class EpochTimes(Profiler):
    """Say at the end of each training epoch where its wall time went: ``Trainer(profiler="epoch")``.

    ===============  ==============================================================================================================
    ``data_wait``    for the loader
    ``copy``         of batches to the device, with the hooks of the transfer
    ``compute``      the step: forward, backward, optimizer
    ``hooks``        of callbacks and the module, progress bar included
    ``logging``      bringing logged values to the loggers
    ``checkpoint``   saving, wherever it is asked for
    ``validation``   all of it, with its data
    ``other``        the rest
    ===============  ==============================================================================================================

    These are times of the host, each without those within it. A CUDA device works behind the host, which is measured by events that
    nobody waits for; the line comes when they are over. Then there are three more:

    ==================  ===========================================================================================================
    ``device_wait``     for the device to come to the end of its steps, where values are read, checkpoints saved, or validation begins
    ``device_steps``    what the device takes for the steps, from the first kernel of each to its last, beside the times of the host
    ``data_wait_idle``  the part of ``data_wait`` in which the device had nothing to do; in the rest nothing is lost
    ==================  ===========================================================================================================

    Args:
        to_loggers: send ``epoch_time/data_wait``, ..., in seconds, to the trainer's loggers too.
        dirpath: the directory of the report; None is the log directory of the trainer.
        filename: write the lines to ``{stage}-{filename}.txt`` there, when the run ends; None writes no file.

    Attributes:
        times: for each epoch a dict of seconds: those above, and the ``whole``; and the number of the ``epoch``.

    Example::

        trainer = Trainer(profiler=EpochTimes(to_loggers=True))
        trainer.fit(model, loader)
        trainer.profiler.times[-1]["data_wait"]
    """

    def __init__(self, to_loggers: bool = False, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.to_loggers = to_loggers
        self.times: list[dict[str, float]] = []
        self._trainer: pl.Trainer | None = None
        self._categories: dict[str, str | None] = {}
        self._open: list[str] = []  # the categories of the actions that run, within an epoch
        self._watched: list[tuple[int, float, _Step | None]] = []  # of those in which a device may be waited for: depth, begin, last step
        self._seconds: dict[str, float] = {}
        self._began = self._since = 0.0
        self._device: _Device | None = None
        self._unsaid: deque[_Epoch] = deque()

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made during a run is for another one, and events can't be copied.
        return {**vars(self), "_trainer": None, "_device": None, "_open": [], "_watched": [], "_unsaid": deque()}

    def _attach(self, trainer: pl.Trainer) -> None:
        """Get to know the trainer, before its run."""
        self._trainer = trainer
        device = trainer.strategy.root_device
        self._device = _Device(torch.cuda.current_stream(device)) if device.type == "cuda" else None

    def start(self, action_name: str) -> None:
        """Begin to count time for the category of an action."""
        now = time.perf_counter()
        if action_name == EPOCH:
            self._open, self._watched, self._seconds, self._began = [], [], dict.fromkeys(CATEGORIES, 0.0), now
        elif not self._open:
            return  # before or after the epochs
        else:
            self._seconds[self._open[-1]] += now - self._since
        category = self._category(action_name)
        self._open.append(category)
        self._since = now
        if self._device is None:
            return
        if action_name == STEP:
            self._device.begin(now)
            if self._unsaid:
                self._say(wait=False)
        elif category in WATCHED and not self._watched:
            self._watched.append((len(self._open), now, self._device.behind()))

    def stop(self, action_name: str) -> None:
        """Go on counting for what the action ran within."""
        if self._device is not None and action_name == STEP and self._open:
            self._device.end()
        self._leave()
        if action_name == EPOCH:
            self._end_epoch(self._since - self._began)

    @contextmanager
    def profile(self, action_name: str) -> Generator[str, None, None]:
        """Measure the body of a ``with`` statement; an epoch that fails has no times, and its device is not asked."""
        self.start(action_name)
        try:
            yield action_name
        except BaseException:
            self._leave(failed=True)
            raise
        self.stop(action_name)

    def _leave(self, failed: bool = False) -> None:
        now = time.perf_counter()
        if self._watched and self._watched[-1][0] == len(self._open):
            _, began, step = self._watched.pop()
            if self._device is not None and not failed:
                self._device.waited(self._open[-1], began, now, step)
        if self._open:
            self._seconds[self._open.pop()] += now - self._since
        self._since = now

    def summary(self) -> str:
        """The lines of all epochs, for a file."""
        return "".join(f"{line(times)}\n" for times in self.times) if self.filename else ""

    def describe(self) -> None:
        """Say what has not been said yet."""
        self._say(wait=True)
        super().describe()

    def teardown(self, stage: str | None) -> None:
        """Let go of the trainer and the device."""
        self._open, self._trainer, self._device = [], None, None
        self._unsaid.clear()
        super().teardown(stage)

    # ---- the parts --------------------------------------------------------------------------------------------------

    def _category(self, action: str) -> str:
        """What an action counts for, which may depend on what it runs within."""
        outer = self._open[-1] if self._open else OTHER
        if action not in self._categories:
            self._categories[action] = category_of(action)
        own = self._categories[action]
        if own is None or outer == CHECKPOINT or (outer == VALIDATION and own != CHECKPOINT):
            return outer
        return own

    def _end_epoch(self, whole: float) -> None:
        trainer = self._trainer
        epoch = trainer.current_epoch if trainer is not None else len(self.times)
        done = _Epoch({"epoch": epoch, "whole": whole, **self._seconds}, None if self._device is None else self._device.take())
        self.times.append(done.times)
        self._unsaid.append(done)
        if self.to_loggers and trainer is not None:
            trainer.send_to_loggers(done, trainer.log_step)
        self._say(wait=False)

    def _say(self, wait: bool) -> None:
        while self._unsaid and (wait or self._unsaid[0].ready()):
            epoch = self._unsaid.popleft()
            epoch.read()
            rank_zero_info(line(epoch.times))


@dataclass
class _Step:
    """Where a step begins and ends in the device's queue, and the waits of the host in which the device may have been busy with it."""

    begin: Any
    end: Any
    waits: list[tuple[_Steps, str, float, float, Any]] = field(default_factory=list)  # whose, for what, begin, end, a moment on both clocks


class _Device:
    """What a CUDA device does during an epoch.

    Args:
        stream: the queue of the steps.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._free: list[Any] = []
        self._steps = _Steps()
        self._last: _Step | None = None
        self._aligned: tuple[Any, float] | None = None  # an event, and when it was, on the host's clock

    def _mark(self) -> Any:
        event = self._free.pop() if self._free else self._event()
        event.record(self._stream)
        return event

    def _event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def begin(self, now: float) -> None:
        is_idle, self._last = self.behind() is None, None
        self._free += self._steps.collect()
        if is_idle and (self._aligned is None or now - self._aligned[1] > ALIGN_EVERY):
            self._aligned = self._mark(), time.perf_counter()  # to which an idle device comes at once
        self._began = self._mark()

    def end(self) -> None:
        self._last = _Step(self._began, self._mark())
        self._steps.queue.append(self._last)

    def behind(self) -> _Step | None:
        """The last step, if the device is still busy with it, or has not begun it."""
        return None if self._last is None or self._last.end.query() else self._last

    def waited(self, category: str, began: float, ended: float, step: _Step | None) -> None:
        """The host was in a category for some time, at whose beginning the device was busy with a step."""
        if step is None and category == DATA:
            self._steps.idle += ended - began
        elif step is not None and step.end.query():
            step.waits.append((self._steps, category, began, ended, self._aligned))

    def take(self) -> _Steps:
        """The steps of the epoch that ends."""
        steps, self._steps = self._steps, _Steps()
        return steps


class _Steps:
    """The steps of an epoch on a device."""

    def __init__(self) -> None:
        self.queue: deque[_Step] = deque()  # those that are not over, as far as is known
        self.seconds = 0.0
        self.idle = 0.0  # seconds without work while the host waited for data
        self.waits = dict.fromkeys(WATCHED, 0.0)  # seconds for which the host waited for the device

    def collect(self) -> list[Any]:
        """Add up the steps that are over; returns their events, for others."""
        free = []
        while self.queue and self.queue[0].end.query():
            step = self.queue.popleft()
            self.seconds += step.begin.elapsed_time(step.end) / 1000
            for steps, category, began, ended, aligned in step.waits:
                over = began if aligned is None else aligned[1] + aligned[0].elapsed_time(step.end) / 1000
                busy = min(max(over - began, 0.0), ended - began)
                if category == DATA:
                    steps.idle += ended - began - busy
                else:
                    steps.waits[category] += busy
            free += [step.begin, step.end]
        return free

    def wait(self) -> None:
        if self.queue:
            self.queue[-1].end.synchronize()
        self.collect()

    def add_to(self, times: dict[str, float]) -> None:
        """Tell apart host and device in the times of the host."""
        waits = {category: min(seconds, times[category]) for category, seconds in self.waits.items()}
        for category, seconds in waits.items():
            times[category] -= seconds
        times.update(device_wait=sum(waits.values()), device_steps=self.seconds, data_wait_idle=self.idle)


class _Epoch:
    """The times of an epoch, which are known when the device has come to its end."""

    def __init__(self, times: dict[str, float], steps: _Steps | None) -> None:
        self.times = times
        self._steps = steps

    def ready(self) -> bool:
        if self._steps is None:
            return True
        self._steps.collect()
        return not self._steps.queue

    def read(self) -> dict[str, float]:
        """The row for the loggers."""
        if self._steps is not None:
            self._steps.wait()
            self._steps.add_to(self.times)
            self._steps = None
        row = {f"epoch_time/{name}": seconds for name, seconds in self.times.items() if name != "epoch"}
        return {**row, "epoch": self.times["epoch"]}


def category_of(action: str) -> str | None:
    """What an action counts for; None for what it runs within."""
    if action in ACTIONS:
        return ACTIONS[action]
    owner, _, name = action.rpartition(".")
    if name in TRANSFERS:
        return COPY
    if owner.startswith("[Callback]") or (owner.startswith("[LightningModule]") and name.startswith("on_")):
        return HOOKS
    return None


def line(times: dict[str, float]) -> str:
    """The times of an epoch as a line of text, the longest first, without those that are nothing."""
    whole = times["whole"]
    parts = sorted((name for name in (*CATEGORIES, "device_wait") if times.get(name, 0) > 0), key=lambda name: -times[name])
    names = {"device_wait": "waiting for the GPU", **{name: name.replace("_", " ") for name in CATEGORIES}}
    shares = [f"{names[name]} {_seconds(times[name])} ({_per_cent(times[name], whole)})" for name in parts]
    text = f"Epoch {times['epoch']:.0f}: {_seconds(whole)}, of which {', '.join(shares)}."
    if "device_steps" in times:
        steps, idle = times["device_steps"], times["data_wait_idle"]
        text += f" The GPU took {_seconds(steps)} ({_per_cent(steps, whole)}) for the steps"
        text += f", and had nothing to do in {_seconds(idle)} of the data wait." if times[DATA] > 0 else "."
    return text


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _per_cent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"
