"""One call of fit, validate, test or predict: what happens before, after, and when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch import checkpoint as ckpt
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer, configure_optimizers
from lightning.pytorch.data import TrainLoader, end_workers
from lightning.pytorch.delivery import describe
from lightning.pytorch.dispatch import Hooks, check_names, override_of, sorted_callbacks
from lightning.pytorch.loops.bind import profiled
from lightning.pytorch.trainer import checks
from lightning.pytorch.trainer.position import position_of
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

# Whose frames hold iterators, and nothing that anybody would look for in an error.
OWN_CODE = (str(Path(__file__).parents[2]), str(Path(torch.utils.data.__file__).parent))

STAGES = {
    TrainerFn.FITTING: RunningStage.TRAINING,
    TrainerFn.VALIDATING: RunningStage.VALIDATING,
    TrainerFn.TESTING: RunningStage.TESTING,
    TrainerFn.PREDICTING: RunningStage.PREDICTING,
}


@contextmanager
def running(
    trainer: Trainer,
    function: TrainerFn,
    module: LightningModule,
    datamodule: Any,
    ckpt_path: Any,
    weights_only: bool | None,
    model_given: bool,
) -> Iterator[None]:
    """Everything around the loop of one call, in the order in which it happens.

    Inside the context the loop runs; whatever fails, callbacks hear of it, loggers are closed, and the device is freed. The first
    error is what the caller gets: what fails after it is a note of it, and a warning.
    """
    from lightning.pytorch.loops.memory_report import explained  # now: when memory has run out, there may be none for an import

    state = trainer.state
    state.fn, state.status, state.stage = function, TrainerStatus.RUNNING, STAGES[function]
    trainer.should_stop = False
    try:
        from lightning.pytorch.ckpt_path import go_on_logging, path_for_all

        attach(trainer, module, datamodule)
        if fits_with_graphs(trainer):
            from lightning.pytorch.loops.compiling import check_graphs

            check_graphs(trainer)
        meet(trainer)
        path = trainer._ckpt_path = path_for_all(trainer, ckpt_path, model_given)
        trainer._goes_on = ckpt_path == "auto" and path is not None
        if trainer._goes_on:
            go_on_logging(trainer, path)
        with ExitStack() as contexts:
            if (options := trainer._config.compile_options) is not None:
                from lightning.pytorch.loops.compiling import compiled_steps

                contexts.enter_context(compiled_steps(trainer, options))
            if fits_with_graphs(trainer):
                from lightning.pytorch.loops.compiling import graphs_of_steps

                contexts.enter_context(graphs_of_steps(trainer))
            set_up(trainer, path, weights_only)
            if trainer._config.detect_anomaly:
                contexts.enter_context(torch.autograd.set_detect_anomaly(True))
            contexts.enter_context(boundaries(trainer))
            yield
        finish(trainer)
    except BaseException as error:
        told = explained(trainer, error)  # an error of memory says more, as long as everything is still there
        fail(trainer, told)
        if told is not error:
            raise told from error
        raise
    state.status, state.stage = TrainerStatus.FINISHED, None
    if (late := stop_listening(trainer)) is not None:
        raise late  # a signal came when the run was all but over; the script shall end all the same


# ---- before ---------------------------------------------------------------------------------------------------------


def attach(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None) -> None:
    """Bring trainer, module, datamodule and callbacks together, and check that they fit."""
    strategy = trainer.strategy
    trainer.datamodule = datamodule
    metrics = trainer._metrics
    metrics.start(trainer.fit_loop.entries, trainer.validate_loop.entries, trainer.test_loop.entries)
    metrics.every = 1 if trainer.fast_dev_run else trainer.log_every_n_steps
    metrics.disabled = trainer.barebones
    metrics.send_to(trainer.loggers)
    if trainer.state.fn is TrainerFn.FITTING or strategy.lightning_module is not module:
        # A model that is only evaluated keeps them: a checkpoint saved then holds what a resumed fit needs.
        strategy.optimizers, strategy.lr_scheduler_configs, strategy._lightning_optimizers = [], [], []
    strategy.connect(module)
    module.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer
    add_configured_callbacks(trainer, module)
    check_names(module, datamodule, trainer.callbacks)
    checks.check_run(trainer)


def add_configured_callbacks(trainer: Trainer, module: LightningModule) -> None:
    """Take the callbacks that the model brings; they replace the trainer's of the same type.

    Raises:
        MisconfigurationException: if it brings anything else.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    given: Any = module.configure_callbacks()
    brought = list(given) if isinstance(given, (list, tuple)) else [given] if given else []
    wrong = [callback for callback in brought if not isinstance(callback, Callback)]
    if wrong:
        raise MisconfigurationException(f"`configure_callbacks` returned {wrong!r}; return a Callback, or a list of them.")
    if brought:
        types = {type(callback) for callback in brought}
        replaced = [callback for callback in trainer.callbacks if type(callback) in types]
        if replaced:
            names = sorted({type(callback).__name__ for callback in replaced})
            rank_zero_info(f"The callbacks of `configure_callbacks` replace the trainer's own {', '.join(names)}.")
        trainer.callbacks = [callback for callback in trainer.callbacks if callback not in replaced] + brought
    trainer.callbacks = sorted_callbacks(trainer.callbacks)
    for callback in trainer.callbacks:  # `self.log` works in callbacks too
        callback.log, callback.log_dict = module.log, module.log_dict  # type: ignore[attr-defined]
    checks.check_state_keys(trainer.callbacks)


