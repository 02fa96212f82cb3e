"""One training run, top to bottom, in the order in which it happens.

``fit -> run -> run_epoch -> automatic_step -> closure -> training_step``: everything that a step calls was bound
before the first one (``loops/bind.py``), so that a hook which nobody overrides costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.seed import set_rng_states
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.data import TrainLoader
from lightning.pytorch.dispatch import no_op, override_of, scoped
from lightning.pytorch.loops import bind
from lightning.pytorch.loops.batches import counted, looked_ahead
from lightning.pytorch.loops.evaluate import metrics_held
from lightning.pytorch.loops.progress import FitProgress, Next
from lightning.pytorch.loops.schedulers import Schedulers
from lightning.pytorch.metric_entry import Entry
from lightning.pytorch.trainer.states import RunningStage

if TYPE_CHECKING:
    from lightning.fabric.uneven import Lockstep
    from lightning.pytorch.trainer.trainer import Trainer

UNBOUNDED = float("inf")
CLOSURE_NOT_CALLED = (
    "The optimizer step did not call its closure, which runs training_step and backward: nothing was computed. In `optimizer_step` call "
    "`optimizer.step(closure=optimizer_closure)`, or call `optimizer_closure()` yourself; for full control use manual optimization."
)
RETURNED_NONE = (
    "`training_step` returned None to skip the batch, which several processes cannot do: the others wait for the gradients of this "
    "one. Return a loss that changes nothing, such as `0.0 * loss`."
)


class FitLoop:
    """The training loop.

    Args:
        trainer: whose model is trained. The loop keeps the run's position in ``progress``.
    """

    def __init__(self, trainer: Trainer) -> None:
        config = trainer._config
        self.trainer = trainer
        self.progress = FitProgress()
        self.max_epochs = config.max_epochs
        self.min_epochs = config.min_epochs
        self.max_steps = config.max_steps
        self.min_steps = config.min_steps
        self.loader: TrainLoader | None = None
        self.reading = False  # whether the loader is in the middle of a pass
        self.accumulate = 1
        self.gathered = 0  # batches of the current accumulation window whose gradients are in `.grad`
        self.spent: set[int] = set()  # manual optimization: the ids of the optimizers that stepped since `manual_backward` ran last
        self.stepped: set[int] = set()  # likewise of those that stepped for the current batch, or the one before
        self.runs_backward = False  # manual optimization: whether `manual_backward` is what runs backward
        self.log_step = 0
        self.entries: dict[Any, Entry] = {}
        self.restarting = False
        self.resumed_position: Any = None  # where in the data the resumed checkpoint was saved, for another number of processes
        self.resumed: Any = None  # what the checkpoint holds beside weights and the like, until the run has taken it up
        self.rows_due = False  # whether the checkpoint was saved before the rows of its last batch were sent
        self.configured: Any = None  # the values of the optimizers' groups that `configure_optimizers` gave, in the run that was first
        self.random_states: Any = None  # of the checkpoint, for where its run went on
        self.before_validation: Any = None  # what a validation that is saved half-way begins anew from
        self.before_stop: Any = None  # what the epoch has logged that was ended in the middle, should a later run go on with it
        self.outputs: Any = None
        self.weight = 1.0  # what the current batch counts, where processes have different numbers of them
        self.told_of_minimum = False
        self.several = self.stop_is_agreed = False  # processes; on `trainer.should_stop`
        self.told_of_none = False
        self.recorder: Any = None  # of steps that are replayed

    def __getstate__(self) -> dict[str, Any]:
        return bind.without_bound(self, FitLoop(self.trainer))

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until a bound is reached or somebody asks to stop."""
        p, hooks, metrics = self.progress, self.hooks, self.metrics
        if self.finished():
            return
        run_epoch = bind.profiled(self.trainer, self.run_epoch, "run_training_epoch")
        self.log_step = p.stepped - 1 if p.updates and p.stepped else p.stepped  # that of the batch taken last
        metrics.restart_flush(p.stepped)
        if self.rows_due:
            metrics.flush_at, self.rows_due = p.stepped, False
        with torch.enable_grad(), metrics.collecting(self.entries), bind.guarded(self.guards):
            hooks.on_train_start()
            self.refresh()
            while not self.finished():  # a resumed run is in the middle of one
                self.trainer._data.reload_train_if_due(p.epoch)
                self.loader.set_epoch(p.epoch)  # type: ignore[union-attr]
                run_epoch()
                self.agree_on_stop()
                p.next_epoch()
            self.trainer._signals.finish()  # type: ignore[union-attr]
            self.say_why()
            hooks.on_train_end()

    def run_epoch(self) -> None:
        p, hooks, metrics, trainer = self.progress, self.hooks, self.metrics, self.trainer
        if self.random_states is not None:
            set_rng_states(self.random_states)
            self.random_states = None
        if p.next is Next.BATCH and p.batch_idx == 0:
            self.log_step = p.stepped
            hooks.on_train_epoch_start()
            self.refresh()
            self.agree_on_stop()
            if trainer.should_stop and self.done():
                p.next = Next.EPOCH_END  # without a batch
        self.accumulate, last_step, signals = trainer.accumulate_grad_batches, self.last_step, trainer._signals
        saves = trainer.strategy.checkpoint_io
        assert signals is not None
        if p.ending or p.next is Next.VALIDATE:  # the checkpoint was saved by a hook of a batch's end, or of the validation after it
            self.end_batch()
            p.ending = False
            if p.is_last or self.done():
                p.next = Next.EPOCH_END
        for batch, is_last in self.batches():  # from p.batch_idx, already on the device
            p.is_last = is_last
            metrics.batch, metrics.batch_size = batch, None
            metrics.serial += 1
            self.log_step = p.stepped
            if hooks.on_train_batch_start(batch, p.batch_idx) == -1:
                from lightning.pytorch.loops.together import end_epoch_together

                end_epoch_together(trainer)
                self.schedulers.step_epoch()
                break
            self.step(batch)  # automatic_step or manual_step
            p.batch_idx += 1
            p.total_batches += 1
            if is_last:
                self.schedulers.step_epoch()
            p.next, p.ending = Next.VALIDATE if self.validation_due() else Next.BATCH, True
            hooks.on_train_batch_end(self.outputs, batch, p.batch_idx - 1)
            if trainer.should_stop and self.several and not self.stop_is_agreed:
                trainer.should_stop = False  # until all processes know
                signals.ask_for_stop()
            if signals.pending:
                signals.heed(p.total_batches, metrics.serial)
            if saves.troubled:
                saves.poll()
            if trainer.should_stop and p.next is Next.BATCH and self.validation_due():
                p.next = Next.VALIDATE  # a callback just asked to stop: the last weights are validated too
            if p.next is Next.VALIDATE or p.stepped >= metrics.flush_at or trainer.should_stop or self.schedulers.watch_steps:
                self.end_batch()
            p.ending = False
            self.outputs = metrics.batch = batch = None  # not kept while the next one is fetched and moved
            if p.updates and (trainer.should_stop or p.global_step >= last_step) and self.done():
                break
        self.reading = False
        self.log_step = p.stepped - 1  # also where the epoch had no batch, or its last one was passed over
        # A run that is ended in mid-epoch, and later given more steps, goes on with this epoch's next batch.
        p.next = Next.EPOCH if p.is_last or not self.done() else Next.BATCH
        p.ending, p.stopping = p.next is Next.EPOCH, p.next is Next.BATCH
        if p.stopping:
            from lightning.pytorch.resume import before_stop

            self.before_stop = before_stop(trainer)
        self.close_epoch()
        hooks.on_train_epoch_end()
        metrics.reduce_epoch()  # what these hooks logged
        if p.ending:  # else the epoch is not over
            self.schedulers.step_plateau("epoch")
        p.ending = False
        hooks.on_train_epoch_end_checkpoints()
        self.end_epoch(self.log_step)

    def end_batch(self) -> None:
        """What follows the hooks of a batch's end."""
        p, metrics = self.progress, self.metrics
        # A resumed run, which has no batch yet, has been stopped by the validation after these rows.
        stopping = self.trainer.should_stop and metrics.batch is not None
        if p.stepped >= metrics.flush_at or (stopping and p.updates):
            self.flush(p.stepped, self.log_step, stopping)  # the only device-to-host read
        if p.next is Next.VALIDATE:
            self.run_validation()
            self.agree_on_stop()
        if p.updates:
            self.schedulers.step_plateau("step")

    def agree_on_stop(self) -> None:
        """Where all processes stand at the same point: a stop that one of them asked for is one for all."""
        if self.several:
            self.trainer.should_stop = self.trainer.strategy.reduce_boolean_decision(self.trainer.should_stop, all=False)
            self.stop_is_agreed = self.trainer.should_stop

    def batches(self) -> Iterator[tuple[Any, bool]]:
        """The batches that are left of this epoch, each with whether it is the last."""
        p, loader = self.progress, self.loader
        assert loader is not None
        if p.next is not Next.BATCH or p.batch_idx >= loader.num_batches:
            return iter(())
        source = counted if loader.length_is_exact else looked_ahead
        fetched = bind.fetched(self.trainer, loader.iterable, "[_TrainingEpochLoop].train_dataloader_next")
        self.waits.begin()
        self.reading = True
        batches = source(fetched, p.batch_idx, loader.num_batches, self.prepare, loader.passes_over, self.waits)
        return batches if loader.lockstep is None else self.weighed(batches, loader.lockstep)

    def weighed(self, batches: Iterator[tuple[Any, bool]], lockstep: Lockstep) -> Iterator[tuple[Any, bool]]:
        """The batches of a run whose processes have different numbers of them: those that ran out repeat one that counts nothing."""
        for batch, is_last in batches:
            self.weight = lockstep.weight(self.progress.batch_idx)
            with nullcontext() if self.weight else self.metrics.discarding():
                yield batch, is_last

    # ---- a step -----------------------------------------------------------------------------------------------------

    def automatic_step(self, batch: Any) -> None:
        """Forward, backward and, on the last batch of an accumulation window, the update."""
        p = self.progress
        self.batch = batch
        self.outputs = None
        p.updates = p.is_last or (p.batch_idx + 1) % self.accumulate == 0
        if p.updates:
            self.update(self.closure)  # the user's optimizer_step, or the optimizer's step
            if self.outputs is None:
                raise MisconfigurationException(CLOSURE_NOT_CALLED)
            self.gathered = 0
            p.global_step += 1
            p.stepped += 1
            self.schedulers.step_batch()
        else:
            with self.no_backward_sync():
                self.closure()
        self.batch = None

    def uneven_step(self, batch: Any) -> None:
        """A step on such a batch: a repeated one leaves no trace in batch normalisation and Metrics either."""
        lockstep, module = self.loader.lockstep, self.trainer.lightning_module  # type: ignore[union-attr]
        assert lockstep is not None
        with lockstep.turn(self.progress.batch_idx, module), nullcontext() if self.weight else metrics_held(module):
            self.even_step(batch)

    def closure(self) -> Any:
        """Everything before the update; the optimizer calls it, LBFGS more than once."""
        p, hooks, optimizer = self.progress, self.hooks, self.optimizer
        if self.frees_early and p.batch_idx % self.accumulate == 0:
            self.zero_grad(optimizer)  # so that old gradients take no memory while the new step needs most of it
        self.metrics.scope = "training_step"
        with self.forward_context():
            outputs = self.training_step(self.batch, p.batch_idx)
        loss = outputs if isinstance(outputs, Tensor) else self.loss_of(outputs)
        self.outputs = self.detach(outputs)
        del outputs
        if not self.frees_early and p.batch_idx % self.accumulate == 0:
            hooks.on_before_zero_grad(optimizer)
            self.zero_grad(optimizer)
        if loss is not None:
            if self.accumulate > 1:
                loss = loss / self.window()
            if self.weight != 1:
                loss = loss * self.weight
            hooks.on_before_backward(loss)
            self.gathered = -1  # should backward fail, the gradients are of no use
            self.backward(loss)
            hooks.on_after_backward()
            if p.is_last and self.accumulate > 1:
                self.complete_window()
        self.gathered = p.batch_idx % self.accumulate + 1
        if p.updates and not self.user_steps:
            self.unscale(optimizer)
            hooks.on_before_optimizer_step(optimizer)
            self.clip(optimizer)
        return loss

    def loss_of(self, outputs: Any) -> Tensor | None:
        """The loss in what ``training_step`` returned, where that is no tensor.

        Raises:
            MisconfigurationException: if there is none, and it is not None either.
            RuntimeError: if it is None, and other processes wait for this one's gradients.
        """
        if outputs is None:
            if self.trainer.world_size > 1:
                raise RuntimeError(RETURNED_NONE)
            if not self.told_of_none:
                self.told_of_none = True
                rank_zero_warn("`training_step` returned None: such a batch is skipped. If that is intended, ignore this warning.")
            return None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            return loss
        keys = f"a dict with the keys {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else f"{outputs!r}"
        raise MisconfigurationException(
            f"`training_step` returned {keys}, a {type(outputs).__name__}. In automatic optimization return the loss as a tensor, "
            "a dict with the loss under 'loss', or None to skip the batch."
        )

    def window(self) -> int:
        """The number of batches in the current accumulation window; the epoch's last one may be smaller."""
        index = self.progress.batch_idx
        left = self.loader.num_batches - (index - index % self.accumulate)  # type: ignore[union-attr]
        return min(self.accumulate, int(left)) if left < UNBOUNDED else self.accumulate

    def complete_window(self) -> None:
        """Weigh anew a last window that turned out smaller than assumed, where the loader's length was not known."""
        taken = self.progress.batch_idx % self.accumulate + 1
        if taken != self.window():
            gradients = [q.grad for group in self.optimizer.param_groups for q in group["params"] if q.grad is not None]
            torch._foreach_mul_(gradients, self.window() / taken)

    def manual_step(self, batch: Any) -> None:
        """The user's ``training_step`` does everything."""
        self.metrics.scope = "training_step"
        self.stepped.clear()
        self.progress.updates = True
        with self.forward_context():
            outputs = self.training_step(batch, self.progress.batch_idx)
        self.outputs = self.detach(outputs)
        self.gathered = 0
        self.progress.stepped += 1

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """What ``LightningModule.manual_backward`` runs."""
        self.hooks.on_before_backward(loss)
        if self.weight != 1:
            loss = loss * self.weight
        self.trainer.strategy.pre_backward(loss)
        self.spent.clear()
        self.runs_backward, self.gathered = True, -1  # half a step's gradients are of no use to a checkpoint
        self.backward(loss, *args, **kwargs)
        self.hooks.on_after_backward()

    def user_optimizer_step(self, optimizer: Any, closure: Any, **kwargs: Any) -> Any:
        """What ``optimizer.step(closure)`` runs where the user calls it: in ``optimizer_step``, or in a manual ``training_step``."""
        automatic = self.trainer.lightning_module.automatic_optimization

        def with_hook() -> Any:
            result = closure()
            self.unscale(optimizer)
            self.hooks.on_before_optimizer_step(optimizer)
            if automatic:
                self.clip(optimizer)
            return result

        result = self.trainer.strategy.optimizer_step(optimizer, with_hook, **kwargs)
        if not automatic:
            self.progress.global_step += 1
            self.spent.add(id(optimizer))
            self.stepped.add(id(optimizer))
        return result

    # ---- validation ---------------------------------------------------------------------------------------------------

    def validation_due(self) -> bool:
        """Whether the validation data are run through after this batch."""
        p, trainer = self.progress, self.trainer
        every = self.val_every_n_epoch
        if not self.validates or (every is not None and (p.epoch + 1) % every != 0):
            return False
        if self.val_seconds is not None:
            left = self.val_seconds - (time.monotonic() - self.validated_at)
            return self.val_clock.is_over(trainer.strategy, left, self.val_seconds)
        if trainer.should_stop and (self.stop_is_agreed or not self.several) and p.updates and self.may_stop():
            return True  # the last weights are validated too
        if self.val_every == UNBOUNDED:
            return p.is_last
        return (p.total_batches if every is None else p.batch_idx) % self.val_every == 0

    def validate(self) -> None:
        """Run through the validation data in the middle of, or after, the epoch's batches."""
        if not self.validates:  # any more, in a resumed run
            self.after_validation()
            return
        self.trainer._data.reload_val_if_due(self.progress.epoch)
        from lightning.pytorch.resume import before_validation

        self.before_validation = before_validation(self.trainer)
        if self.window_is_over():
            with self.trainer._in_stage(RunningStage.VALIDATING):
                self.free_gradients()
        began = time.perf_counter()
        self.trainer.validate_loop.run(finishing=self.after_validation)
        self.validated_at = time.monotonic()
        self.waits.elsewhere += time.perf_counter() - began

    def window_is_over(self) -> bool:
        """Whether there are gradients, and none that a step is still to use."""
        if self.trainer.lightning_module.automatic_optimization:
            return self.progress.updates and self.metrics.batch is not None  # a resumed run has none yet
        # One that steps for each batch has no window, whoever's backward has reached its weights since.
        return all(id(optimizer) in self.stepped for optimizer in self.trainer.strategy.optimizers)

    def after_validation(self) -> None:
        """From here on a checkpoint says that this validation is done."""
        self.progress.next = Next.EPOCH_END if self.progress.is_last else Next.BATCH
        self.before_validation = None

    # ---- the end --------------------------------------------------------------------------------------------------------

    @property
    def last_step(self) -> float:
        """The bound on optimizer steps."""
        return UNBOUNDED if self.max_steps == -1 else self.max_steps

    def finished(self) -> bool:
        """Whether no further epoch begins, and none is to be ended: a resumed run may be between its last batch and its end."""
        if self.progress.ending or self.progress.next in (Next.VALIDATE, Next.EPOCH_END):
            return False
        bounded = self.max_epochs is not None and self.max_epochs != -1
        return (bounded and self.progress.epoch >= self.max_epochs) or self.done()  # type: ignore[operator]

    def done(self) -> bool:
        """Whether training ends here: the last step is taken, or somebody asked to stop and the minimum is reached."""
        if self.progress.global_step >= self.last_step:
            return True
        if self.trainer.should_stop:
            if self.may_stop():
                return True
            if any(callback.stopping_reason.value for callback in self.trainer.early_stopping_callbacks):
                self.trainer.should_stop = self.stop_is_agreed = False  # early stopping decides anew once the minimum is reached
            if not self.told_of_minimum:
                self.told_of_minimum = True
                minimum = f"min_epochs={self.min_epochs} or min_steps={self.min_steps}"
                rank_zero_info(f"A stop was asked for, but {minimum} is not reached: training goes on.")
        return False

    def say_why(self) -> None:
        """Tell which bound ended the run."""
        if self.progress.global_step >= self.last_step:
            rank_zero_info(f"`Trainer.fit` stopped: `max_steps={self.max_steps}` reached.")
        elif not self.trainer.should_stop:
            rank_zero_info(f"`Trainer.fit` stopped: `max_epochs={self.max_epochs}` reached.")

    def may_stop(self) -> bool:
        """Whether the minimum of epochs and steps is reached."""
        p = self.progress
        epochs = p.epoch + (1 if p.is_last and p.batch_idx > 0 else 0)
        return epochs >= (self.min_epochs or 0) and p.global_step >= (self.min_steps or 0)

    # ---- before the first step --------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Resolve everything that a step calls."""
        trainer, config = self.trainer, self.trainer._config
        self.hooks, self.metrics = trainer._hooks, trainer._metrics
        self.metrics.progress = self.progress
        self.progress.start_anew()
        self.resumed = self.resumed_position = self.random_states = self.before_validation = self.before_stop = None
        self.rows_due = self.runs_backward = self.reading = False
        self.gathered = 0
        self.spent.clear()
        self.stepped.clear()
        self.accumulate = trainer.accumulate_grad_batches
        self.forward_context = bind.forward_context(trainer, "train")
        self.no_backward_sync = trainer.strategy.no_backward_sync
        automatic = trainer.lightning_module.automatic_optimization
        step: Callable[[Any], None] = self.automatic_step if automatic else self.manual_step
        self.even_step = bind.profiled(trainer, step, "run_training_batch")
        self.detach = bind.detach_outputs if automatic else bind.detach_manual_outputs
        self.several, self.stop_is_agreed = trainer._signals is not None and trainer._signals.listens, False
        self.val_every_n_epoch = config.check_val_every_n_epoch
        self.val_seconds = config.val_check_seconds
        self.validated_at = time.monotonic()
        if self.val_seconds is not None:
            from lightning.pytorch.clock import SharedClock

            self.val_clock = SharedClock()
        self.guards = bind.guards(trainer, self)
        self.waits = bind.waits(trainer)
        self.run_validation = bind.profiled(trainer, self.validate, "run_validation")
        steps = (self.metrics.flush, self.metrics.close_epoch, self.metrics.end_epoch)
        self.flush, self.close_epoch, self.end_epoch = (bind.profiled(trainer, step, "log_metrics") for step in steps)
        self.bind_overrides()

    def bind_overrides(self) -> None:
        """Resolve what the user may override; hooks that are set in mid-run make it necessary again."""
        trainer, module = self.trainer, self.trainer.lightning_module
        self.prepare = bind.transfer(trainer)
        self.training_step = bind.training_step(trainer)
        self.backward = bind.backward(trainer)
        self.schedulers = Schedulers(trainer, self)
        self.unscale = bind.unscale(trainer)
        self.free_gradients = scoped(module.on_validation_model_zero_grad, "on_validation_model_zero_grad", self.metrics)
        self.user_steps = not module.automatic_optimization or override_of(module, "optimizer_step", LightningModule) is not None
        if module.automatic_optimization:
            self.optimizer = trainer.strategy.optimizers[0]
            self.update = bind.update(trainer, self)
            self.zero_grad = bind.zero_grad(trainer, self)
            self.frees_early = self.hooks.on_before_zero_grad is no_op and bind.zeroes_plainly(trainer)
            self.clip = bind.clip(trainer)
        for guard in self.guards:
            guard.wrap(self)

    def refresh(self) -> None:
        """Follow the callbacks that came or went in mid-run, and the hooks that were set on the module."""
        if self.hooks.refresh(self.trainer.callbacks):
            self.bind_overrides()

    def bound(self) -> None:
        """Bound the run by 1,000 epochs if nothing else bounds it; a minimum of steps alone means that of an epoch too."""
        if self.min_epochs is None:
            self.min_epochs = 0 if self.min_steps is None else 1
        if self.max_epochs is not None:
            return
        if self.max_steps == -1 and self.trainer.max_time is None:
            rank_zero_warn(
                "`max_epochs` was not set, so the run ends after 1000 epochs. For a run without a bound, set `max_epochs=-1`.",
                category=PossibleUserWarning,
            )
            self.max_epochs = 1000
        else:
            self.max_epochs = -1

    def set_loader(self, loader: TrainLoader, validates: bool) -> None:
        """Take the training data, and decide how often they are interrupted by validation."""
        self.loader = loader
        self.weight = 1.0
        self.step: Callable[[Any], None] = self.even_step if loader.lockstep is None else self.uneven_step
        self.validates = validates
        self.val_every = val_check_batches(self.trainer._config, loader.num_batches) if validates else UNBOUNDED


def val_check_batches(config: Any, num_batches: float) -> float:
    """Every how many batches validation is due; infinity means at the end of the epoch.

    Raises:
        ValueError: if the interval is longer than the epoch.
        MisconfigurationException: for a fraction of an epoch of unknown length.
    """
    interval = config.val_check_interval
    if isinstance(interval, int):
        if interval > num_batches and config.check_val_every_n_epoch is not None:
            raise ValueError(
                f"val_check_interval={interval} is more than the {num_batches} training batches of an epoch, so it would never validate. "
                "To count batches across epochs, set check_val_every_n_epoch=None."
            )
        return interval
    if interval == 1.0:
        return UNBOUNDED  # with the last batch, whichever it turns out to be
    if num_batches == UNBOUNDED:
        raise MisconfigurationException(
            f"val_check_interval={interval} is a fraction of an epoch, and the training loader has no length. "
            "Give 1.0, or a number of batches."
        )
    return max(1, int(num_batches * interval))
