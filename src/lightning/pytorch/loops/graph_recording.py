"""Recording of a step's device work, so that it can be replayed: the recorder of CUDA, and values that a recorded step logs."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning.pytorch.loops.graph_watch import NotReplayable, Watch, here
from lightning.pytorch.metric_entry import Entry, is_metric
from lightning.pytorch.metrics import Metrics

Replay = Callable[[], Any]

OF_HOST = "it logs '{}', a number of the host that changes from step to step: log it in a hook of the batch's end"


class Recorder(Protocol):
    """Records what is given to a device, instead of running it."""

    def begin(self) -> None:
        """From here on work is recorded, not run."""

    def end(self) -> Replay:
        """End a recording; what is returned runs it."""

    def abandon(self) -> None:
        """End a recording that failed."""

    def noticing(self, watch: Watch) -> Any:
        """A context that notes where the host reads from the device."""


def recorder_of(device: torch.device) -> Recorder | None:
    """The recorder of a device; None where it has none."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CudaRecorder:
    """CUDA graphs that share one pool of memory, recorded on the current stream, which must not be the default one.

    See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs for what can be recorded.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.graph: Any = None
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()  # which recordings hold the pool

    def begin(self) -> None:
        if not self.alive:
            self.pool = torch.cuda.graph_pool_handle()  # the one before is gone with its last recording
        gc.collect()  # nothing of another recording may be freed in the middle of this one
        torch.cuda.synchronize(self.device)
        self.graph = torch.cuda.CUDAGraph()
        # Threads that pin memory, or look whether copies have arrived, go on meanwhile.
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> Replay:
        graph, self.graph = self.graph, None
        graph.capture_end()
        self.alive.add(graph)
        return graph.replay  # type: ignore[no-any-return]

    def abandon(self) -> None:
        graph, self.graph = self.graph, None
        if graph is not None:
            try:
                graph.capture_end()
            except RuntimeError:  # what was recorded is void; neither the allocator nor the generator has been told of the end
                index = self.device.index or 0
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(index, self.pool)
                generator = torch.cuda.default_generators[index]
                generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.synchronize(self.device)

    @contextmanager
    def noticing(self, watch: Watch) -> Iterator[None]:
        """Let torch warn of each read, and note where it comes from."""
        before, thread = torch.cuda.get_sync_debug_mode(), threading.get_ident()
        with warnings.catch_warnings():
            show = warnings.showwarning

            def noting(message: Any, *args: Any, **kwargs: Any) -> None:
                if "synchronizing CUDA operation" in str(message):
                    if threading.get_ident() != thread:
                        return
                    watch.note(f"it reads from the device{here()}, for which the host would have to wait in the middle of a replay")
                else:
                    show(message, *args, **kwargs)

            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            warnings.showwarning = noting
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)


class Shadow:
    """The running total of one key over replayed steps, which lies where the recording adds to it.

    Args:
        entry: of the key; takes the total over when it is read.
        device: where the values are.
    """

    def __init__(self, entry: Entry, device: torch.device) -> None:
        self.entry = entry
        self.start = {"max": -float("inf"), "min": float("inf")}.get(entry.options.reduction, 0.0)
        self.total = torch.full((), self.start, dtype=torch.float64, device=device)
        self.weight: float = 0

    def hand_over(self) -> None:
        """Add the total to that of the entry, and begin anew."""
        if self.weight == 0:
            return
        entry, reduction = self.entry, self.entry.options.reduction
        if entry.total is None:
            entry.total = self.total.clone()
        elif reduction in ("mean", "sum"):
            entry.total.add_(self.total)
        else:
            entry.total = (torch.maximum if reduction == "max" else torch.minimum)(entry.total, self.total)
        entry.weight += self.weight
        self.total.fill_(self.start)
        self.weight = 0


class Logged:
    """What one ``self.log`` of a recorded step does at each replay.

    Args:
        entry: of the key.
        value: the tensor that a replay writes, or a number that stays as it is.
        weight: what the value counts in a mean.
        shadow: its total; None where there is none.
    """

    def __init__(self, entry: Entry, value: Any, weight: float, shadow: Shadow | None) -> None:
        self.entry, self.value, self.weight, self.shadow = entry, value, weight, shadow

    def note(self, serial: int) -> None:
        """The step was replayed for the batch of this number."""
        entry = self.entry
        if not isinstance(self.value, Tensor):
            entry.add(self.value, self.weight)
        else:
            if entry.on_step:
                entry.value, entry.borrowed = self.value, True
            if self.shadow is not None:
                self.shadow.weight += self.weight
        entry.serial, entry.merged = serial, False

    def settle(self) -> None:
        """Let the entry have a copy of its own: the memory of the value is about to be used by others."""
        if self.entry.value is self.value:
            self.entry.own()


class LogRecorder:
    """Takes the place of ``Metrics.log`` while a step is recorded.

    Args:
        metrics: whose.
        device: of the step.
    """

    def __init__(self, metrics: Metrics, device: torch.device) -> None:
        self.metrics, self.device = metrics, device
        self.shadows: dict[int, Shadow] = {}
        self.logged: list[Logged] = []
        self.numbers: dict[tuple[Any, str], Any] = {}  # of the host that were logged, by the kind of the step and their names
        self.key: Any = None  # the kind of the step that is recorded

    @contextmanager
    def recording(self, key: Any) -> Iterator[list[Logged]]:
        """Inside of it values are recorded; gives the list of them.

        Args:
            key: the kind of the step.
        """
        self.key = key
        for entry in (self.metrics.entries or {}).values():
            if entry.on_epoch and not entry.takes_metric and id(entry) not in self.shadows:
                self.shadows[id(entry)] = entry.shadow = Shadow(entry, self.device)
        logged = self.logged = []
        vars(self.metrics)["log"] = self.log
        try:
            yield logged
        finally:
            del vars(self.metrics)["log"]

    @contextmanager
    def noting(self, watch: Watch, key: Any) -> Iterator[None]:
        """Inside of it values are logged as always; numbers of the host among them that change are noted.

        Args:
            watch: takes the note.
            key: the kind of the step, within which such a number must stay the same.
        """
        metrics = self.metrics

        def log(module: Any, name: str, value: Any, given: tuple[Any, ...], batch_size: int | None) -> None:
            Metrics.log(metrics, module, name, value, given, batch_size)
            of_host = metrics.scope == "training_step" and not isinstance(value, Tensor) and not is_metric(value)
            if of_host and self.numbers.setdefault((key, name), value) != value:
                watch.note(f"{OF_HOST.format(name)}{here()}")

        vars(metrics)["log"] = log
        try:
            yield
        finally:
            del vars(metrics)["log"]

    def forget(self) -> None:
        """Let go of all totals, which the entries get."""
        for shadow in self.shadows.values():
            shadow.hand_over()
            shadow.entry.shadow = None
        self.shadows = {}
        self.numbers = {}

    def log(self, module: Any, name: str, value: Any, given: tuple[Any, ...], batch_size: int | None) -> None:
        """Record one value.

        Raises:
            NotReplayable: if that can't be.
        """
        metrics = self.metrics
        entry = (metrics.entries or {}).get((metrics.scope, name, metrics.dataloader_idx))
        if is_metric(value) or (entry is not None and entry.takes_metric):
            raise NotReplayable(f"it logs the Metric {name!r}, which counts on the host{here()}")
        if entry is None or (entry.on_epoch and id(entry) not in self.shadows):
            raise NotReplayable(f"it logs {name!r} in some steps and not in others{here()}")
        if entry.given != given:
            entry = metrics._register(module, name, value, given, entry)
            assert entry is not None
        if entry.options.enable_graph:
            raise NotReplayable(f"it logs {name!r} with enable_graph=True{here()}")
        weight: float = 1
        if entry.weighted:
            weight = batch_size if batch_size is not None else (metrics.batch_size or metrics._infer_batch_size())
        if not isinstance(value, Tensor) and self.numbers.get((self.key, name), value) != value:
            raise NotReplayable(f"{OF_HOST.format(name)}{here()}")
        if not isinstance(value, Tensor) or value.device.type != self.device.type:
            self.logged.append(Logged(entry, value, weight, None))
            return
        scratch = Entry(entry.name, entry.scope, entry.dataloader_idx, given, entry.options)
        shadow = self.shadows[id(entry)] if entry.on_epoch else None
        scratch.total = shadow.total if shadow is not None else None
        scratch.add(value, weight)
        if entry.dtype is None:
            from lightning.pytorch.metric_entry import widened

            entry.dtype = widened(value.dtype)
        self.logged.append(Logged(entry, scratch.value if entry.on_step else scratch.total, weight, shadow))
