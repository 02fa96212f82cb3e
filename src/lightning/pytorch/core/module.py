"""LightningModule: a torch module that also says how to train, evaluate and use itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from lightning.fabric.utilities.apply_func import apply_to_collection, convert_to_tensors
from lightning.fabric.utilities.device_dtype_mixin import DeviceDtypeMixin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.core.class_only import class_only
from lightning.pytorch.core.export import to_onnx, to_tensorrt, to_torchscript
from lightning.pytorch.core.fabric_trainer import FabricTrainer
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    import lightning.pytorch as pl
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.metrics import Metrics
    from lightning.pytorch.utilities.types import STEP_OUTPUT, LRSchedulerPLType, OptimizerLRScheduler


class LightningModule(DeviceDtypeMixin, HyperparametersMixin, ModelHooks, DataHooks, CheckpointHooks):
    """Subclass it, define ``training_step`` and ``configure_optimizers``, and hand it to a Trainer.

    Example::

        class Digits(LightningModule):
            def __init__(self, lr: float = 1e-3):
                super().__init__()
                self.save_hyperparameters()
                self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

            def training_step(self, batch, batch_idx):
                x, y = batch
                loss = F.cross_entropy(self.net(x), y)
                self.log("train/loss", loss, prog_bar=True)
                return loss

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
    """

    __jit_unused_properties__: list[str] = [
        "device", "dtype", "device_mesh", "example_input_array", "on_gpu", "current_epoch", "global_step", "global_rank", "local_rank",
        "logger", "loggers", "automatic_optimization", "trainer", "fabric", "strict_loading", "hparams", "hparams_initial",
    ]  # fmt: skip
    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    _jit_is_scripting = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        DataHooks.__init__(self)
        HyperparametersMixin.__init__(self)
        # torch.nn.Module.__setattr__ is slow and would try to register what it is given: these are plain attributes.
        self.__dict__["_trainer"] = None
        self.__dict__["_metrics"] = None
        self.__dict__["_fabric"] = None
        self.__dict__["_fabric_optimizers"] = []
        self._example_input_array: Any = None
        self._automatic_optimization: bool = True
        self._strict_loading: bool | None = None
        self._device_mesh: DeviceMesh | None = None
        self._param_requires_grad_state: dict[Any, bool] = {}

    # ---- where the module is, and who trains it ------------------------------------------------------------------

    @property
    def trainer(self) -> pl.Trainer:
        """The trainer that runs this module; under Fabric, what that has of one.

        Raises:
            RuntimeError: before the module was handed to a trainer.
        """
        trainer = self.__dict__["_trainer"]
        if self.__dict__["_fabric"] is not None:
            return FabricTrainer(self.__dict__["_fabric"])  # type: ignore[return-value]
        if trainer is None and not self._jit_is_scripting:
            raise RuntimeError(
                f"{type(self).__qualname__} is not attached to a `Trainer`: `self.trainer` exists once the module was passed "
                "to fit, validate, test or predict."
            )
        return trainer  # type: ignore[no-any-return]

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        metrics = getattr(trainer, "_metrics", None)  # a stand-in in somebody's tests has none
        for module in self.modules():  # submodules that are LightningModules log and look up the trainer too
            if isinstance(module, LightningModule):
                module.__dict__["_trainer"] = trainer
                module.__dict__["_metrics"] = metrics
                if trainer is not None:
                    module.__dict__["_fabric"] = None

    @property
    def fabric(self) -> Any:
        """The Fabric that set this module up, or None."""
        return self.__dict__["_fabric"]

    @fabric.setter
    def fabric(self, fabric: Any) -> None:
        for module in self.modules():
            if isinstance(module, LightningModule):
                module.__dict__["_fabric"] = fabric
                if fabric is not None:
                    module.__dict__["_trainer"] = module.__dict__["_metrics"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None, "_metrics": None, "_fabric": None, "_fabric_optimizers": []}

    @property
    def example_input_array(self) -> Any:
        """An input of ``forward``: a tensor, or a tuple or dict of arguments. Used by summaries, graphs and exports."""
        return self._example_input_array

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        self._example_input_array = example

    @property
    def current_epoch(self) -> int:
        """The current epoch of the trainer, 0 without one."""
        trainer = self.__dict__["_trainer"]
        return trainer.current_epoch if trainer else 0

    @property
    def global_step(self) -> int:
        """The number of optimizer steps taken so far, 0 without a trainer."""
        trainer = self.__dict__["_trainer"]
        return trainer.global_step if trainer else 0

    @property
    def global_rank(self) -> int:
        """This process's index among all processes of the run."""
        runner = self.__dict__["_trainer"] or self.__dict__["_fabric"]
        return runner.global_rank if runner else 0

    @property
    def local_rank(self) -> int:
        """This process's index among the processes of its machine."""
        runner = self.__dict__["_trainer"] or self.__dict__["_fabric"]
        return runner.local_rank if runner else 0

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def automatic_optimization(self) -> bool:
        """Whether the trainer runs backward and the optimizer step (True), or your ``training_step`` does."""
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, automatic: bool) -> None:
        self._automatic_optimization = automatic

    @property
    def strict_loading(self) -> bool:
        """Whether loading a checkpoint demands that its keys match the model's exactly; True unless set otherwise."""
        return True if self._strict_loading is None else self._strict_loading

    @strict_loading.setter
    def strict_loading(self, strict: bool) -> None:
        self._strict_loading = strict

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """The mesh of devices that a model-parallel strategy laid out, to be used in ``configure_model``."""
        return self._device_mesh

    @property
    def logger(self) -> Any:
        """The first logger of the trainer or of Fabric, or None."""
        trainer = self.__dict__["_trainer"]
        return trainer.logger if trainer else next(iter(self.loggers), None)

    @property
    def loggers(self) -> list[Any]:
        """The loggers of the trainer or of Fabric."""
        runner = self.__dict__["_trainer"] or self.__dict__["_fabric"]
        return runner.loggers if runner else []

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once, on rank 0, without breaking a progress bar."""
        if self.__dict__["_fabric"] is not None:
            self.__dict__["_fabric"].print(*args, **kwargs)
        elif self.trainer.is_global_zero:
            bar = self.trainer.progress_bar_callback
            if bar is not None and bar.is_enabled:
                bar.print(*args, **kwargs)
            else:
                print(*args, **kwargs)

    # ---- logging ------------------------------------------------------------------------------------------------

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Union[str, Callable[..., Any]] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a number, a one-element tensor, or a torchmetrics Metric, from any hook that runs inside a loop.

        Nothing is read from the device here: values are kept and reduced where they are, and read every
        ``log_every_n_steps`` steps and at the end of an epoch.

        Args:
            name: the key. With both ``on_step`` and ``on_epoch`` it becomes ``name_step`` and ``name_epoch``.
            value: what to log.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers; None means yes.
            on_step: log the value of this step. None: True in training batch hooks, else False.
            on_epoch: log the reduction over the epoch. None: True in evaluation and in epoch hooks, else False.
            reduce_fx: ``"mean"`` (weighted by batch size), ``"sum"``, ``"min"``, ``"max"``, or torch's functions of these names.
            enable_graph: keep the autograd graph of the value.
            sync_dist: reduce over all processes.
            sync_dist_group: the process group to reduce over.
            add_dataloader_idx: append ``/dataloader_idx_i`` where there are several loaders.
            batch_size: the weight of this value in an epoch mean; None infers it from the batch.
            metric_attribute: the attribute of the module that holds the Metric, for metrics found in no attribute by identity.
            rank_zero_only: log on rank 0 only; with it, ``callback_metrics`` has the key on that rank alone.

        Raises:
            MisconfigurationException: in a hook that cannot log, for unfit values, or when the same key is logged twice in
                one hook with other arguments.
        """
        metrics: Metrics | None = self.__dict__["_metrics"]
        if metrics is None:
            return self._log_without_trainer(name, value)
        metrics.log(
            self, name, value,
            (prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group, add_dataloader_idx,
             metric_attribute, rank_zero_only),
            batch_size,
        )  # fmt: skip
        return None

    def _log_without_trainer(self, name: str, value: Any) -> None:
        if self.__dict__["_fabric"] is not None:
            self.__dict__["_fabric"].log_dict(metrics={name: value})
        else:
            rank_zero_warn(
                f"`self.log({name!r}, ...)` was called on a {type(self).__qualname__} that no Trainer runs, so nothing is logged. "
                "This is fine when you call a step by hand."
            )

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Union[str, Callable[..., Any]] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log each item of a dictionary, or of a torchmetrics MetricCollection; the arguments are those of :meth:`log`."""
        # A collection's own names carry its prefix only when asked for in this way.
        items = dictionary.items(keep_base=False) if _is_metric_collection(dictionary) else dictionary.items()  # type: ignore[call-arg]
        for name, value in items:
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip

    # ---- steps --------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the module does; by default not defined."""
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """One step of training on ``(batch, batch_idx)``.

        Returns:
            the loss; or a dict with the key ``"loss"``; or None to skip this batch. With manual optimization, anything.
        """
        rank_zero_warn("`training_step` must be implemented to be used with the Lightning Trainer")
        return None

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """One step of validation on ``(batch, batch_idx)``, and ``dataloader_idx`` if there are several loaders."""
        return None

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """One step of testing on ``(batch, batch_idx)``, and ``dataloader_idx`` if there are several loaders."""
        return None

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of prediction on ``(batch, batch_idx)``; by default the module is called with the batch."""
        return self(kwargs.get("batch", args[0] if args else None))

    # ---- optimization -------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> Any:
        """Return a callback, or a sequence of them, that this model needs; they replace the trainer's of the same type."""
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return what to optimize with: an optimizer; several; two lists, of optimizers and of schedulers; a dict with
        ``"optimizer"`` and ``"lr_scheduler"``; several such dicts; or None to train nothing.

        A scheduler is torch's, or a dict with ``scheduler``, ``interval`` ("epoch" or "step"), ``frequency``, ``monitor``,
        ``strict`` and ``name``.
        """
        rank_zero_warn("`configure_optimizers` must be implemented to be used with the Lightning Trainer")
        return None

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizers: one, or a list if there are several.

        Args:
            use_pl_optimizer: give the wrapped ones, whose ``step`` knows precision and strategy, instead of torch's own.
        """
        found: list[Any]
        if self.__dict__["_fabric"] is not None:
            found = self.__dict__["_fabric_optimizers"]
        else:
            found = self.trainer.strategy._lightning_optimizers if use_pl_optimizer else self.trainer.strategy.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> list[LRSchedulerPLType] | LRSchedulerPLType | None:
        """The learning rate schedulers, for manual optimization: None, one, or a list if there are several."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In manual optimization, call this instead of ``loss.backward()``: it scales the loss for fp16 and runs the hooks.

        Raises:
            MisconfigurationException: with automatic optimization, where the trainer runs backward.
        """
        if self.__dict__["_fabric"] is not None:
            self.__dict__["_fabric"].backward(loss, *args, **kwargs)
        else:
            self._verify_is_manual_optimization("manual_backward")
            self.trainer.fit_loop.manual_backward(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward on the loss. Override it to call autograd in another way."""
        loss.backward(*args, **kwargs)

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Let only the parameters of ``optimizer`` require gradients, so that a step of a GAN's one half leaves the other alone."""
        states = dict(self._param_requires_grad_state)  # what a toggle still in force turned off counts as it was before
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    states.setdefault(parameter, parameter.requires_grad)
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, requires_grad in states.items():
            parameter.requires_grad = requires_grad and parameter in own
        self._param_requires_grad_state = states

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Undo :meth:`toggle_optimizer`: the parameters of the other optimizers require gradients again where they did before."""
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, requires_grad in self._param_requires_grad_state.items():
            if parameter not in own:
                parameter.requires_grad = requires_grad
        self._param_requires_grad_state = {}

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Generator[None, None, None]:
        """A context in which :meth:`toggle_optimizer` is in force."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: Union[int, float] | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of ``optimizer``; in manual optimization call it before its step.

        Args:
            optimizer: whose parameters.
            gradient_clip_val: the largest norm, or value; None takes the trainer's.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``; None takes the trainer's, ``"norm"`` where that has none.

        Raises:
            MisconfigurationException: if the trainer was given other values than these, or the algorithm is unknown.
        """
        if self.__dict__["_fabric"] is not None:
            by_value = gradient_clip_algorithm is not None and str(gradient_clip_algorithm).lower() == "value"
            if gradient_clip_val is not None:
                self.__dict__["_fabric"].clip_gradients(self, optimizer, **{"clip_val" if by_value else "max_norm": gradient_clip_val})
            return
        trainer = self.trainer
        for name, given, theirs in (
            ("gradient_clip_val", gradient_clip_val, trainer.gradient_clip_val),
            ("gradient_clip_algorithm", gradient_clip_algorithm, trainer.gradient_clip_algorithm),
        ):
            if given is not None and theirs is not None and given != theirs:
                raise MisconfigurationException(
                    f"`clip_gradients({name}={given!r})` contradicts `Trainer({name}={getattr(theirs, 'value', theirs)!r})`: "
                    "set it in one place only."
                )
        value = trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        algorithm = trainer.gradient_clip_algorithm if gradient_clip_algorithm is None else gradient_clip_algorithm
        if algorithm is not None and str(algorithm).lower() not in ("norm", "value"):
            raise MisconfigurationException(f"`gradient_clip_algorithm` is {algorithm!r}; accepted are 'norm' and 'value'.")
        if value is not None:
            # The scaler of fp16 must meet the optimizer that will step, not its wrapper: it would unscale the gradients twice.
            optimizer = getattr(optimizer, "optimizer", optimizer)
            trainer.strategy.clip_gradients(optimizer, value, str(algorithm or "norm").lower())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: Union[int, float] | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip before each automatic optimizer step. Override it, and call :meth:`clip_gradients` where you want it."""
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: LRSchedulerPLType, metric: Any | None) -> None:
        """Step a scheduler. Override it for schedulers with another signature.

        Args:
            scheduler: which.
            metric: the monitored value for a scheduler that reduces on plateau, else None.
        """
        if metric is None:
            scheduler.step()  # type: ignore[call-arg]
        else:
            scheduler.step(metric)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Union[Optimizer, LightningOptimizer],
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the optimizer; ``optimizer_closure`` runs training_step, zero_grad and backward and must be called by it."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zero the gradients. Override it to do so in another way."""
        optimizer.zero_grad()

    def _verify_is_manual_optimization(self, function: str) -> None:
        if self.automatic_optimization:
            raise MisconfigurationException(
                f"`{function}` belongs to manual optimization, and this module trains automatically: "
                "set `self.automatic_optimization = False` in its `__init__`."
            )

    # ---- the rest -----------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Turn off gradients of all parameters and put the module into evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.eval()

    def unfreeze(self) -> None:
        """Turn on gradients of all parameters and put the module into training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.train()

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather tensors, or collections of them, from all processes.

        Args:
            data: a tensor of the same shape on each process, or a collection of such tensors, arrays and numbers.
            group: the process group, None for all.
            sync_grads: let gradients flow through the gathering.

        Returns:
            the same structure with tensors that have a first dimension of the number of processes, where there are several.
        """
        data = convert_to_tensors(data, self.device)
        return apply_to_collection(data, Tensor, self.trainer.strategy.all_gather, group=group, sync_grads=sync_grads)

    to_onnx = to_onnx
    to_torchscript = to_torchscript
    to_tensorrt = to_tensorrt

    @class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: Union[str, Path, IO[bytes]],
        map_location: Any = None,
        hparams_file: Union[str, Path] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the module from the hyperparameters in a checkpoint and load its weights.

        Args:
            checkpoint_path: a path, a URL, or an open file.
            map_location: the device to load to, as for :func:`torch.load`.
            hparams_file: a YAML or CSV file of hyperparameters, for checkpoints that hold none.
            strict: whether the keys must match exactly; None takes ``strict_loading`` of the module.
            weights_only: False unpickles anything in the file: only for sources you trust. None means True.
            **kwargs: arguments for ``__init__`` that replace, or add to, the stored ones.

        Example::

            model = Digits.load_from_checkpoint("best.ckpt", lr=1e-4)
        """
        from lightning.pytorch.core.saving import _load_from_checkpoint

        return _load_from_checkpoint(  # type: ignore[no-any-return]
            cls, checkpoint_path, map_location=map_location, hparams_file=hparams_file, strict=strict, weights_only=weights_only, **kwargs
        )


def _is_metric_collection(value: Any) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.MetricCollection)