def meet(trainer: Trainer) -> None:
    """Make the device ready, and meet the other processes."""
    strategy = trainer.strategy
    strategy.setup_environment()
    if strategy.accelerator is not None:
        strategy.accelerator.setup(trainer)
    if strategy.is_distributed:
        strategy.watch(partial(position_of, trainer))


def set_up(trainer: Trainer, path: Any, weights_only: bool | None) -> None:
    """Data, hooks, model, weights, optimizers: ready for the first batch."""
    strategy, module = trainer.strategy, trainer.lightning_module
    fitting = trainer.state.fn is TrainerFn.FITTING
    listen(trainer)
    trainer._metrics.strategy, trainer._metrics.module = strategy if strategy.is_distributed else None, module
    if trainer._profiler is not None:
        rank = trainer.local_rank if trainer.world_size > 1 else None
        trainer._profiler.setup(stage=trainer.state.fn, local_rank=rank, log_dir=trainer.log_dir)
        trainer._profiler._attach(trainer)
    prepare_data(trainer)
    heed(trainer)
    for logger in trainer.loggers:
        trainer._metrics.delivery.begin(logger)  # its experiment, which hooks may use
    call_stage_hooks(trainer, "setup")
    heed(trainer)
    with strategy.module_init_context(), strategy.model_sharded_context():
        module.configure_model()
        if override_of(module, "configure_sharded_model", LightningModule) is not None:
            module.configure_sharded_model()
    module.trainer = trainer  # modules inside it that were made just now log too
    checkpoint = None
    if path is not None:
        rank_zero_info(f"Restoring states from the checkpoint path at {path}")
        checkpoint = strategy.load_checkpoint(path, weights_only=weights_only)
        checkpoint = checks.migrated(checkpoint, path)
        if not strategy.restore_checkpoint_after_setup:
            ckpt.restore_modules(trainer, checkpoint)
    strategy.expect_engine_state((checkpoint or {}).get("keraunos", {}).get("engine", {}))
    strategy.setup(trainer)
    if fitting:
        trainer.fit_loop.configured = ckpt.values_of_groups(trainer.optimizers)  # before an engine restores its own
    if trainer.enable_autolog_hparams and trainer.loggers:
        from lightning.pytorch.loggers.utilities import log_hyperparams

        log_hyperparams(trainer, trainer._metrics.delivery.begin)  # with the model's graph, in the precision that it now has
    trainer._hooks = Hooks(trainer, module, trainer.callbacks, trainer._metrics, trainer._profiler)
    if checkpoint is not None and strategy.restore_checkpoint_after_setup:
        ckpt.restore_modules(trainer, checkpoint)
    if fitting:
        trainer.fit_loop.bind()
        trainer._hooks.on_fit_start()
        trainer.fit_loop.refresh()
        if checkpoint is not None:
            ckpt.restore_training(trainer, checkpoint)
    if checkpoint is not None:
        ckpt.announce(path, fitting)


