"""The parts that a trainer brings when nobody gives them, and the steps between its arguments and its loops."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.dispatch import sorted_callbacks
from lightning.pytorch.loops import bind
from lightning.pytorch.trainer import checks
from lightning.pytorch.trainer.config import TrainerConfig, as_list
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

if TYPE_CHECKING:
    from lightning.fabric.runtime import Runtime
    from lightning.pytorch.core.module import LightningModule
    from lightning.pytorch.trainer.attributes import TrainerAttributes
    from lightning.pytorch.trainer.trainer import Trainer


def loggers(config: TrainerConfig, given: Any) -> list[Any]:
    """The loggers: those given, the default one, or none.

    Raises:
        MisconfigurationException: for anything that is no logger.
    """
    from lightning.pytorch.loggers.logger import DummyLogger, Logger

    if given is False or config.barebones:
        return []
    if config.fast_dev_run:
        return [DummyLogger()]
    if given is None or given is True:
        return [_default_logger(config)]
    found = as_list("logger", given)
    wrong = [logger for logger in found if not isinstance(logger, Logger)]
    if wrong:
        raise MisconfigurationException(f"logger={given!r}: accepted are a Logger, a list of them, True, False, or None.")
    return found


def _default_logger(config: TrainerConfig) -> Any:
    if find_spec("tensorboard") is not None or find_spec("tensorboardX") is not None:
        from lightning.pytorch.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(save_dir=config.default_root_dir)
    from lightning.pytorch.loggers.csv_logs import CSVLogger

    rank_zero_info("tensorboard is not installed, so metrics go to a CSV file. For TensorBoard: pip install tensorboard")
    return CSVLogger(save_dir=config.default_root_dir)


def callbacks(
    config: TrainerConfig, given: Any, checkpointing: bool | None, progress_bar: bool | None, summary: bool | None
) -> list[Callback]:
    """The callbacks: those given, then checkpoint, progress bar and summary where they are wanted and missing.

    Raises:
        MisconfigurationException: for anything that is no callback, or two that contradict each other.
    """
    found: list[Callback] = as_list("callbacks", given)
    wrong = [callback for callback in found if not isinstance(callback, Callback)]
    if wrong:
        raise MisconfigurationException(f"callbacks={given!r}: accepted are a Callback, or a list of them; {wrong[0]!r} is none.")
    plain = config.barebones
    checkpointing, progress_bar, summary = (
        False if plain else flag is None or bool(flag) for flag in (checkpointing, progress_bar, summary)
    )
    _add_timer(found, config)
    _add_checkpoint(found, config, checkpointing)
    _add_progress_bar(found, progress_bar, plain)
    _add_summary(found, summary)
    checks.check_state_keys(found)
    return sorted_callbacks(found)


def _add_checkpoint(found: list[Callback], config: TrainerConfig, wanted: bool) -> None:
    has = any(isinstance(callback, Checkpoint) for callback in found)
    if has and not wanted:
        raise MisconfigurationException(
            "enable_checkpointing=False was given together with a checkpoint callback. Leave one of them out."
            if not config.barebones
            else "barebones=True was given together with a checkpoint callback. Leave one of them out."
        )
    if wanted and not has:
        from lightning.pytorch.callbacks.model_checkpoint import ModelCheckpoint

        found.append(ModelCheckpoint())


def _add_progress_bar(found: list[Callback], wanted: bool, barebones: bool) -> None:
    from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar

    bars = [callback for callback in found if isinstance(callback, ProgressBar)]
    if len(bars) > 1:
        raise MisconfigurationException(f"callbacks holds {len(bars)} progress bars; the trainer shows one. Keep one of them.")
    if bars and not wanted:
        flag = "barebones=True" if barebones else "enable_progress_bar=False"
        raise MisconfigurationException(f"{flag} was given together with the progress bar {type(bars[0]).__name__}. Leave one of them out.")
    if wanted and not bars:
        if find_spec("rich") is not None:
            from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBar

            found.append(RichProgressBar())
        else:
            from lightning.pytorch.callbacks.progress.tqdm_progress import TQDMProgressBar

            found.append(TQDMProgressBar())


def _add_summary(found: list[Callback], wanted: bool) -> None:
    from lightning.pytorch.callbacks.model_summary import ModelSummary

    if not wanted or any(isinstance(callback, ModelSummary) for callback in found):
        return
    if find_spec("rich") is not None:
        from lightning.pytorch.callbacks.rich_model_summary import RichModelSummary

        found.append(RichModelSummary())
    else:
        found.append(ModelSummary())


def _add_timer(found: list[Callback], config: TrainerConfig) -> None:
    if config.max_time is None:
        return
    from lightning.pytorch.callbacks.timer import Timer

    if any(isinstance(callback, Timer) for callback in found):
        rank_zero_info("max_time is ignored: callbacks holds a Timer already.")
        return
    found.append(Timer(duration=config.max_time, interval="step"))


def profiler(given: Any) -> Any:
    """The profiler, None for none.

    Raises:
        MisconfigurationException: for a name that is not known.
    """
    from lightning.pytorch.profilers.profiler import Profiler

    if given is None:
        return None
    if isinstance(given, Profiler):
        from lightning.pytorch.profilers.base import PassThroughProfiler

        return None if type(given) is PassThroughProfiler else given
    if isinstance(given, str) and given.lower() == "simple":
        from lightning.pytorch.profilers.simple import SimpleProfiler

        return SimpleProfiler()
    if isinstance(given, str) and given.lower() == "epoch":
        from lightning.pytorch.profilers.epoch import EpochTimes

        return EpochTimes()
    raise MisconfigurationException(f"profiler={given!r}: accepted are 'simple', 'epoch', an instance of Profiler, or None.")


def announce(runtime: Runtime) -> None:
    """Say what the trainer runs on, and which GPUs it leaves idle."""
    from lightning.fabric.accelerators.cuda import CUDAAccelerator, num_cuda_devices
    from lightning.fabric.accelerators.mps import MPSAccelerator

    used = len(runtime.devices)
    gpus = num_cuda_devices() + (1 if MPSAccelerator.is_available() else 0)
    idle = gpus > 0 and not isinstance(runtime.accelerator, (CUDAAccelerator, MPSAccelerator))
    rank_zero_info(
        f"{type(runtime.accelerator).__name__}: {used} device{'s' if used != 1 else ''} of this machine used. GPUs available: {gpus}"
        + (", none of them used: for these, give accelerator='gpu'." if idle else ".")
    )


def set_determinism(config: TrainerConfig) -> None:
    """Set torch's switches for reproducible, or for tuned, algorithms where that was asked for."""
    if config.deterministic is not None:
        warn_only = config.deterministic == "warn"
        torch.use_deterministic_algorithms(bool(config.deterministic), warn_only=warn_only)
        if config.deterministic:
            # cuBLAS is deterministic only with this workspace, which must be set before its first use.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    benchmark = config.benchmark
    if benchmark and config.deterministic is True:
        rank_zero_warn("benchmark=True may choose another algorithm in each run, which deterministic=True is meant to prevent.")
    if benchmark is None and config.deterministic:
        benchmark = False
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark


