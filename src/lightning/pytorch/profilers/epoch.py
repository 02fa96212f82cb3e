"""Where the wall time of each training epoch went, in one line."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
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

    These are times of the host, each without those within it. A CUDA device works behind the host; what it takes for the steps, from its
    first kernel to its last, is measured by events and told beside them. Nobody waits for these: the line comes when they are over. A
    host that waits for data while the device is still busy loses nothing: the wait matters where the device's part is small.

    Args:
        to_loggers: send ``epoch_time/data_wait``, ..., in seconds, to the trainer's loggers too.
        dirpath: the directory of the report; None is the log directory of the trainer.
        filename: write the lines to ``{stage}-{filename}.txt`` there, when the run ends; None writes no file.

    Attributes:
        times: for each epoch a dict of seconds: those above, ``whole``, and on CUDA ``device_steps``; and the number of the ``epoch``.

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
        self._seconds: dict[str, float] = {}
        self._began = self._since = 0.0
        self._device: _Device | None = None
        self._unsaid: deque[_Epoch] = deque()

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made during a run is for another one, and events can't be copied.
        return {**vars(self), "_trainer": None, "_device": None, "_open": [], "_unsaid": deque()}

    def _attach(self, trainer: pl.Trainer) -> None:
        """Get to know the trainer, before its run."""
        self._trainer = trainer
        device = trainer.strategy.root_device
        self._device = _Device(device) if device.type == "cuda" else None

    def start(self, action_name: str) -> None:
        """Begin to count time for the category of an action."""
        now = time.perf_counter()
        if action_name == EPOCH:
            self._open, self._seconds, self._began = [], dict.fromkeys(CATEGORIES, 0.0), now
        elif not self._open:
            return  # before or after the epochs
        else:
            self._seconds[self._open[-1]] += now - self._since
        self._open.append(self._category(action_name))
        self._since = now
        if self._device is not None and action_name == STEP:
            self._device.begin()
            if self._unsaid:
                self._say(wait=False)

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
            self._leave()
            raise
        self.stop(action_name)

    def _leave(self) -> None:
        now = time.perf_counter()
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


class _Device:
    """How long a CUDA device takes for the steps of an epoch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Any] = []
        self._steps = _Steps()

    def _mark(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def begin(self) -> None:
        self._free += self._steps.collect()
        self._began = self._mark()

    def end(self) -> None:
        self._steps.marks.append((self._began, self._mark()))

    def take(self) -> _Steps:
        """The steps of the epoch that ends."""
        steps, self._steps = self._steps, _Steps()
        return steps


class _Steps:
    """The steps of an epoch on a device."""

    def __init__(self) -> None:
        self.marks: deque[tuple[Any, Any]] = deque()  # of the begin and end of each that is not over, as far as is known
        self.seconds = 0.0

    def collect(self) -> list[Any]:
        """Add up the steps that are over; returns their events, for others."""
        free = []
        while self.marks and self.marks[0][1].query():
            begin, end = self.marks.popleft()
            self.seconds += begin.elapsed_time(end) / 1000
            free += [begin, end]
        return free

    def wait(self) -> None:
        if self.marks:
            self.marks[-1][1].synchronize()
        self.collect()


class _Epoch:
    """The times of an epoch, which are known when the device has come to its end."""

    def __init__(self, times: dict[str, float], steps: _Steps | None) -> None:
        self.times = times
        self._steps = steps

    def ready(self) -> bool:
        if self._steps is None:
            return True
        self._steps.collect()
        return not self._steps.marks

    def read(self) -> dict[str, float]:
        """The row for the loggers."""
        if self._steps is not None:
            self._steps.wait()
            self.times["device_steps"] = self._steps.seconds
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
    parts = sorted((name for name in CATEGORIES if times[name] > 0), key=lambda name: -times[name])
    shares = [f"{name.replace('_', ' ')} {_seconds(times[name])} ({_per_cent(times[name], whole)})" for name in parts]
    text = f"Epoch {times['epoch']:.0f}: {_seconds(whole)}, of which {', '.join(shares)}."
    if "device_steps" in times:
        text += f" The GPU took {_seconds(times['device_steps'])} ({_per_cent(times['device_steps'], whole)}) for the steps."
    return text


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _per_cent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"
