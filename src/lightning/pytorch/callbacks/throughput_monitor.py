"""Log how much work a run gets done per second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.throughput import Throughput, compute_dtype, get_available_flops
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

if TYPE_CHECKING:
    import lightning.pytorch as pl

BEHIND = 64  # updates of which the device may not have reached the end, before it is looked whether it has
SHORTEST = 1e-9  # seconds between two updates, since time must go on


class ThroughputMonitor(Callback):
    """Log batches, samples, items (such as tokens) and operations per second, and what share of the device's peak that is (MFU).

    The keys are those of :class:`~lightning.fabric.utilities.throughput.Throughput`, behind the stage: ``train/device/samples_per_sec``,
    ``validate/time``, ... Training logs them at the steps at which loggers get rows (``Trainer(log_every_n_steps=...)``), the other stages
    after every so many of their batches, which are their x values. Rates look back over the last ``window_size`` batches, and are there
    once there have been so many. What validation takes is no time of training.

    On a CUDA device the time of a batch is when the device has finished it, measured by an event that nobody waits for: a row reaches the
    loggers when its last event is over, a few steps later.

    For operations, give your LightningModule an attribute ``flops_per_batch``; see
    :func:`~lightning.fabric.utilities.throughput.measure_flops`. It is read at each batch, and may be a property that depends on
    the batch or on ``self.training``. A plain number is taken as that of a training batch, so that validation in ``fit`` has none.

    The totals of training (time, batches, samples, items) are saved in checkpoints, and go on when a run is resumed.

    Args:
        batch_size_fn: gives the number of samples in a batch.
        length_fn: gives the number of items in a batch, all of its samples together.
        kwargs: go to :class:`~lightning.fabric.utilities.throughput.Throughput`: ``window_size``, ``separator``, and
            ``available_flops`` and ``world_size`` in place of what the trainer's devices have.

    Attributes:
        available_flops: the peak of the device, once there are operations to compare with it; None if it is not known.

    Raises:
        TypeError: for other ``kwargs``; in a run, if one of the functions returns no whole number.
        ValueError: in a run, if there are fewer samples than batches, or fewer items than samples.

    Example::

        class Model(LightningModule):
            def setup(self, stage):
                with torch.device("meta"):
                    model, batch = Model(), torch.randn(16, 512)
                self.flops_per_batch = measure_flops(model, lambda: model(batch), loss_fn=torch.Tensor.sum)

        monitor = ThroughputMonitor(batch_size_fn=lambda batch: batch.size(0), length_fn=lambda batch: batch.numel())
        trainer = Trainer(callbacks=monitor, log_every_n_steps=10)
    """

    def __init__(self, batch_size_fn: Callable[[Any], int], length_fn: Callable[[Any], int] | None = None, **kwargs: Any) -> None:
        super().__init__()
        self._separator = Throughput(**kwargs).separator
        self.kwargs = kwargs
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.available_flops: float | None = kwargs.get("available_flops")
        self._peak_is_known = "available_flops" in kwargs
        self._training: _Run | None = None
        self._evaluation: _Run | None = None
        self._totals: dict[str, Any] = {}  # of training, while none runs
        self._goes_on = False  # whether the next training does, from these totals
        self._evaluated = 0  # batches of this evaluation, or of all validation in fit

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made during a run is for another one, and events can't be copied.
        return {**vars(self), "_training": None, "_evaluation": None}

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start the clock."""
        totals = self._totals if self._goes_on else {}
        self._goes_on = False
        self._evaluated = totals.get("validated", 0)
        self._training = self._start(trainer, RunningStage.TRAINING, totals)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        """Count the batch; log if loggers get a row now."""
        run = self._training
        if run is None or not trainer.loggers:
            return
        self._update(trainer, pl_module, run, batch)
        if trainer.log_due and trainer.fit_loop.progress.updates:
            self._log(trainer, run, trainer.log_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the totals alone."""
        self._totals = self.state_dict()
        self._training = None

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start a clock of its own."""
        if not trainer.sanity_checking:
            self._start_evaluation(trainer, RunningStage.VALIDATING)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Count the batch; log if it is due."""
        if not trainer.sanity_checking:
            self._evaluate(trainer, pl_module, batch)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let the clock of training go on from here."""
        if self._training is not None and not trainer.sanity_checking:
            self._training.pause()

    def on_test_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start the clock."""
        self._start_evaluation(trainer, RunningStage.TESTING)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any) -> None:
        """Count the batch; log if it is due."""
        self._evaluate(trainer, pl_module, batch)

    def on_predict_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start the clock."""
        self._start_evaluation(trainer, RunningStage.PREDICTING)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Count the batch; log if it is due."""
        self._evaluate(trainer, pl_module, batch)

    def _start_evaluation(self, trainer: pl.Trainer, stage: RunningStage) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._evaluated = 0
        self._evaluation = self._start(trainer, stage, {})

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        run = self._evaluation
        if run is None or not trainer.loggers:
            return
        self._update(trainer, pl_module, run, batch)
        self._evaluated += 1
        if trainer.log_every_n_steps and self._evaluated % trainer.log_every_n_steps == 0:
            self._log(trainer, run, self._evaluated)

    # ---- any stage --------------------------------------------------------------------------------------------------

    def _start(self, trainer: pl.Trainer, stage: RunningStage, totals: dict[str, Any]) -> _Run:
        throughput = Throughput(**{"world_size": trainer.world_size, **self.kwargs})
        device = trainer.strategy.root_device
        clock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
        return _Run(clock, throughput, totals, f"{stage.value}{self._separator}", stage is RunningStage.TRAINING)

    def _update(self, trainer: pl.Trainer, module: pl.LightningModule, run: _Run, batch: Any) -> None:
        samples, lengths = self.batch_size_fn(batch), None
        if type(samples) is not int:
            samples = _number(samples, "batch_size_fn", "samples")
        if self.length_fn is not None:
            lengths = self.length_fn(batch)
            if type(lengths) is not int:
                lengths = _number(lengths, "length_fn", "items")
            if run.batches == 0:
                _warn_of_one_sample(batch, samples, lengths)
        flops = getattr(module, "flops_per_batch", None)
        if flops is not None:
            if not run.trains and trainer.state.fn == TrainerFn.FITTING and not _is_computed(module):
                flops = None
            elif not self._peak_is_known:
                self._peak_is_known = True
                self.available_flops = get_available_flops(trainer.strategy.root_device, compute_dtype(trainer.strategy.precision))
            run.throughput.available_flops = self.available_flops
        run.update(samples, lengths, flops)

    def _log(self, trainer: pl.Trainer, run: _Run, step: int) -> None:
        trainer.send_to_loggers(run.row({"epoch": trainer.current_epoch} if run.trains else {}), step)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The totals of training; waits until the device has done what they count."""
        return dict(self._totals) if self._training is None else {**self._training.totals(), "validated": self._evaluated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training go on from these totals."""
        self._totals, self._goes_on = dict(state_dict), True


class _HostClock:
    """Times on the host, for devices that have done their work when a call returns."""

    behind = 0

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin  # type: ignore[no-any-return]

    def done(self, mark: Any) -> bool:
        return True

    def wait(self, mark: Any) -> None:
        """It is over."""

    def free(self, mark: Any) -> None:
        """Numbers need not be used again."""


class _DeviceClock(_HostClock):
    """Events in the queue of a CUDA device."""

    behind = BEHIND

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000  # type: ignore[no-any-return]

    def done(self, mark: Any) -> bool:
        return mark.query()  # type: ignore[no-any-return]

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def free(self, mark: Any) -> None:
        self._free.append(mark)


class _Run:
    """The work of one stage: updates whose end the device may not have reached yet, and rows that wait for that.

    Args:
        clock: sets marks, and knows the seconds between two of them once the device has reached both.
        throughput: gets the updates, in their order.
        totals: of the run before, which this one goes on from.
        prefix: of the names in rows.
        trains: whether this is training.
    """

    def __init__(self, clock: _HostClock, throughput: Throughput, totals: dict[str, Any], prefix: str = "", trains: bool = False) -> None:
        self.prefix = prefix
        self.trains = trains
        self.clock = clock
        self.throughput = throughput
        self.batches: int = totals.get("batches", 0)
        self.samples: int = totals.get("samples", 0)
        self.lengths: int = totals.get("lengths", 0)
        self.time: float = totals.get("time", 0.0)
        self._waiting: deque[Any] = deque()  # marks, each with what was done until then, or None after a pause; and rows
        self._begin = clock.mark()

    def update(self, samples: int, lengths: int | None, flops: int | None) -> None:
        """Count a batch.

        Raises:
            ValueError: if there are fewer samples than batches, or fewer items than samples.
        """
        self.batches += 1
        self.samples += samples
        if samples < 1 and self.samples < self.batches:
            raise ValueError(
                f"`ThroughputMonitor(batch_size_fn=...)` returned {samples}: {self.samples} samples can't make {self.batches} batches."
            )
        if lengths is not None:
            self.lengths += lengths
            if lengths < samples and self.lengths < self.samples:
                raise ValueError(
                    f"`ThroughputMonitor(length_fn=...)` returned {lengths} for a batch of {samples} samples: it must count the items of "
                    "all samples together, for example `batch.numel()`."
                )
        counts = (self.batches, self.samples, None if lengths is None else self.lengths, flops)
        self._waiting.append((self.clock.mark(), counts))
        if len(self._waiting) > self.clock.behind:
            self._take()

    def pause(self) -> None:
        """Leave out the time since the last update."""
        self._waiting.append((self.clock.mark(), None))

    def row(self, extra: dict[str, Any]) -> _Row:
        """What is known at this point, once the device has reached it."""
        row = _Row(self, extra, self._waiting[-1][0] if self._waiting else self._begin)
        self._waiting.append(row)
        return row

    def totals(self) -> dict[str, Any]:
        """What was done until now, and how long it took; waits for the device."""
        self._take(wait=True)
        totals = {"time": self.time, "batches": self.batches, "samples": self.samples}
        return {**totals, "lengths": self.lengths} if self.lengths else totals

    def _take(self, until: _Row | None = None, wait: bool = False) -> None:
        """Hand updates to the throughput: those that are over, or all before a row, or all."""
        clock, waiting = self.clock, self._waiting
        while waiting:
            entry = waiting[0]
            if isinstance(entry, _Row):
                entry.take(self.throughput.compute())
                waiting.popleft()
                if entry is until:
                    return
                continue
            mark, counts = entry
            if wait or until is not None:
                clock.wait(mark)
            elif not clock.done(mark):
                return
            waiting.popleft()
            if counts is not None:
                batches, samples, lengths, flops = counts
                self.time += max(clock.seconds(self._begin, mark), SHORTEST)
                self.throughput.update(time=self.time, batches=batches, samples=samples, lengths=lengths, flops=flops)
            clock.free(self._begin)
            self._begin = mark


class _Row:
    """A row for the loggers that is known when the device has come so far."""

    def __init__(self, run: _Run, extra: dict[str, Any], mark: Any) -> None:
        self._run = run
        self._extra = extra
        self._mark = mark
        self._values: dict[str, float] | None = None

    def take(self, values: dict[str, float]) -> None:
        self._values = {f"{self._run.prefix}{name}": value for name, value in values.items()} | self._extra

    def ready(self) -> bool:
        return self._values is not None or self._run.clock.done(self._mark)

    def read(self) -> dict[str, float]:
        if self._values is None:
            self._run._take(until=self)
        assert self._values is not None
        return self._values


def _number(value: Any, name: str, what: str) -> int:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(
            f"`ThroughputMonitor({name}=...)` returned a tensor on {value.device}, which could be read only by waiting for the device at "
            "each batch: return a number, such as `batch.size(0)`."
        )
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or number != value:
        raise TypeError(
            f"`ThroughputMonitor({name}=...)` returned {value!r}, a {type(value).__name__}: it must return the number of {what} in a batch."
        )
    return number


def _is_computed(module: Any) -> bool:
    return isinstance(getattr(type(module), "flops_per_batch", None), property)


def _warn_of_one_sample(batch: Any, samples: int, lengths: int) -> None:
    """Warn if the length is that of each sample, which Lightning's documentation asks for and its rates don't expect."""
    shapes = [leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() >= 2]
    if 1 < samples <= lengths and any(shape[0] == samples and shape[1] == lengths for shape in shapes):
        rank_zero_warn(
            f"`ThroughputMonitor(length_fn=...)` returned {lengths} for a batch of {samples} samples, which seems to be the length of each "
            f"of them: `items_per_sec` would be {samples} times too low. Return the items of all samples, for example `batch.numel()`.",
            category=PossibleUserWarning,
        )