def listen(trainer: Trainer) -> None:
    """Take note of signals that ask for a stop, from here to the end of the run."""
    from lightning.pytorch.trainer.stopping import signals_of

    trainer._signals = signals_of(trainer)
    trainer._signals.install()


def fits_with_graphs(trainer: Trainer) -> bool:
    """Whether this is a fit whose steps are recorded."""
    return trainer.state.fn is TrainerFn.FITTING and bool((trainer._config.compile or {}).get("step"))


@contextmanager
def boundaries(trainer: Trainer) -> Iterator[None]:
    """Where boundaries between batches come, at which a signal can end the run; the first of them is here."""
    from lightning.pytorch.trainer.stopping import blamed_on_signal

    with blamed_on_signal(trainer):
        heed(trainer)
        trainer._signals.in_loop = True  # type: ignore[union-attr]
        yield


def heed(trainer: Trainer) -> None:
    """Heed a signal before the first batch."""
    signals = trainer._signals
    if signals is not None and signals.pending:
        signals.heed(trainer.fit_loop.progress.total_batches, trainer._metrics.serial)


def stop_listening(trainer: Trainer) -> BaseException | None:
    """Give the signals back to those that had them before; returns what one means that has come too late to end the run before its time."""
    from lightning.pytorch.trainer.stopping import error_of

    signals, trainer._signals = trainer._signals, None
    number = signals.restore() if signals is not None else None
    return None if number is None else error_of(number)


def prepare_data(trainer: Trainer) -> None:
    """Call ``prepare_data`` of module and datamodule, in one process."""
    for owner in (trainer.datamodule, trainer.lightning_module):
        if owner is not None and (trainer.is_global_zero or (owner.prepare_data_per_node and trainer.local_rank == 0)):
            with in_scope(trainer, "prepare_data"):
                owner.prepare_data()
    trainer.strategy.barrier("prepare_data")


@contextmanager
def in_scope(trainer: Trainer, name: str) -> Iterator[None]:
    """Tell ``self.log`` which hook runs, so that its error can name it."""
    metrics = trainer._metrics
    outer, metrics.scope = metrics.scope, name
    try:
        yield
    finally:
        metrics.scope = outer


def call_stage_hooks(trainer: Trainer, name: str) -> None:
    """Call ``setup`` or ``teardown`` of datamodule, callbacks and module."""
    stage = trainer.state.fn
    assert stage is not None
    module, datamodule = trainer.lightning_module, trainer.datamodule
    calls: list[Any] = []
    if datamodule is not None:
        calls.append(profiled(trainer, getattr(datamodule, name), f"[LightningDataModule]{type(datamodule).__name__}.{name}"))
    for callback in trainer.callbacks:
        call = profiled(trainer, getattr(callback, name), f"[Callback]{callback.state_key}.{name}")
        calls.append(partial(call, trainer, module))
    calls.append(profiled(trainer, getattr(module, name), f"[LightningModule]{type(module).__name__}.{name}"))
    with in_scope(trainer, name):
        for index, call in enumerate(calls):
            try:
                call(stage=stage)
            except BaseException as error:
                if name == "teardown":  # the others free what they hold all the same
                    for other in calls[index + 1 :]:
                        attempt(error, other, stage=stage)
                raise


