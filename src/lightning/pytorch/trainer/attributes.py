"""The trainer's documented attributes: what callbacks, modules and users read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning.pytorch.callbacks.checkpoint import Checkpoint
from lightning.pytorch.trainer.config import CHECKS, changed
from lightning.pytorch.trainer.states import RunningStage, TrainerState, TrainerStatus

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.precision import Precision
    from lightning.fabric.runtime import Runtime
    from lightning.fabric.strategies.strategy import Strategy
    from lightning.pytorch.callbacks.callback import Callback
    from lightning.pytorch.callbacks.early_stopping import EarlyStopping
    from lightning.pytorch.core.datamodule import LightningDataModule
    from lightning.pytorch.core.module import LightningModule
    from lightning.pytorch.data import RunData
    from lightning.pytorch.loops.evaluate import EvaluationLoop
    from lightning.pytorch.loops.fit import FitLoop
    from lightning.pytorch.loops.predict import PredictionLoop
    from lightning.pytorch.metrics import Metrics
    from lightning.pytorch.trainer.config import TrainerConfig
    from lightning.pytorch.utilities.types import LRSchedulerConfig

TRAIN, SANITY, VALIDATE = RunningStage.TRAINING, RunningStage.SANITY_CHECKING, RunningStage.VALIDATING
TEST, PREDICT = RunningStage.TESTING, RunningStage.PREDICTING


class TrainerAttributes:
    """The part of :class:`Trainer` that only answers questions."""

    _config: TrainerConfig
    _runtime: Runtime
    _metrics: Metrics
    _data: RunData
    _profiler: Any
    _ckpt_path: Any
    _goes_on: bool  # whether this is the same run, continued by ckpt_path="auto": the files in its folders are its own
    state: TrainerState
    callbacks: list[Callback]
    fit_loop: FitLoop
    validate_loop: EvaluationLoop
    test_loop: EvaluationLoop
    predict_loop: PredictionLoop
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    should_stop: bool
    datamodule: LightningDataModule | None
    _loggers: list[Any]
    # Arguments of the constructor; properties at the end of this file.
    fast_dev_run: int
    limit_train_batches: float
    limit_val_batches: float
    limit_test_batches: float
    limit_predict_batches: float
    overfit_batches: float
    val_check_interval: float
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: float
    log_every_n_steps: int
    reload_dataloaders_every_n_epochs: int
    barebones: bool
    max_time: Any

    # ---- where it runs ----------------------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy:
        """How the work is laid out over devices."""
        return self._runtime.strategy

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self._runtime.accelerator

    @property
    def precision_plugin(self) -> Precision:
        """The numbers that the model computes with."""
        return self.strategy.precision

    @property
    def precision(self) -> str:
        """The name of the precision, such as ``"bf16-mixed"``."""
        return self.strategy.precision.precision

    @property
    def scaler(self) -> Any:
        """The gradient scaler of ``"16-mixed"``, or None."""
        return getattr(self.precision_plugin, "scaler", None)

    @property
    def global_rank(self) -> int:
        """This process's index among all processes."""
        return self.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """This process's index among those of its machine."""
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """The index of this machine."""
        return self.strategy.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.strategy.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this process speaks for all."""
        return self.strategy.is_global_zero

    @property
    def num_nodes(self) -> int:
        """The number of machines."""
        return self._runtime.num_nodes

    @property
    def num_devices(self) -> int:
        """The number of devices of this machine that take part."""
        return len(self._runtime.devices)

    @property
    def device_ids(self) -> list[int]:
        """The indices of the devices of this machine that take part."""
        return [i if device.index is None else device.index for i, device in enumerate(self._runtime.devices)]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """The arguments of a DistributedSampler, None with one process."""
        return self.strategy.distributed_sampler_kwargs or None

    # ---- the model and its optimizers -------------------------------------------------------------------------------

    @property
    def lightning_module(self) -> LightningModule:
        """The module that was passed to fit, validate, test or predict; None before."""
        return self.strategy.lightning_module  # type: ignore[no-any-return]

    @property
    def model(self) -> Any:
        """The module as it runs: wrapped, where the strategy wraps it."""
        return self.strategy.model

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers of ``configure_optimizers``."""
        return self.strategy.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Any]) -> None:
        from lightning.pytorch.trainer import parts

        parts.replace_optimizers(self, optimizers)

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The learning rate schedulers of ``configure_optimizers`` with their settings."""
        return self.strategy.lr_scheduler_configs

    # ---- where the run is -------------------------------------------------------------------------------------------

    @property
    def current_epoch(self) -> int:
        """The current epoch, from 0; after fit, the number of epochs."""
        return self.fit_loop.progress.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, by all optimizers."""
        return self.fit_loop.progress.global_step

    @property
    def is_last_batch(self) -> bool:
        """Whether the current training batch is the last of its epoch."""
        return self.fit_loop.progress.is_last

    @property
    def validation_due(self) -> bool:
        """Inside ``on_train_batch_end``: whether a validation run follows this batch at once."""
        return self.fit_loop.progress.next == "validate"

    @property
    def log_step(self) -> int:
        """The x value of what loggers get now: the number of training batches after which an optimizer stepped."""
        return self.fit_loop.log_step

    @property
    def log_due(self) -> bool:
        """Whether the step values of the current training batch go to the loggers."""
        every = self._config.log_every_n_steps
        return bool(self._loggers) and every > 0 and (self.should_stop or (self.fit_loop.log_step + 1) % every == 0)

    @property
    def max_epochs(self) -> int | None:
        """The bound on epochs, -1 for none."""
        return self.fit_loop.max_epochs

    @property
    def min_epochs(self) -> int | None:
        """Epochs before which nothing stops the run."""
        return self.fit_loop.min_epochs

    @property
    def max_steps(self) -> int:
        """The bound on optimizer steps, -1 for none."""
        return self.fit_loop.max_steps

    @property
    def min_steps(self) -> int | None:
        """Optimizer steps before which nothing stops the run."""
        return self.fit_loop.min_steps

    @property
    def estimated_stepping_batches(self) -> float:
        """How many optimizer steps this fit will take, infinity if nothing bounds it. Reading it changes nothing."""
        from lightning.pytorch.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler

        steps = float("inf") if self.max_steps == -1 else self.max_steps
        if self.max_epochs in (-1, None):
            return steps
        batches = self._data.train().num_batches
        if batches == float("inf"):
            return steps
        schedule = next((c for c in self.callbacks if isinstance(c, GradientAccumulationScheduler)), None)
        if schedule is None:
            updates = -(-int(batches) // self.accumulate_grad_batches) * (self.max_epochs or 0)
        else:
            updates = sum(-(-int(batches) // schedule.get_accumulate_grad_batches(epoch)) for epoch in range(self.max_epochs or 0))
        return min(updates, steps)

    def _is(self, *stages: RunningStage) -> bool:
        return self.state.stage in stages

    @property
    def training(self) -> bool:
        """Whether the training loop runs."""
        return self._is(TRAIN)

    @training.setter
    def training(self, value: bool) -> None:
        self.state.stage = TRAIN if value else None if self.training else self.state.stage

    @property
    def validating(self) -> bool:
        """Whether a validation loop runs."""
        return self._is(VALIDATE)

    @validating.setter
    def validating(self, value: bool) -> None:
        self.state.stage = VALIDATE if value else None if self.validating else self.state.stage

    @property
    def testing(self) -> bool:
        """Whether the test loop runs."""
        return self._is(TEST)

    @testing.setter
    def testing(self, value: bool) -> None:
        self.state.stage = TEST if value else None if self.testing else self.state.stage

    @property
    def predicting(self) -> bool:
        """Whether the prediction loop runs."""
        return self._is(PREDICT)

    @predicting.setter
    def predicting(self, value: bool) -> None:
        self.state.stage = PREDICT if value else None if self.predicting else self.state.stage

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation batches before training run."""
        return self._is(SANITY)

    @sanity_checking.setter
    def sanity_checking(self, value: bool) -> None:
        self.state.stage = SANITY if value else None if self.sanity_checking else self.state.stage

    @property
    def evaluating(self) -> bool:
        """Whether validation, test or sanity check runs."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last run was ended by an exception or an interrupt."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether a SIGTERM arrived."""
        return False

    # ---- data -------------------------------------------------------------------------------------------------------

    @property
    def train_dataloader(self) -> Any:
        """The training loader, or the collection of them, once fit has asked for it."""
        loader = self._data.loaded.get("train")
        return None if loader is None else loader.combined.iterables

    @property
    def val_dataloaders(self) -> Any:
        """The validation loaders, once they were asked for."""
        return self._given("val")

    @property
    def test_dataloaders(self) -> Any:
        """The test loaders, once they were asked for."""
        return self._given("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction loaders, once they were asked for."""
        return self._given("predict")

    def _given(self, stage: str) -> Any:
        loaders = self._data.loaded.get(stage)
        return None if loaders is None else getattr(loaders.given, "iterables", loaders.given)

    @property
    def num_training_batches(self) -> float:
        """Training batches in an epoch, infinity if unknown or not asked for yet."""
        return self._data.counts.get("train", float("inf"))  # type: ignore[no-any-return]

    @property
    def num_val_batches(self) -> list[float]:
        """Validation batches of each loader."""
        return self._counts("val")

    @property
    def num_test_batches(self) -> list[float]:
        """Test batches of each loader."""
        return self._counts("test")

    @property
    def num_predict_batches(self) -> list[float]:
        """Prediction batches of each loader."""
        return self._counts("predict")

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Validation batches of each loader that the sanity check runs."""
        return [min(self.num_sanity_val_steps, n) for n in self._counts("val")]

    def _counts(self, stage: str) -> list[float]:
        return list(self._data.counts.get(stage, ()))

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates: there are a validation step and a loader, and the limit is above zero."""
        from lightning.pytorch.utilities.model_helpers import is_overridden

        module = self.lightning_module
        return (
            module is not None and is_overridden("validation_step", module) and self._data.has("val") and self._config.limit_val_batches > 0
        )

    # ---- callbacks, loggers, metrics --------------------------------------------------------------------------------

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """The callbacks that save checkpoints."""
        return [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        """The first of them, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """The EarlyStopping callbacks."""
        from lightning.pytorch.callbacks.early_stopping import EarlyStopping

        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first of them, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        """The progress bar, or None."""
        from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar

        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    @property
    def loggers(self) -> list[Any]:
        """The loggers."""
        return self._loggers

    @loggers.setter
    def loggers(self, loggers: list[Any] | None) -> None:
        self._loggers = list(loggers or [])
        self._metrics.send_to(self._loggers)

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        self._metrics.delivery.settle()  # whoever asks for it is going to use it, after the rows that were sent before
        return self._loggers[0] if self._loggers else None

    @logger.setter
    def logger(self, logger: Any) -> None:
        self.loggers = [logger] if logger else []

    @property
    def log_dir(self) -> str | None:
        """Where this run's files go: the logger's directory, else ``default_root_dir``."""
        if not self._loggers:
            return self.default_root_dir
        from lightning.pytorch.loggers.tensorboard import TensorBoardLogger

        first = self._loggers[0]
        found = first.save_dir if not isinstance(first, TensorBoardLogger) and not hasattr(first, "log_dir") else first.log_dir
        return self.strategy.broadcast(found)  # type: ignore[no-any-return]

    @property
    def default_root_dir(self) -> str:
        """Where files go that nobody else has a place for: a path or a URL."""
        return self._config.default_root_dir

    @property
    def ckpt_path(self) -> Any:
        """The checkpoint that the current, or last, run was started from."""
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: Any) -> None:
        self._ckpt_path = path

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of every logged key, for callbacks to decide on."""
        return self._metrics.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The newest values that were sent to the loggers."""
        return self._metrics.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The newest values for the progress bar that have reached the host."""
        return self._metrics.progress_bar_metrics

    @property
    def metric_steps(self) -> dict[str, int]:
        """For each key of ``callback_metrics``, the global step at which it was measured."""
        return self._metrics.metric_steps

    def add_callback_metrics(self, values: dict[str, Any]) -> None:
        """Let a callback publish values under ``callback_metrics``."""
        self._metrics.add_callback_metrics(values)

    def send_to_loggers(self, values: Any, step: int) -> None:
        """Let a callback write a row to all loggers, behind the rows that are on their way from the device.

        Args:
            values: a dict of numbers, or of tensors of one element; or an object for a row that is known later: its ``ready()`` says
                whether it is, its ``read()`` returns the dict, and waits if it must.
            step: the x value.
        """
        self._metrics.send_row(values, step)

    def tell_loggers(self, method: str, *args: Any) -> None:
        """Let a callback have a method of all loggers called, by their threads, once; an error of theirs is a warning.

        Args:
            method: its name.
            args: its arguments.
        """
        from lightning.pytorch.loggers.logger import Logger

        for logger in self._loggers:
            if getattr(type(logger), method, None) is not getattr(Logger, method, None):  # which does nothing
                self._metrics.delivery.tell(logger, method, *args)

    def flush_loggers(self, timeout: float = 30.0) -> bool:
        """Wait until the loggers have all rows that were sent to them, which they get from a thread in the background.

        Needed only to read in the middle of a run what a logger has; at the end of a run they have everything.

        Args:
            timeout: seconds; a logger that gets on is waited for longer. One that raises is not waited for.

        Returns:
            whether they have.
        """
        return self._metrics.flush_loggers(timeout)

    @property
    def profiler(self) -> Any:
        """The profiler; one that does nothing unless another was given."""
        if self._profiler is None:
            from lightning.pytorch.profilers.base import PassThroughProfiler

            return PassThroughProfiler()
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: Any) -> None:
        from lightning.pytorch.trainer import parts

        self._profiler = parts.profiler(profiler)


def _argument(name: str, doc: str) -> property:
    """An argument of the constructor. It can be set between runs, like there; what a run has begun with stays as it was."""

    def set_checked(self: TrainerAttributes, value: Any) -> None:
        self._config = changed(self._config, name, value)

    return property(lambda self: getattr(self._config, name), set_checked if name in CHECKS else None, doc=doc)


for _name, _doc in {
    "fast_dev_run": "Batches of a trial run, 0 for a real one.",
    "limit_train_batches": "The limit on training batches.",
    "limit_val_batches": "The limit on validation batches.",
    "limit_test_batches": "The limit on test batches.",
    "limit_predict_batches": "The limit on prediction batches.",
    "overfit_batches": "The batches that the model is to overfit on.",
    "val_check_interval": "How often fit validates.",
    "check_val_every_n_epoch": "Every how many epochs fit validates.",
    "num_sanity_val_steps": "Validation batches of each loader that run before training, infinity for all.",
    "log_every_n_steps": "Every how many steps the loggers get values.",
    "reload_dataloaders_every_n_epochs": "Every how many epochs the loaders are asked for anew.",
    "barebones": "Whether everything that costs time was left out.",
    "max_time": "The bound on time.",
}.items():
    setattr(TrainerAttributes, _name, _argument(_name, _doc))
