"""DeepSpeed: its engine divides optimizer states, gradients and weights among the processes (ZeRO), and can keep them elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric import collectives
from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.fabric.precision import Precision
from lightning.fabric.strategies import deepspeed_state as states
from lightning.fabric.strategies.deepspeed_config import (
    ENVIRONMENT_VARIABLE,
    NAMES,
    Config,
    StepwiseScheduler,
    build_config,
    complete,
    for_evaluation,
    given_config,
    import_deepspeed,
    require_deepspeed,
    zero_stage,
)
from lightning.fabric.strategies.deepspeed_engine import Engine, configure_activation_checkpointing, rounded_weights
from lightning.fabric.strategies.deepspeed_saving import SavesDirectories
from lightning.fabric.strategies.parallel import DEFAULT_TIMEOUT, ParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.watchdog import DEFAULT_LIMIT

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


class DeepSpeedStrategy(SavesDirectories):
    """Train under the engine of the package ``deepspeed``.

    Its optimizer steps one optimizer; gradients are clipped by their norm. Checkpoints are directories, to which each process writes
    its part; :func:`lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict` makes one file of them, and
    a file that another strategy has saved can be loaded. It runs on GPUs, and on the CPU where ``DS_ACCELERATOR=cpu`` is set or
    there is nothing else.

    Args:
        accelerator: the kind of device.
        zero_optimization: divide optimizer states, and with higher stages more, among the processes.
        stage: of ZeRO. 1: optimizer states are divided; 2: gradients too; 3: weights too.
        remote_device: where weights that are built within ``configure_model`` are kept at first: ``"cpu"`` or ``"nvme"``; None: where
            the configuration offloads them to, else on the device. Stage 3 only.
        offload_optimizer: keep the optimizer's states, and step it, off the device.
        offload_parameters: keep weights off the device. Stage 3 only.
        offload_params_device: where to: ``"cpu"`` or ``"nvme"``.
        nvme_path: the folder on an NVMe disk that is used by ``"nvme"``.
        params_buffer_count: buffers for weights from NVMe.
        params_buffer_size: elements in each of them.
        max_in_cpu: elements of weights that stay in the CPU's memory when the others go to NVMe.
        offload_optimizer_device: where optimizer states go: ``"cpu"`` or ``"nvme"``.
        optimizer_buffer_count: buffers for optimizer states from NVMe: at least as many as states of each parameter, and one more.
        block_size: bytes of one transfer to NVMe.
        queue_depth: transfers to NVMe under way at once.
        single_submit: hand transfers over one by one.
        overlap_events: hand over and wait at the same time.
        thread_count: threads for each transfer to NVMe.
        pin_memory: keep what was offloaded to the CPU in pinned memory: faster, and it can't be swapped out.
        sub_group_size: elements that the optimizer updates at once. Stage 3 only.
        contiguous_gradients: copy gradients into one buffer as they come, against fragmentation.
        overlap_comm: reduce gradients while backward runs.
        allgather_partitions: collect updated weights with all-gathers rather than broadcasts.
        reduce_scatter: reduce gradients to where they are needed only.
        allgather_bucket_size: elements collected at once.
        reduce_bucket_size: elements reduced at once.
        zero_allow_untested_optimizer: accept optimizers that DeepSpeed has not been tested with.
        logging_batch_size_per_gpu: samples in a batch of one process, for the speeds that DeepSpeed logs; ``"auto"``: counted in the
            first one; None: 1.
        config: a configuration in DeepSpeed's own format, as a dict or a JSON file, or, if the environment variable
            ``PL_DEEPSPEED_CONFIG_PATH`` names a file, that one. It takes the place of all arguments that stand for parts of it.
        logging_level: of DeepSpeed's logger.
        parallel_devices: the devices of this machine, one for each of its processes.
        cluster_environment: knows the ranks, and where the processes meet.
        loss_scale: with float16: a constant factor for the loss; 0 for one that adapts.
        initial_scale_power: the first factor is 2 to the power of this.
        loss_scale_window: steps without overflow after which the factor is doubled.
        hysteresis: overflows before it is halved.
        min_loss_scale: the smallest factor.
        partition_activations: with DeepSpeed's activation checkpointing: divide what is kept among processes of model parallelism.
        cpu_checkpointing: ... keep it in the CPU's memory.
        contiguous_memory_optimization: ... copy it into one buffer.
        synchronize_checkpoint_boundary: ... wait for the device at the boundaries.
        load_full_weights: what is loaded is one file with whole weights. Files are recognized without it; with it, a directory
            is an error.
        precision: the numbers that the module computes with.
        process_group_backend: which library carries collectives; None for what suits the devices.
        timeout: how long a collective may take before it fails.
        exclude_frozen_parameters: save checkpoints without the weights that are not trained.
        precision_plugin: another name of ``precision``.
        checkpoint_io: None: DeepSpeed writes its checkpoints itself.
        watchdog_timeout: how long the processes may go without reaching the next batch before the run is ended; see
            :class:`~lightning.fabric.strategies.parallel.ParallelStrategy`.

    Raises:
        MisconfigurationException: for a stage that there isn't, or a file without a configuration.

    Example::

        Trainer(strategy=DeepSpeedStrategy(stage=3, offload_optimizer=True), accelerator="gpu", devices=8, precision="bf16-mixed")
    """

    strategy_name = "deepspeed"
    handles_gradient_accumulation = True
    DEEPSPEED_ENV_VAR = ENVIRONMENT_VARIABLE

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        zero_optimization: bool = True,
        stage: int = 2,
        remote_device: str | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme",
        params_buffer_count: int = 5,
        params_buffer_size: int = 100_000_000,
        max_in_cpu: int = 1_000_000_000,
        offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4,
        block_size: int = 1048576,
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
        thread_count: int = 1,
        pin_memory: bool = False,
        sub_group_size: int = 1_000_000_000_000,
        contiguous_gradients: bool = True,
        overlap_comm: bool = True,
        allgather_partitions: bool = True,
        reduce_scatter: bool = True,
        allgather_bucket_size: int = 200_000_000,
        reduce_bucket_size: int = 200_000_000,
        zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: int | str | None = "auto",
        config: str | os.PathLike[str] | dict[str, Any] | None = None,
        logging_level: int = logging.WARNING,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        loss_scale: float = 0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        partition_activations: bool = False,
        cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False,
        synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        exclude_frozen_parameters: bool = False,
        *,
        precision_plugin: Precision | None = None,
        checkpoint_io: CheckpointIO | None = None,
        watchdog_timeout: timedelta | None = DEFAULT_LIMIT,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            process_group_backend=process_group_backend,
            timeout=timeout,
            watchdog_timeout=watchdog_timeout,
        )
        self.precision = precision or precision_plugin
        if checkpoint_io is not None:
            self.checkpoint_io = checkpoint_io
        given = given_config(config)
        self.config = given if given is not None else build_config(
            zero_optimization=zero_optimization,
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            offload_params_device=offload_params_device,
            offload_optimizer_device=offload_optimizer_device,
            nvme_path=nvme_path,
            params_buffer_count=params_buffer_count,
            params_buffer_size=params_buffer_size,
            max_in_cpu=max_in_cpu,
            optimizer_buffer_count=optimizer_buffer_count,
            pin_memory=pin_memory,
            sub_group_size=sub_group_size,
            zero_allow_untested_optimizer=zero_allow_untested_optimizer,
            communication={
                "contiguous_gradients": contiguous_gradients,
                "overlap_comm": overlap_comm,
                "allgather_partitions": allgather_partitions,
                "reduce_scatter": reduce_scatter,
                "allgather_bucket_size": allgather_bucket_size,
                "reduce_bucket_size": reduce_bucket_size,
            },
            aio={
                "block_size": block_size,
                "queue_depth": queue_depth,
                "single_submit": single_submit,
                "overlap_events": overlap_events,
                "thread_count": thread_count,
            },
            activation_checkpointing={
                "partition_activations": partition_activations,
                "cpu_checkpointing": cpu_checkpointing,
                "contiguous_memory_optimization": contiguous_memory_optimization,
                "synchronize_checkpoint_boundary": synchronize_checkpoint_boundary,
            },
        )  # fmt: skip
        self._loss_scaling = {
            "loss_scale": loss_scale,
            "initial_scale_power": initial_scale_power,
            "loss_scale_window": loss_scale_window,
            "hysteresis": hysteresis,
            "min_loss_scale": min_loss_scale,
        }
        self.remote_device = remote_device
        self.load_full_weights = load_full_weights
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.logging_level = logging_level
        self.logging_batch_size_per_gpu = logging_batch_size_per_gpu
        self.engine = None
        self.forward_is_collective = self.zero_stage_3
        self._loop_steps = self._set_local_rank = False
        self._rounded: list[tuple[Tensor, Tensor]] = []
        self._saved = None
        self._optimizers_of_file: list[str] = []

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def deepspeed_engine(self) -> Any:
        """DeepSpeed's engine, once there is one."""
        return None if self.engine is None else self.engine.raw

    @property
    def precision(self) -> Precision:
        """The numbers that the module computes with."""
        return self._deepspeed_precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        self._deepspeed_precision = DeepSpeedPrecision.of(precision)
        self._precision = None if precision is None else self._deepspeed_precision

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes and reads checkpoints that are one file; directories DeepSpeed writes itself."""
        return ParallelStrategy.checkpoint_io.fget(self)  # type: ignore[attr-defined, no-any-return]

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO | None) -> None:
        if checkpoint_io is not None:
            raise MisconfigurationException(
                f"DeepSpeed writes its checkpoints itself, and the plugin {type(checkpoint_io).__name__} would have no say. Leave it out."
            )

    # ---- setting up -------------------------------------------------------------------------------------------------

    def configure_launcher(self) -> None:
        require_deepspeed()  # before any process is started
        super().configure_launcher()

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.root_device.index not in (None, self.local_rank):
            raise MisconfigurationException(
                f"The process of local rank {self.local_rank} was given the device {str(self.root_device)!r}, and DeepSpeed takes the one "
                "of that number. To use others, set the environment variable CUDA_VISIBLE_DEVICES, and give devices as a count."
            )
        if "LOCAL_RANK" not in os.environ:  # where DeepSpeed looks for it, which only some launchers have set
            os.environ["LOCAL_RANK"] = str(self.local_rank)
            self._set_local_rank = True
        deepspeed = import_deepspeed(self.root_device)
        deepspeed.utils.logger.setLevel(self.logging_level)
        if self.precision.policy.compute_dtype == torch.float16 and not deepspeed.get_accelerator().is_fp16_supported():
            raise MisconfigurationException(
                f"precision={self.precision.precision!r}: DeepSpeed can't compute in float16 on this {self.root_device.type!r} device. "
                f"Use {self.precision.precision.replace('16', 'bf16')!r}, or '32-true'."
            )
        deepspeed.init_distributed(auto_mpi_discovery=False)  # joins the group that there is

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """A context to build a module in. With ZeRO 3 weights are divided among the processes as soon as they are there."""
        if not self.zero_stage_3 or not collectives.is_distributed():
            with super().module_init_context(empty_init):
                yield
            return
        deepspeed = import_deepspeed(self.root_device)
        sharded = deepspeed.zero.Init(remote_device=self.remote_device, config_dict_or_path=self._run_config())
        with self.precision.module_init_context(), sharded:
            yield

    def setup_module(self, module: Module, training: bool = True) -> Module:
        """Return the module on its device; what runs it in training is the engine, which :meth:`wrap_optimizers` makes.

        Args:
            module: the user's.
            training: False: there will be no optimizer. With ZeRO 3 the result is an engine all the same, which can gather weights.
        """
        if self.engine is not None and (training or self.engine.module is not module):
            self.engine.release()
            self.engine = None
        if self.layer_sync is not None:
            module = self.layer_sync.apply(module)
        module = self.precision.convert_module(module)
        if not training and not self.zero_stage_3:
            self._rounded = rounded_weights(module, self.precision.policy.compute_dtype)
        self.module_to_device(module)
        whole = [parameter for parameter in module.parameters() if not states.is_partitioned(parameter)]
        collectives.broadcast_tensors([*whole, *module.buffers()])
        configure_activation_checkpointing(self.config.get("activation_checkpointing"))
        if training or not self.zero_stage_3:
            return module
        if self.engine is None:
            self.engine = Engine.build(self.root_device, module, for_evaluation(self._run_config()))
        return self.engine.raw  # type: ignore[no-any-return]

    def prepare_training(self, accumulate_grad_batches: int, gradient_clip_val: float | None, gradient_clip_algorithm: str | None) -> None:
        """Learn who steps: the loop, or, in manual optimization, the user's code.

        Raises:
            MisconfigurationException: if gradients are to be clipped by value.
        """
        self._loop_steps = getattr(self.module, "automatic_optimization", True)
        if gradient_clip_val:
            _check_clipping(gradient_clip_algorithm or "norm")

    @property
    def provides_optimizer(self) -> bool:
        """Whether the configuration defines an optimizer, so that the module need not."""
        return "optimizer" in self.config

    def wrap_optimizers(self, optimizers: list[Optimizer], scheduler_configs: list[Any]) -> list[Optimizer]:
        """Make the engine, and return its optimizer.

        Args:
            optimizers: the module's; none, where the configuration defines one.
            scheduler_configs: the module's; one that the configuration defines is added, if there is no other.

        Raises:
            MisconfigurationException: if there are several optimizers, or none.
        """
        given = [optimizer for optimizer in optimizers if optimizer.param_groups]  # what stands for none has none
        if len(given) > 1:
            raise MisconfigurationException(
                f"`configure_optimizers` returned {len(given)} optimizers, and DeepSpeed steps one. Return one, with a parameter group for "
                "each set of parameters, or use another strategy."
            )
        if not given and not self.provides_optimizer:
            raise MisconfigurationException(
                "`configure_optimizers` returned no optimizer, and the DeepSpeed configuration defines none. Return one, or add it to the "
                "configuration: {'optimizer': {'type': 'AdamW', 'params': {'lr': 1e-3}}}."
            )
        config = self._run_config()
        for name, ours in (("optimizer", given), ("scheduler", scheduler_configs)):
            if ours and name in config:
                rank_zero_warn(
                    f"`configure_optimizers` returned a {name}, and the DeepSpeed configuration defines another, which is not used."
                )
                del config[name]
        module = self.module
        assert module is not None
        optimizer = given[0] if given else None
        self.engine = engine = Engine.build(self.root_device, module, config, optimizer, self._loop_steps)
        self.model = engine.raw
        self._deepspeed_precision.scale_loss = engine.scaled
        scheduler, engine.raw.lr_scheduler = engine.raw.lr_scheduler, None  # the loop steps it, as it does all others
        if scheduler is not None:
            scheduler_configs.append(StepwiseScheduler(scheduler))
        return [engine.raw.optimizer]

    def setup_module_and_optimizers(self, module: Module, optimizers: list[Optimizer], scheduler: Any = None) -> tuple[Any, list[Any], Any]:
        """Return engine, optimizers and scheduler for a loop of the user's own; see :meth:`wrap_optimizers`."""
        self.connect(module)
        self.setup_module(module)
        configs: list[Any] = []
        steps = self.wrap_optimizers(optimizers, configs)
        return self.model, list(steps), configs[0].scheduler if configs and scheduler is None else scheduler

    def init_deepspeed(self) -> None:
        """Does nothing: the engine is made when the optimizers are known."""

    def _run_config(self) -> Config:
        batch_size = self.logging_batch_size_per_gpu
        config = complete(self.config, self.precision.policy, self._loss_scaling, batch_size if isinstance(batch_size, int) else None)
        if not self._loop_steps:
            config["managed_gradient_accumulation"] = False  # each step of the optimizer ends a window
            if zero_stage(config) == 1:
                config["zero_optimization"]["overlap_comm"] = False  # nobody knows which backward pass is the last
        return config

    def bind(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module, inside of the engine's forward pass where that has something to do."""
        step = self.method(name)
        if not (name == "training_step" or self.zero_stage_3):
            return step
        step = self.as_forward(self.model, step)
        known = "train_micro_batch_size_per_gpu" in self.config or "train_batch_size" in self.config
        counts = name == "training_step" and self.logging_batch_size_per_gpu == "auto" and not known
        return self._running.counting(step) if counts else step

    def compile_with(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None) -> None:
        if compiler is not None and self.zero_stage_3:
            raise ValueError(
                "ZeRO stage 3 gathers weights in hooks of each module, which can't be compiled with the step. Use stage 1 or 2, FSDP, or "
                "leave out `compile`."
            )
        super().compile_with(compiler)

    def as_forward(self, module: Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, which computes with a module, in place of the engine's forward pass, if the module is an engine."""
        engine = self.engine
        return engine.through(method) if engine is not None and module is engine.raw else method

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def no_backward_sync(self, module: Module | None = None) -> AbstractContextManager[Any]:
        """A context for the batches of an accumulation window before the last one."""
        return self._running.not_at_the_end()

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """Another name of :meth:`no_backward_sync`."""
        return self.no_backward_sync()

    def backward(self, tensor: Tensor, module: Module | None = None, *args: Any, **kwargs: Any) -> None:
        """Run backward through the engine, which scales the loss where the precision needs it, and reduces gradients."""
        self._running.backward(tensor, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Let the engine step, after the closure; without gradients nothing happens."""
        result = None if closure is None else closure()
        self._running.step(**kwargs)
        return result

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, algorithm: Literal["norm", "value"] | str = "norm") -> None:
        """Let the engine clip the gradients of the step to come by their norm, unless its configuration says to what.

        Raises:
            MisconfigurationException: for any other algorithm.
        """
        _check_clipping(algorithm)
        self._running.clip(clip_val)

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not with DeepSpeed, which clips within its step, and knows the norm no earlier.

        Raises:
            MisconfigurationException: always.
        """
        raise MisconfigurationException(
            "DeepSpeed clips gradients within its step. Set 'gradient_clipping' in its configuration instead: "
            "DeepSpeedStrategy(config={..., 'gradient_clipping': 1.0})."
        )

    def scale_gradients(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply the gradients of the step to come; all processes must call it."""
        self._running.scale_gradients(factor)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def sync_buffers(self) -> None:
        """Give every process the buffers of rank 0, such as running statistics."""
        if self.module is not None:
            collectives.broadcast_tensors(self.module.buffers())

    # ---- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Free the module's memory on the device. The engine stays, so that a checkpoint can be saved after the run."""
        self.model = self.module
        for parameter, original in self._rounded:
            parameter.data = original
        self._rounded.clear()
        if self.module is not None and self.layer_sync is not None:
            self.layer_sync.revert(self.module)
        super().teardown()
        if self._set_local_rank:  # to others it says that this process was started as one of several
            os.environ.pop("LOCAL_RANK", None)
            self._set_local_rank = False

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the names of this strategy into a registry."""
        for name, description, arguments in NAMES:
            strategy_registry.register(name, cls, description=description, **arguments)


def _check_clipping(algorithm: Any) -> None:
    if getattr(algorithm, "value", algorithm) != "norm":
        raise MisconfigurationException(
            f"gradient_clip_algorithm={getattr(algorithm, 'value', algorithm)!r}: DeepSpeed clips gradients by their norm only. "
            "Use 'norm', or another strategy."
        )