def set_up_optimizers(trainer: Trainer) -> None:
    """Ask the module for optimizers and schedulers."""
    strategy, module, loop = trainer.strategy, trainer.lightning_module, trainer.fit_loop
    with in_scope(trainer, "configure_optimizers"):
        configured = profiled(trainer, configure_optimizers, f"[LightningModule]{type(module).__name__}.configure_optimizers")
        optimizers, configs = configured(module)
    checks.check_optimizers(module, optimizers)
    strategy.prepare_training(trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
    strategy.optimizers = strategy.wrap_optimizers(optimizers, configs)
    strategy.lr_scheduler_configs = configs
    strategy._lightning_optimizers = [LightningOptimizer(optimizer, loop.user_optimizer_step, module) for optimizer in strategy.optimizers]


# ---- after ----------------------------------------------------------------------------------------------------------


def finish(trainer: Trainer) -> None:
    """The hooks of the end, then free everything."""
    if trainer.state.fn is TrainerFn.FITTING:
        trainer._hooks.on_fit_end()
    trainer._signals.finish()  # type: ignore[union-attr]
    call_stage_hooks(trainer, "teardown")
    trainer.strategy.checkpoint_io.wait()
    trainer._metrics.close()
    for logger in trainer.loggers:
        attempt(None, trainer._metrics.delivery.finalize, logger, "success")
    if trainer._profiler is not None:
        trainer._profiler.describe()
        trainer._profiler.teardown(stage=trainer.state.fn)
    trainer.strategy.teardown()
    free_loaders(trainer)


def fail(trainer: Trainer, error: BaseException) -> None:
    """Let everybody know, and free everything; the error that ended the run is what the user sees."""
    trainer.state.status = TrainerStatus.INTERRUPTED
    if trainer.strategy.is_distributed:
        from lightning.fabric.launchers.failures import report_failure

        attempt(error, report_failure, error)  # first of all: the other processes are waiting for this one
        attempt(error, trainer.strategy.on_exception, error)
    attempt(error, stop_listening, trainer)
    module, metrics = trainer.strategy.lightning_module, trainer._metrics
    if isinstance(error, KeyboardInterrupt):
        rank_zero_info("Interrupted: the run ends here, and everything is closed.")
    if module is not None and module.__dict__.get("_trainer") is trainer:
        for callback in trainer.callbacks:
            attempt(error, callback.on_exception, trainer, module, error)
    if trainer.datamodule is not None:
        attempt(error, trainer.datamodule.on_exception, error)
    attempt(error, metrics.close)
    attempt(error, metrics.delivery.abandon)  # where the user did not want to wait for the loggers
    metrics.entries, metrics.scope, metrics.batch, trainer.state.stage = None, None, None, None
    for logger in trainer.loggers:
        attempt(error, metrics.delivery.finalize, logger, "failed")
    if trainer._profiler is not None:
        attempt(error, trainer._profiler.teardown, stage=trainer.state.fn)
    attempt(error, trainer.strategy.teardown)
    attempt(error, free_loaders, trainer)
    attempt(error, free_frames, error)


def attempt(cause: BaseException | None, action: Any, *args: Any, **kwargs: Any) -> None:
    """Do something at the end of a run; if it fails, that is told, and the rest of the end happens all the same.

    Args:
        cause: why the run ends: gets a note of the error. None if there is no error.
        action: what is to be done, with its arguments.
        args: the positional ones.
        kwargs: the named ones.
    """
    try:
        action(*args, **kwargs)
    except BaseException as second:
        if second is cause:  # a hook that has raised again what it was told
            return
        if cause is None and not isinstance(second, Exception):  # Ctrl-C
            raise
        action = getattr(action, "func", action)  # of a partial
        name = f"{type(args[0]).__name__}.finalize" if "finalize" in str(action) else getattr(action, "__qualname__", repr(action))
        when = f"ended by {type(cause).__name__}" if cause is not None else "closed"
        text = f"While the run was being {when}, {name} raised {describe(second)}"
        if cause is not None:
            add_note(cause, text)
        with suppress(Warning):  # where warnings are errors
            rank_zero_warn(text)


def add_note(error: BaseException, text: str) -> None:
    """Have a text printed below the error; Python 3.10 keeps it, and does not print it."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), text]


def free_loaders(trainer: Trainer) -> None:
    """End the worker processes of the run's loaders, persistent ones too."""
    for stage in trainer._data.loaded.values():
        end_workers(stage.parts if isinstance(stage, TrainLoader) else stage.sources)


def free_frames(error: BaseException) -> None:
    """Let go of what the loops' frames hold, as long as somebody keeps the error: iterators with worker processes, and batches."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        place = cause.__traceback__
        while place is not None:
            if place.tb_frame.f_code.co_filename.startswith(OWN_CODE):
                with suppress(RuntimeError):  # still running
                    place.tb_frame.clear()
            place = place.tb_next
        cause = cause.__cause__ or cause.__context__
