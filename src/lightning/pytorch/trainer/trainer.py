"""The Trainer: hand it a module and data, and it runs them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from lightning.fabric.runtime import resolve
from lightning.pytorch.data import RunData, check_given
from lightning.pytorch.loops.evaluate import EvaluationLoop
from lightning.pytorch.loops.fit import FitLoop
from lightning.pytorch.loops.predict import PredictionLoop
from lightning.pytorch.loops.results import print_results
from lightning.pytorch.metrics import Metrics
from lightning.pytorch.trainer import checks, parts, saving
from lightning.pytorch.trainer.arguments import only_known
from lightning.pytorch.trainer.attributes import TrainerAttributes
from lightning.pytorch.trainer.config import build_config
from lightning.pytorch.trainer.launch import launch
from lightning.pytorch.trainer.run import running, set_up_optimizers
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from lightning.pytorch.utilities.enums import GradClipAlgorithmType

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.strategies.strategy import Strategy
    from lightning.pytorch.callbacks.callback import Callback
    from lightning.pytorch.core.datamodule import LightningDataModule
    from lightning.pytorch.core.module import LightningModule
    from lightning.pytorch.dispatch import Hooks
    from lightning.pytorch.loggers.logger import Logger
    from lightning.pytorch.profilers.profiler import Profiler
    from lightning.pytorch.trainer.signals import Signals
    from lightning.pytorch.utilities.types import EVAL_DATALOADERS, EVALUATE_OUTPUT, TRAIN_DATALOADERS

Batches = int | float | None


class Trainer(TrainerAttributes):
    """Runs training, validation, testing and prediction of a :class:`LightningModule`.

    Args:
        accelerator: ``"auto"`` (GPU, then MPS, then CPU), ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"tpu"``, or an Accelerator.
        strategy: how the work is laid out over devices: ``"auto"``, a name, or a Strategy.
        devices: how many devices (2, "2"), which ([0, 2], "0,2"), all (-1), or ``"auto"``.
        num_nodes: how many machines.
        precision: ``"32-true"``, ``"64-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"``, ``"bf16-true"``, 16, 32, 64, "bf16",
            ``"transformer-engine"``. None: 32 bits.
        logger: a Logger, or several; True or None for TensorBoard where it is installed, else CSV; False for none.
        callbacks: a Callback, or several.
        fast_dev_run: run this many batches (True: 1) of everything as a trial, without logger and checkpoints.
        max_epochs: end after so many epochs; -1 for no bound. None: 1000 where neither steps nor time are bounded.
        min_epochs: nothing stops the run before so many epochs.
        max_steps: end after so many optimizer steps; -1 for no bound.
        min_steps: nothing stops the run before so many optimizer steps.
        max_time: end after this time: "DD:HH:MM:SS", a timedelta, or a dict of its arguments.
        limit_train_batches: how much of the training data an epoch takes: a number of batches, or a fraction as float.
        limit_val_batches: likewise for validation.
        limit_test_batches: likewise for testing.
        limit_predict_batches: likewise for prediction.
        overfit_batches: train and validate on this much of the data, unshuffled, to see whether the model can learn it by heart.
        val_check_interval: validate after so many batches (int), such a fraction of an epoch (float), or such a time. None: 1.0.
        check_val_every_n_epoch: validate every so many epochs; None counts ``val_check_interval`` across epochs.
        num_sanity_val_steps: validation batches to run before training, so that mistakes in validation show early; -1 for all. None: 2.
        log_every_n_steps: loggers get step values every so many steps. None: 50.
        enable_checkpointing: add a ModelCheckpoint if there is none. None: True.
        enable_progress_bar: add a progress bar if there is none. None: True.
        enable_model_summary: print a summary of the model before training. None: True.
        accumulate_grad_batches: batches for one optimizer step.
        gradient_clip_val: clip gradients to this norm, or value. None or 0: no clipping.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``. None: norm.
        deterministic: use deterministic algorithms only; ``"warn"`` uses others with a warning where there are none.
        benchmark: ``torch.backends.cudnn.benchmark``; None leaves it, and turns it off with ``deterministic``.
        inference_mode: evaluate under ``torch.inference_mode`` (True) or ``torch.no_grad`` (False).
        use_distributed_sampler: give each process its part of the data.
        profiler: ``"simple"``, ``"epoch"`` (where the time of each epoch went), a Profiler, or None.
        detect_anomaly: let autograd look for the operation that made a NaN; slow.
        barebones: leave out everything that costs time: logging, checkpoints, progress bar, summary, sanity check.
        plugins: a Precision, a CheckpointIO, or several plugins.
        sync_batchnorm: compute batch norm over all processes.
        reload_dataloaders_every_n_epochs: ask for the loaders anew every so many epochs; 0 for never.
        default_root_dir: where files go that have no other place: a path or URL. None: the current directory.
        enable_autolog_hparams: send the module's hyperparameters to the loggers when a run starts.
        model_registry: the name of a model in a registry; kept for callbacks that upload checkpoints.
        uneven_inputs: what happens if processes have different numbers of training batches. ``"error"``: an error in all of them.
            ``"shortest"``: an epoch ends with the first that runs out. ``"join"``: it ends with the last; the others keep in step with
            a batch that counts nothing.
        auto_resume: let ``fit`` without a ``ckpt_path`` do what ``fit(ckpt_path="auto")`` does: start the run, or go on with it.
        async_checkpointing: copy each checkpoint to the memory of the host, and write it while training goes on; the same as
            ``plugins=[AsyncCheckpointIO()]``. An error of such a save is raised after the next batch, and ``fit`` returns when the last
            one is on the disk.
        on_save_error: what happens when a checkpoint can't be written (OSError). ``"raise"``: the error. ``"retry"``: a warning; training
            goes on, and the save is tried again in the background, until it or a newer one succeeds. One that fails to the end of
            ``fit`` is an error.
        on_nonfinite: what happens when a loss, or a gradient before its step, is infinite or no number. ``"error"``: an error before that
            step, which names epoch, batch, and the first module whose output was not finite, or the gradient. ``"warn"``: a warning at
            the first one, and a count at the end. ``"skip"``: the update is left out, weights and optimizer stay as they are. None:
            nobody looks. See docs/numerics.md.
        on_out_of_memory: what happens when forward or backward of a training batch needs more memory than there is. ``"raise"``: the
            error, with the phase, the batch and the largest tensors named. ``"split_batch"``: the batch is run again in halves, quarters
            and so on, with the gradients of the whole. See docs/numerics.md.
        compile: ``"default"``: compile the steps of the module by ``torch.compile``, inside of what the strategy wraps it in; state dicts
            keep their keys, and ``self.log`` gives what it gives in eager mode. ``"step"``: on CUDA, replay the whole training step as one
            CUDA graph. A dict: keywords of ``torch.compile``, and ``step=True`` for both. See docs/compile.md.
        overlap_transfer: on CUDA, copy each batch to the device on a stream of its own, while the step before is still computed. None:
            batches with a tensor of 1 MiB or more, for which that is worth its while, and all with ``compile="step"``. It shows with
            ``pin_memory=True`` in the loader, and one or two more batches take up memory. A ``transfer_batch_to_device`` of your own
            that reads what is on the device already is noticed, and runs as without it.
        gc_interval: collect Python's garbage every so many training batches, between two of them, and never in the middle of one: for
            steady steps, and for many processes that would otherwise wait for one another's collections. None: when Python does it.

    Raises:
        MisconfigurationException: for a value, or a combination, that is not accepted.
        TypeError: for an argument that there is not, or not any more; it names the one to use instead.
        ValueError: for a name that is not known, or a conflict with ``barebones``.

    Example::

        trainer = Trainer(max_epochs=10, accelerator="auto", precision="bf16-mixed")
        trainer.fit(model, train_loader, val_loader)
        trainer.test(model, test_loader, ckpt_path="best")
    """

    @only_known
    def __init__(
        self,
        *,
        accelerator: Union[str, Accelerator] = "auto",
        strategy: Union[str, Strategy] = "auto",
        devices: Union[list[int], str, int] = "auto",
        num_nodes: int = 1,
        precision: Union[int, str] | None = None,
        logger: Union[Logger, list[Logger], bool] | None = None,
        callbacks: Union[list[Callback], Callback] | None = None,
        fast_dev_run: Union[int, bool] = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Union[str, timedelta, dict[str, int]] | None = None,
        limit_train_batches: Batches = None,
        limit_val_batches: Batches = None,
        limit_test_batches: Batches = None,
        limit_predict_batches: Batches = None,
        overfit_batches: Union[int, float] = 0.0,
        val_check_interval: Union[int, float, str, timedelta, dict[str, int]] | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: Union[int, float] | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: Union[bool, Literal["warn"]] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Union[Profiler, str] | None = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Any | None = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: Union[str, Path] | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        uneven_inputs: Literal["error", "shortest", "join"] = "error",
        auto_resume: bool = False,
        async_checkpointing: bool = False,
        on_save_error: Literal["raise", "retry"] = "raise",
        on_nonfinite: Literal["error", "warn", "skip"] | None = None,
        on_out_of_memory: Literal["raise", "split_batch"] = "raise",
        compile: Union[bool, str, dict[str, Any]] | None = None,
        overlap_transfer: bool | None = None,
        gc_interval: int | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        self._config = config = build_config(given)
        self._runtime = resolve(accelerator, strategy, devices, num_nodes, precision, plugins, sync_batchnorm)
        saving.equip(self._runtime.strategy, config.async_checkpointing, config.on_save_error)
        self.state = TrainerState()
        self.should_stop = False
        self.accumulate_grad_batches = config.accumulate_grad_batches
        self.gradient_clip_val = config.gradient_clip_val
        algorithm = config.gradient_clip_algorithm
        self.gradient_clip_algorithm = None if algorithm is None else GradClipAlgorithmType(algorithm)
        self.enable_autolog_hparams = enable_autolog_hparams
        self.sync_batchnorm = sync_batchnorm
        self.datamodule: LightningDataModule | None = None
        self._model_registry = model_registry
        self._ckpt_path: Any = None
        self._goes_on = False
        self._signals: Signals | None = None  # during a run
        self._launched = False  # whether this process is inside of an entry point, all processes having been started
        self._hooks: Hooks = None  # type: ignore[assignment]  # resolved when a run starts
        self._metrics = Metrics()
        self._data = RunData(self)
        self.fit_loop = FitLoop(self)
        self.validate_loop = EvaluationLoop(self, "validation", "val")
        self.test_loop = EvaluationLoop(self, "test", "test")
        self.predict_loop = PredictionLoop(self)
        self._metrics.progress = self.fit_loop.progress
        self._loggers = parts.loggers(config, logger)
        self.callbacks = parts.callbacks(config, callbacks, enable_checkpointing, enable_progress_bar, enable_model_summary)
        self._profiler = parts.profiler(profiler)
        parts.set_determinism(config)
        parts.announce(self._runtime)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": None, "_signals": None}  # a run resolves them

    # ---- entry points -----------------------------------------------------------------------------------------------

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Union[TRAIN_DATALOADERS, LightningDataModule] | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Union[str, Path] | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Train the model.

        Args:
            model: what to train.
            train_dataloaders: the training loader: any iterable, or a collection of them; or a datamodule.
            val_dataloaders: the validation loader, or a sequence of them.
            datamodule: gives the loaders instead.
            ckpt_path: continue from this checkpoint: a path, a URL, ``"best"``, ``"last"``, ``"hpc"``, or ``"auto"``: the newest whole
                checkpoint of this run, if there is any yet. So the same command starts a run, and goes on with it exactly
                when it was interrupted. Checkpoints are looked for where the run's callbacks save them, in folders of all versions of
                its logger too, and by the names ``last`` and ``hpc_ckpt_N`` in ``default_root_dir``: give each run its own.
            weights_only: False unpickles anything in the checkpoint: only for sources you trust. None means True.

        Raises:
            MisconfigurationException: if the model lacks a method, or arguments contradict each other.

        The run, in the order of its hooks::

            configure_callbacks, prepare_data, setup, configure_model, configure_optimizers, on_fit_start
            on_sanity_check_start .. on_sanity_check_end
            on_train_start
            for each epoch:
                on_train_epoch_start
                for each batch:
                    on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer
                    on_train_batch_start
                    optimizer_step:
                        training_step
                        on_before_zero_grad, optimizer_zero_grad
                        on_before_backward, backward, on_after_backward
                        on_before_optimizer_step, configure_gradient_clipping
                    on_train_batch_end
                    validation, where it is due
                on_train_epoch_end
            on_train_end
            on_fit_end, teardown
        """
        if ckpt_path is None and self._config.auto_resume:
            ckpt_path = "auto"
        if self._launches:
            return launch(self, self.fit, model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        module = checks.check_model(model, "fit")
        train_dataloaders, datamodule = parts.datamodule_first(train_dataloaders, datamodule)
        check_given("fit", train_dataloaders if train_dataloaders is not None else val_dataloaders, datamodule)
        self._data.reset(train=train_dataloaders, val=val_dataloaders)
        self.fit_loop.bound()
        with running(self, TrainerFn.FITTING, module, datamodule, ckpt_path, weights_only, model_given=True):
            if parts.ready_to_fit(self):
                self.fit_loop.run()
        return None

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Union[EVAL_DATALOADERS, LightningDataModule] | None = None,
        ckpt_path: Union[str, Path] | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> EVALUATE_OUTPUT:
        """Run once through the validation data.

        Args:
            model: what to validate; None takes the model of the last run, with its best checkpoint if it has one.
            dataloaders: the loader, or a sequence of them; or a datamodule.
            ckpt_path: load this checkpoint before: a path, a URL, ``"best"`` or ``"last"``.
            verbose: print the metrics.
            datamodule: gives the loaders instead.
            weights_only: False unpickles anything in the checkpoint: only for sources you trust. None means True.

        Returns:
            one dict of metrics for each loader.
        """
        return self._evaluate(TrainerFn.VALIDATING, "val", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Union[EVAL_DATALOADERS, LightningDataModule] | None = None,
        ckpt_path: Union[str, Path] | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> EVALUATE_OUTPUT:
        """Run once through the test data; arguments and result are those of :meth:`validate`."""
        return self._evaluate(TrainerFn.TESTING, "test", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def _evaluate(
        self,
        function: TrainerFn,
        stage: str,
        model: Any,
        dataloaders: Any,
        ckpt_path: Any,
        verbose: bool,
        datamodule: Any,
        weights_only: Any,
    ) -> EVALUATE_OUTPUT:
        if self._launches:
            return launch(self, self._evaluate, function, stage, model, dataloaders, ckpt_path, verbose, datamodule, weights_only)
        module = parts.module_or_last(self, model, function)
        dataloaders, datamodule = parts.datamodule_first(dataloaders, datamodule)
        check_given(function.value, dataloaders, datamodule)
        self._data.reset(**{stage: dataloaders})
        loop = self.validate_loop if function is TrainerFn.VALIDATING else self.test_loop
        with running(self, function, module, datamodule, ckpt_path, weights_only, model_given=model is not None):
            loop.limit = float("inf")
            results = loop.run()
        if verbose and self.is_global_zero:
            print_results(results, function.value)
        return list(results)

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Union[EVAL_DATALOADERS, LightningDataModule] | None = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: Union[str, Path] | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Run once through the prediction data.

        Args:
            model: what predicts; None takes the model of the last run, with its best checkpoint if it has one.
            dataloaders: the loader, or a sequence of them; or a datamodule.
            datamodule: gives the loaders instead.
            return_predictions: keep and return what ``predict_step`` returned. None means True.
            ckpt_path: load this checkpoint before: a path, a URL, ``"best"`` or ``"last"``.
            weights_only: False unpickles anything in the checkpoint: only for sources you trust. None means True.

        Returns:
            the list of predictions, one for each batch, on the CPU; with several loaders, a list of such lists.
        """
        if self._launches:
            return launch(self, self.predict, model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)
        module = parts.module_or_last(self, model, TrainerFn.PREDICTING)
        dataloaders, datamodule = parts.datamodule_first(dataloaders, datamodule)
        check_given("predict", dataloaders, datamodule)
        self._data.reset(predict=dataloaders)
        self.predict_loop.return_predictions = return_predictions is not False
        with running(self, TrainerFn.PREDICTING, module, datamodule, ckpt_path, weights_only, model_given=model is not None):
            return self.predict_loop.run()

    def predict_stream(
        self,
        model: LightningModule | None = None,
        dataloaders: Union[EVAL_DATALOADERS, LightningDataModule] | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Union[str, Path] | None = None,
        weights_only: bool | None = None,
    ) -> Generator[Any, None, None]:
        """Run once through the prediction data, and give what ``predict_step`` returns for each batch as soon as it is there.

        Nothing is kept: a million batches take as much memory as one. The run is that of :meth:`predict`, with the same hooks. It begins
        with the first output that is asked for, and ends after the last; or with ``close()`` of the iterator, or the end of its last
        reference, where the loop over it is left: ``teardown`` runs, ``on_predict_epoch_end`` and ``on_predict_end`` do not.
        In between nothing but this iterator runs on the trainer, gradients are as the caller has set them, and the model is in evaluation
        mode. Several loaders come one after another; ``trainer.predict_loop.dataloader_idx`` says which. Each process gets the
        outputs of its own samples, and should end its iterator when the others do.

        Args:
            model: what predicts; None takes the model of the last run, with its best checkpoint if it has one.
            dataloaders: the loader, or a sequence of them; or a datamodule.
            datamodule: gives the loaders instead.
            ckpt_path: load this checkpoint before: a path, a URL, ``"best"`` or ``"last"``.
            weights_only: False unpickles anything in the checkpoint: only for sources you trust. None means True.

        Returns:
            an iterator over the outputs, on the CPU.

        Raises:
            MisconfigurationException: if the strategy predicts in processes that it starts with copies of the trainer, as ``ddp_spawn``.

        Example::

            for output in trainer.predict_stream(model, loader):
                write(output)
        """
        from lightning.pytorch.trainer.stream import meet_others, stream

        if self._launches:
            meet_others(self)
        module = parts.module_or_last(self, model, TrainerFn.PREDICTING)
        dataloaders, datamodule = parts.datamodule_first(dataloaders, datamodule)
        check_given("predict_stream", dataloaders, datamodule)
        return stream(self, module, dataloaders, datamodule, ckpt_path, weights_only, model is not None)

    # ---- tools ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filepath: Union[str, Path], weights_only: bool | None = None, storage_options: Any | None = None) -> None:
        """Save the run as it stands.

        Args:
            filepath: a path or URL.
            weights_only: leave out what only a continued training needs.
            storage_options: passed to the CheckpointIO.

        Raises:
            AttributeError: before a model was attached.
            OSError: if it cannot be written; what was there before is still there.
        """
        from lightning.pytorch.checkpoint import compose

        if self.strategy.lightning_module is None:
            raise AttributeError("`Trainer.save_checkpoint` needs a model: call fit, validate, test or predict before.")
        failing = self.state.status is TrainerStatus.INTERRUPTED  # another process may be gone, and none may be waited for
        if failing and self.strategy.forward_is_collective:
            raise RuntimeError(
                f"No checkpoint is saved while the run fails: under {type(self.strategy).__name__} each process holds a part of the "
                "weights, and not all of them may be there. Continue from the last checkpoint that was saved before."
            )
        with self.profiler.profile("save_checkpoint"):
            saving.before_save(self, bool(weights_only))
            checkpoint = compose(self, bool(weights_only))
            self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            if not failing:
                self.strategy.barrier("Trainer.save_checkpoint")
            saving.after_save(self)

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """A context to build a model in: on the device and in the precision of this trainer.

        Args:
            empty_init: leave the weights uninitialised, where a checkpoint will be loaded anyway.
        """
        with self.strategy.module_init_context(empty_init=empty_init):
            yield

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once, on rank 0."""
        if self.is_global_zero:
            print(*args, **kwargs)

    @property
    def _launches(self) -> bool:
        """Whether an entry point has to see first that all processes run it."""
        return self.strategy.launcher is not None and not self._launched

    def _configure_optimizers(self) -> None:
        """What :meth:`Strategy.setup_optimizers <lightning.fabric.strategies.Strategy.setup_optimizers>` does."""
        set_up_optimizers(self)

    @contextmanager
    def _in_stage(self, stage: RunningStage) -> Generator[None, None, None]:
        """The trainer in a stage, and back in the former one afterwards."""
        outer, self.state.stage = self.state.stage, stage
        yield
        self.state.stage = outer