def datamodule_first(loaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """A datamodule may be passed in the place of loaders."""
    if isinstance(loaders, LightningDataModule):
        if datamodule is not None:
            raise MisconfigurationException("Two datamodules were passed, one of them in the place of the loaders. Pass one.")
        return None, loaders
    return loaders, datamodule


def module_or_last(trainer: Trainer, model: Any, function: TrainerFn) -> LightningModule:
    """The model that was passed, or that of the last run.

    Raises:
        TypeError: if there is neither.
    """
    if model is not None:
        return checks.check_model(model, function.value)
    if trainer.lightning_module is None:
        raise TypeError(f"`Trainer.{function.value}()` needs a model: pass one, since this trainer has not run any yet.")
    return trainer.lightning_module


def replace_optimizers(trainer: TrainerAttributes, optimizers: Sequence[Optimizer]) -> None:
    """Take other optimizers than those of ``configure_optimizers``; in the middle of a fit the next step takes them."""
    strategy, loop, module = trainer.strategy, trainer.fit_loop, trainer.lightning_module
    fitting = trainer.state.fn is TrainerFn.FITTING and bool(strategy._lightning_optimizers)
    strategy.optimizers = list(optimizers)
    strategy._lightning_optimizers = [LightningOptimizer(optimizer, loop.user_optimizer_step, module) for optimizer in optimizers]
    if fitting and module.automatic_optimization:
        checks.check_optimizers(module, strategy.optimizers)
        loop.optimizer = strategy.optimizers[0]
        loop.update = bind.update(loop.trainer, loop)
        loop.zero_grad = bind.zero_grad(loop.trainer, loop)


def ready_to_fit(trainer: Trainer) -> bool:
    """Run the sanity check, then ask for the training data; False if there is nothing to train on."""
    from lightning.pytorch.resume import take_up, take_up_data

    loop, config, data = trainer.fit_loop, trainer._config, trainer._data
    validates = trainer.enable_validation
    checks.check_storable(trainer)
    if validates and config.num_sanity_val_steps > 0 and not loop.restarting:
        sanity_check(trainer)
    loop.restarting = False
    take_up(trainer)
    _warn_of_eval_mode(trainer.lightning_module)
    if config.limit_train_batches == 0:
        rank_zero_info("Nothing to train: limit_train_batches is 0.")
        return False
    loop.set_loader(data.train(), validates)
    if loop.resumed_position is not None and loop.progress.batch_idx > 0:
        data.rest_of_epoch(loop.resumed_position)
    loop.resumed_position = None
    if loop.finished():
        return False
    if validates:
        data.evaluation("val")
    take_up_data(trainer)
    checks.check_place(loop.progress, loop.loader)
    trainer.validate_loop.limit = float("inf")
    return loop.loader is not None and loop.loader.num_batches > 0


def _warn_of_eval_mode(module: LightningModule) -> None:
    evaluating = sum(not submodule.training for submodule in module.modules())
    if evaluating:
        rank_zero_warn(
            f"{evaluating} module(s) are in evaluation mode at the start of training, and stay so: freezing them may be intended. "
            "If not, call `train()` on them.",
            category=PossibleUserWarning,
        )


def sanity_check(trainer: Trainer) -> None:
    """Run a few validation batches, and leave no trace of them: neither metrics nor random numbers drawn."""
    from lightning.pytorch.utilities.seed import isolate_rng

    hooks, metrics = trainer._hooks, trainer._metrics
    with isolate_rng(), trainer._in_stage(RunningStage.SANITY_CHECKING):
        hooks.on_sanity_check_start()
        trainer.validate_loop.limit = trainer.num_sanity_val_steps
        metrics.muted = True
        try:
            trainer.validate_loop.run()
        finally:
            metrics.muted = False
        hooks.on_sanity_check_end()
    metrics.clear()
