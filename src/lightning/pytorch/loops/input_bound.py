"""What to say where training waits for its loader, and what helps in the case at hand."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning.fabric.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightning.pytorch.loops.batches import Waits
    from lightning.pytorch.trainer.trainer import Trainer

LONG = 2e-4  # seconds that are worth a question to the device
WATCHED = 64  # steps after such a wait whose end is noted, in case that the next wait is near
QUICK = 1e-3  # seconds for a batch, below which processes that make batches hand them over no faster


class DeviceIdle:
    """For how much of a wait a CUDA device had nothing to do.

    At the end of a long wait the device is asked whether it is done. If so, an event that it reaches at once ties its clock to the
    host's; for some time an event after each step then says when it was done. Nobody waits for either.

    Args:
        stream: its queue.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.is_timed = False  # whether the clocks are tied
        self._tie: Any = None
        self._tied_at = 0.0
        self._step_end: Any = None  # recorded after the clocks were tied
        self._is_behind_tie = False
        self._left = 0  # steps that are still watched

    def idle_between(self, began: float, ended: float) -> float:
        """The seconds without work in a wait that is over now."""
        if ended - began < LONG or not self.stream.query():
            return 0.0
        idle = 0.0
        if self._is_behind_tie:
            done = self._tied_at + self._tie.elapsed_time(self._step_end) / 1000
            idle = min(max(ended - done, 0.0), ended - began)
        if not self.is_timed:
            self._tie, self._step_end = self._event(), self._event()
            self.is_timed = True
        self._tie.record(self.stream)
        self._tied_at, self._is_behind_tie, self._left = time.perf_counter(), False, WATCHED
        return idle

    def end_step(self) -> None:
        """A step was launched."""
        self._left -= 1
        self.is_timed = self._is_behind_tie = self._left >= 0
        if self.is_timed:
            self._step_end.record(self.stream)

    def _event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)


def tell(trainer: Trainer, waits: Waits) -> None:
    """Say how long training has waited, and what helps."""
    fit = trainer.fit_loop
    assert fit.loader is not None
    on_gpu = trainer.strategy.root_device.type == "cuda"
    meanwhile = ", in which the GPU had nothing to do" if on_gpu else ""
    each = waits.seconds / waits.batches
    advice = [advice_for(loader, each, on_gpu, cpus_of(trainer)) for loader in fit.loader.combined.flattened]
    rank_zero_info(
        f"Training is held up by its data: in epoch {fit.progress.epoch} it waited {waits.seconds:.1f} of {waits.whole:.1f} s "
        f"({100 * waits.seconds / waits.whole:.0f} %) for {waits.batches} batches{meanwhile}. " + " ".join(dict.fromkeys(advice))
    )


def cpus_of(trainer: Trainer) -> int:
    """The CPUs that this process has for itself."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // getattr(trainer.strategy, "num_processes", 1))


def advice_for(loader: Any, each: float, on_gpu: bool, cpus: int) -> str:
    """What helps a loader whose batches are waited for.

    Args:
        loader: the user's.
        each: seconds that a batch is waited for.
        on_gpu: whether batches are copied to a GPU.
        cpus: for this process.
    """
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        return f"Batches come from a {kind}: fetch the next ones in a thread or in processes of their own while this one is computed."
    workers = loader.num_workers
    costs = f"speed up what makes a batch: {type(loader.dataset).__name__}'s `{_method(loader)}`, its transforms, `collate_fn`"
    if each < QUICK:
        return (
            f"The {kind} (num_workers={workers}) gives a batch in {1000 * each:.2f} ms, which more workers would not make faster: take "
            "larger batches, read several samples at once (`__getitems__`), or cut batches out of tensors in memory."
        )
    hints = []
    if workers == 0 and cpus == 1:
        hints.append(f"The {kind} has num_workers=0, and this process one CPU, so that workers would gain little: {costs}.")
    elif workers == 0:
        hints.append(
            f"The {kind} has num_workers=0, so the training process makes each batch between two steps: give `num_workers`, up to the "
            f"{cpus} CPUs of this process, with `persistent_workers=True`."
        )
        if isinstance(loader.dataset, IterableDataset):
            hints.append("An IterableDataset must share its samples among them (`torch.utils.data.get_worker_info`).")
    elif workers < cpus:
        hints.append(f"The {kind} has num_workers={workers}, of {cpus} CPUs of this process: give more, or {costs}.")
    else:
        hints.append(f"The {kind} has num_workers={workers} already, on {cpus} CPUs of this process: {costs}.")
    if workers > 0 and not loader.persistent_workers:
        hints.append("`persistent_workers=True` keeps them from one epoch to the next.")
    if on_gpu and not loader.pin_memory:
        hints.append("`pin_memory=True` lets copies to the GPU run beside its work.")
    return " ".join(hints)


def _method(loader: DataLoader[Any]) -> str:
    return "__iter__" if isinstance(loader.dataset, IterableDataset) else "__getitem__"
