"""Batches that need more memory than there is: run again in parts, with the gradients of the whole."""

from __future__ import annotations

import warnings
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _NormBase

from lightning.fabric.plugins.layer_sync import HostSyncBatchNorm
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.memory_report import first_line, is_out_of_memory
from lightning.pytorch.loops.parts import CannotBeSplitError, bounds, mean, merged, plan
from lightning.pytorch.loops.replay import Buffers, RandomStates
from lightning.pytorch.metric_entry import REDUCTIONS, is_metric
from lightning.pytorch.utilities.memory import garbage_collection_cuda

if TYPE_CHECKING:
    from lightning.pytorch.loops.fit import FitLoop
    from lightning.pytorch.trainer.trainer import Trainer

REDUCE_FX = 4  # the place of `reduce_fx` among the arguments of `self.log`, and of `enable_graph`
ENABLE_GRAPH = 5


class BatchSplitter:
    """Takes the place of the loop's closure: forward and backward of a batch, in as many parts as memory asks for.

    Args:
        trainer: whose run it is.
        loop: the loop of the run.

    Raises:
        MisconfigurationException: where a batch cannot be run in parts at all.
    """

    def __init__(self, trainer: Trainer, loop: FitLoop) -> None:
        self.trainer, self.loop = trainer, loop
        self.fits = float("inf")  # samples that one part may have
        self.averages = trainer.strategy.world_size > 1
        self.recording: list[Recorded] | None = None
        self.check()

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            MisconfigurationException: for manual optimization, and for strategies whose processes must run the same passes.
        """
        strategy, module = self.trainer.strategy, self.trainer.lightning_module
        asked = "on_out_of_memory='split_batch'"
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"{asked} needs automatic optimization: in manual optimization only `training_step` knows what belongs to one loss. "
                "Split the batch there, or leave the argument out."
            )
        reason = None
        if strategy.forward_is_collective or type(strategy).backward is not Strategy.backward:
            reason = f"{type(strategy).__name__} needs all processes in each forward and backward pass"
        elif getattr(strategy, "_comm_hook", None) is not None:
            reason = "`ddp_comm_hook` takes the gradients while the backward pass runs"
        elif self.averages and any(isinstance(each, (SyncBatchNorm, HostSyncBatchNorm)) for each in strategy.model.modules()):
            reason = "SyncBatchNorm needs all processes in each forward pass"
        if reason is not None:
            raise MisconfigurationException(f"{asked}: {reason}, and they may need different numbers of parts. Use smaller batches.")

    def wrap(self, loop: FitLoop) -> None:
        """Take the place of the closure of a loop whose functions were just bound."""
        from lightning.pytorch.loops import bind
        from lightning.pytorch.loops.batches import step_with_index

        loop.closure = self.closure  # type: ignore[method-assign]
        module = self.trainer.lightning_module
        if self.averages:  # not through DDP, which would average gradients of a backward pass that may have to be run again
            step = step_with_index(module.training_step, "training_step")
            loop.training_step = bind.profiled(self.trainer, step, f"[Strategy]{type(self.trainer.strategy).__name__}.training_step")
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        self.parameters = [p for name, p in module.named_parameters() if p.requires_grad and name not in ignored]
        self.norms = [each for each in module.modules() if isinstance(each, _NormBase)]
        self.metrics = [each for each in module.modules() if is_metric(each)]

    def finish(self) -> None:
        """Nothing is left to be told."""

    # ---- a step -----------------------------------------------------------------------------------------------------

    def closure(self) -> Any:
        """Everything before the update, as :meth:`FitLoop.closure` does it, but that it starts again in smaller parts."""
        loop = self.loop
        p, hooks, optimizer = loop.progress, loop.hooks, loop.optimizer
        if p.batch_idx % loop.accumulate == 0:
            hooks.on_before_zero_grad(optimizer)
            loop.zero_grad(optimizer)
        before, fitted = Before(self), self.fits
        while (loss := self.attempt(before)) is FAILED:
            before.restore()
            garbage_collection_cuda()
        before.add_gradients()
        if self.fits < fitted:
            self.tell()
        if loss is not None:
            if self.averages and p.updates:
                average(self.parameters)
            hooks.on_after_backward()
            if p.is_last and loop.accumulate > 1:
                loop.complete_window()
        loop.gathered = p.batch_idx % loop.accumulate + 1
        if p.updates and not loop.user_steps:
            loop.unscale(optimizer)
            hooks.on_before_optimizer_step(optimizer)
            loop.clip(optimizer)
        return loss

    def attempt(self, before: Before) -> Any:
        """Forward and backward in parts that may fit; the loss, or ``FAILED`` if memory ran out and smaller ones may do.

        Raises:
            RuntimeError: if memory ran out, and the batch cannot be split any further: as the allocator raised it.
        """
        try:
            return self.run(self.loop.batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            try:
                self.halve(self.loop.batch)
            except CannotBeSplitError as reason:
                before.restore()
                before.add_gradients()
                raise type(error)(f"{first_line(error)} (on_out_of_memory='split_batch' could not help: {reason})") from error
        return FAILED

    def halve(self, batch: Any) -> None:
        """Allow half of the largest part of this batch.

        Raises:
            CannotBeSplitError: if that was a single sample, or the batch cannot be cut.
        """
        size = plan(batch)[0]
        largest = max(stop - start for start, stop in bounds(size, self.fits))
        if largest <= 1:
            raise CannotBeSplitError("a single sample needs more memory than there is")
        self.fits = (largest + 1) // 2

    def run(self, batch: Any) -> Any:
        """Forward and backward of each part; returns the loss of the whole as it went into the backward pass."""
        loop, metrics = self.loop, self.trainer._metrics
        parts, sizes = self.parts_of(batch)
        recorded: list[list[Recorded]] = []
        outputs, losses = [], []
        metrics.log = self.record  # type: ignore[method-assign]
        try:
            for part, size in zip(parts, sizes):
                self.recording = []
                recorded.append(self.recording)
                output, loss = self.run_part(part, size / sum(sizes))
                outputs.append(output)
                losses += [] if loss is None else [loss]
        finally:
            del metrics.log
        loop.outputs = merged(outputs, sizes)
        self.log(recorded, sizes)
        return sum(losses[1:], losses[0]) if losses else None

    def parts_of(self, batch: Any) -> tuple[list[Any], list[int]]:
        """The parts that a batch is run in, and their sizes; of the whole that does not matter."""
        if self.fits != float("inf"):
            with suppress(CannotBeSplitError):  # another kind of batch; it may fit as it is
                size, cut = plan(batch)
                where = bounds(size, self.fits)
                return [cut(start, stop) for start, stop in where], [stop - start for start, stop in where]
        return [batch], [1]

    def run_part(self, part: Any, share: float) -> tuple[Any, Tensor | None]:
        """Forward and backward of one part, whose loss counts that share; returns what came out, without its graph."""
        loop, hooks = self.loop, self.loop.hooks
        self.trainer._metrics.scope = "training_step"
        with loop.forward_context():
            outputs = loop.training_step(part, loop.progress.batch_idx)
        loss = outputs if isinstance(outputs, Tensor) else loop.loss_of(outputs)
        detached = loop.detach(outputs)
        del outputs
        if loss is None:
            return detached, None
        if loop.accumulate > 1:
            loss = loss / loop.window()
        if loop.weight != 1:
            loss = loss * loop.weight
        if share != 1:
            loss = loss * share
        hooks.on_before_backward(loss)
        loop.gathered = -1
        loop.backward(loss)
        return detached, loss.detach()

    def tell(self) -> None:
        """Say that batches are run in parts from now on."""
        text = f"Memory ran out, so training batches are run in parts of at most {self.fits} samples from now on, with the same gradients"
        if any(each.training for each in self.norms):
            text += "; but batch normalisation takes the statistics of each part for itself"
        rank = f"Rank {self.trainer.global_rank}: " if self.averages else ""
        warnings.warn(f"{rank}{text}.", RuntimeWarning, stacklevel=2)

    # ---- self.log ---------------------------------------------------------------------------------------------------

    def record(self, module: Any, name: str, value: Any, given: tuple[Any, ...], batch_size: int | None) -> None:
        """Stands for :meth:`Metrics.log` in a pass that may have to be run again."""
        metrics = self.trainer._metrics
        if isinstance(value, Tensor) and not given[ENABLE_GRAPH]:
            value = value.detach().clone()
        assert self.recording is not None
        key = (metrics.scope, name, sum(1 for other in self.recording if other.key[:2] == (metrics.scope, name)))
        self.recording.append(Recorded(key, module, value, given, batch_size))

    def log(self, recorded: list[list[Recorded]], sizes: list[int]) -> None:
        """Log what the parts have logged, as the whole would have."""
        metrics, outer = self.trainer._metrics, self.trainer._metrics.scope
        by_key: dict[Any, list[tuple[Recorded, int]]] = {}
        for records, size in zip(recorded, sizes):
            for record in records:
                by_key.setdefault(record.key, []).append((record, size))
        try:
            for (scope, name, _), entries in by_key.items():
                record = entries[0][0]
                value, batch_size = combined(entries)
                metrics.scope = scope
                metrics.log(record.module, name, value, record.given, batch_size)
        finally:
            metrics.scope = outer


FAILED = object()


class Recorded:
    """One call of ``self.log``."""

    __slots__ = ("batch_size", "given", "key", "module", "value")

    def __init__(self, key: tuple[Any, str, int], module: Any, value: Any, given: tuple[Any, ...], batch_size: int | None) -> None:
        self.key, self.module, self.value, self.given, self.batch_size = key, module, value, given, batch_size


def combined(entries: list[tuple[Recorded, int]]) -> tuple[Any, int | None]:
    """The value of the whole batch, and the ``batch_size`` to log it with, from what its parts logged under one name."""
    values, sizes = [record.value for record, _ in entries], [size for _, size in entries]
    given = [record.batch_size for record, _ in entries]
    first = entries[0][0]
    if len(entries) == 1:
        return first.value, first.batch_size
    # A size that is the same for all parts is that of the whole batch, unless it is really that of each part.
    constant = given[0] is None or (len(set(given)) == 1 and given != sizes)
    batch_size = given[0] if constant else sum(given)  # type: ignore[arg-type]
    fx = first.given[REDUCE_FX]
    reduction = REDUCTIONS.get(fx.lower() if isinstance(fx, str) else fx, "mean")
    if is_metric(values[0]):
        return values[0], batch_size
    if reduction == "mean":
        return mean(values, sizes if constant else given), batch_size  # type: ignore[arg-type]
    if reduction == "sum":
        return sum(values[1:], values[0]), batch_size
    if isinstance(values[0], Tensor):
        stacked = torch.stack([value.reshape(()) for value in values])
        return (stacked.amax() if reduction == "max" else stacked.amin()), batch_size
    return (max if reduction == "max" else min)(values), batch_size


class Before:
    """What a failed pass has to be undone to: random numbers, gradients, and the states of batch normalisation and Metrics.

    Args:
        splitter: whose step begins.
    """

    def __init__(self, splitter: BatchSplitter) -> None:
        self.states = RandomStates(splitter.trainer.strategy.root_device)
        self.buffers = Buffers(splitter.norms)
        self.metrics = {metric: deepcopy(metric.__dict__) for metric in splitter.metrics}
        self.parameters = splitter.parameters
        # Set aside, not copied: the pass makes gradients of its own, which are added at its end.
        self.gradients = {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in self.gradients:
            parameter.grad = None

    def restore(self) -> None:
        """Undo a pass."""
        for parameter in self.parameters:
            parameter.grad = None
        self.states.restore()
        self.buffers.restore()
        for metric, state in self.metrics.items():
            metric.__dict__.update(deepcopy(state))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Bring the gradients of the accumulation window together."""
        for parameter, gradient in self.gradients.items():
            if parameter.grad is not None:
                gradient.add_(parameter.grad)
            parameter.grad = gradient


@torch.no_grad()
def average(parameters: list[Any]) -> None:
    """Average gradients over all processes; who has none where others have one counts as zero. All of them must call it."""
    import torch.distributed as dist

    size = dist.get_world_size()
    given = [parameter.grad is not None for parameter in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if not gradients:
        return
    torch._foreach_div_(gradients, size)
    anywhere = torch.tensor(given, dtype=torch.float32).to(gradients[0].device, non_blocking=True)
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in (*gradients, anywhere)]:
        work.wait()
    if not all(given):
        for parameter, gradient, has in zip(parameters, gradients, anywhere.tolist()):
            if has and parameter.grad is None:
                parameter.grad = gradient
