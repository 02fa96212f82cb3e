"""DistributedDataParallel: every process holds the whole module, and gradients are averaged while backward runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning.fabric import collectives
from lightning.fabric.strategies.parallel import DEFAULT_LIMIT, DEFAULT_TIMEOUT, ParallelStrategy

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.precision import Precision
    from lightning.fabric.strategies.ddp_between import BetweenPasses

START_METHODS = ("popen", "spawn", "fork", "forkserver")
MOST_OWN_GRADIENTS = 2**28  # bytes, of all processes, that a checkpoint inside of an accumulation window may hold
ONLY_DDP = ("find_unused_parameters", "static_graph", "mixed_precision", "device_mesh", "delay_all_reduce_named_params")
IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # DDP reads this attribute of a module


class DDPStrategy(ParallelStrategy):
    """Train in several processes, each with a copy of the module and a part of the data.

    Gradients are views into the buckets that are averaged (``gradient_as_bucket_view``), which saves a copy of them all,
    unless False is given.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this machine, one for each of its processes.
        cluster_environment: knows the ranks, and where the processes meet.
        checkpoint_io: writes and reads checkpoints.
        precision: the numbers that the module computes with.
        precision_plugin: another name of ``precision``.
        ddp_comm_state: goes to ``ddp_comm_hook`` as its first argument.
        ddp_comm_hook: averages a bucket of gradients in its own way, such as those of
            ``torch.distributed.algorithms.ddp_comm_hooks``.
        ddp_comm_wrapper: makes another hook of ``ddp_comm_hook``, such as ``fp16_compress_wrapper``.
        model_averaging_period: with ``post_localSGD_hook``: every how many steps the weights of all processes are averaged.
        process_group_backend: which library carries collectives; None for what suits the devices.
        timeout: how long a collective may take before it fails.
        watchdog_timeout: how long the processes may go without reaching the next batch before the run is ended; see
            :class:`~lightning.fabric.strategies.parallel.ParallelStrategy`.
        start_method: how the processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        kwargs: go to :class:`~torch.nn.parallel.DistributedDataParallel`, such as ``find_unused_parameters``, ``static_graph``,
            ``bucket_cap_mb`` and ``gradient_as_bucket_view``.

    Raises:
        TypeError: for an argument that neither takes.
        ValueError: for a start method that there isn't, or arguments that need each other.

    Example::

        Trainer(strategy=DDPStrategy(find_unused_parameters=True), devices=4)
    """

    strategy_name = "ddp"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        *,
        precision_plugin: Precision | None = None,
        ddp_comm_state: object | None = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        watchdog_timeout: timedelta | None = DEFAULT_LIMIT,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision or precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            watchdog_timeout=watchdog_timeout,
        )
        _check_arguments(start_method, ddp_comm_hook, ddp_comm_wrapper, model_averaging_period, ddp_comm_state, kwargs)
        self.start_method = start_method
        self._comm_state, self._comm_hook, self._comm_wrapper = ddp_comm_state, ddp_comm_hook, ddp_comm_wrapper
        self._averaging_period = model_averaging_period
        self._averages: dict[Optimizer, Callable[..., None]] = {}
        self._ddp_kwargs: dict[str, Any] = {"gradient_as_bucket_view": True, **kwargs}
        self._prepares_backward = False
        self._bucket_order: list[str] = []  # where it is known: from the run that this one goes on from, or found out
        self._begins_within_window = False
        self._talks_between = False
        self.between: BetweenPasses | None = None  # where no pass of a step may talk

    # ---- setting up -------------------------------------------------------------------------------------------------

    def setup_module(self, module: Module, training: bool = True) -> Module:
        """Return the module converted, on the device, with its weights equal in all processes, and wrapped for training.

        Args:
            module: the user's.
            training: False leaves it unwrapped, for evaluation, which needs no buckets of gradients.
        """
        module = self.precision.convert_module(module)
        self.module_to_device(module)
        if self.layer_sync is not None:
            module = self.layer_sync.apply(module)
        trains = training and any(parameter.requires_grad for parameter in module.parameters())
        if trains and not self._talks_between:
            return self.wrap(module)
        collectives.broadcast_tensors([*module.parameters(), *module.buffers()])
        if trains:
            from lightning.fabric.strategies.ddp_between import BetweenPasses

            self.between = BetweenPasses(module, getattr(module, IGNORED_BY_DDP, ()), self._broadcasts_buffers, self._begins_within_window)
            self._begins_within_window = False
        return module

    def talk_between_passes(self, wanted: bool) -> None:
        """Let modules that are set up from now on talk where :attr:`between` is called, and never within a pass.

        Args:
            wanted: False for DistributedDataParallel again.

        Raises:
            ValueError: if an argument asks for what only DistributedDataParallel does.
        """
        asked = {
            "ddp_comm_hook": self._comm_hook is not None,
            "model_averaging_period": self._averaging_period is not None,
            "SyncBatchNorm": self.layer_sync is not None,
            "init_sync=False": self._ddp_kwargs.get("init_sync") is False,
            **{name: bool(self._ddp_kwargs.get(name)) for name in ONLY_DDP},
        }
        found = [name for name, is_so in asked.items() if is_so]
        if wanted and found:
            raise ValueError(f"{found[0]} communicates, or has to know, within a pass of a step")
        self._talks_between = wanted

    def wrap(self, module: Module) -> DistributedDataParallel:
        """DistributedDataParallel around a module that is on its device."""
        ddp = self._wrapped(Forward(module), device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)
        ddp.require_forward_param_sync, self._begins_within_window = not self._begins_within_window, False
        if self._comm_hook is not None:
            hook = self._comm_hook if self._comm_wrapper is None else self._comm_wrapper(self._comm_hook)
            ddp.register_comm_hook(self._comm_state, hook)
        return ddp

    def _wrapped(self, forward: Forward, **kwargs: Any) -> DistributedDataParallel:
        trained = {name for name, parameter in forward.named_parameters() if parameter.requires_grad}
        if trained == set(self._bucket_order):
            from lightning.fabric.strategies.ddp_buckets import Ordered

            return Ordered(forward, self._bucket_order, **kwargs)
        self._bucket_order = []
        return DistributedDataParallel(forward, **kwargs)

    def configure_ddp(self) -> None:
        """Wrap the module that runs, which is on its device."""
        self.model = self.wrap(self.model)

    def determine_ddp_device_ids(self) -> list[int] | None:
        """What DistributedDataParallel takes as ``device_ids``; None on the CPU."""
        return None if self.root_device.type == "cpu" or self.root_device.index is None else [self.root_device.index]

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if self._averaging_period is not None:
            from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

            averager = PeriodicModelAverager(self._averaging_period, warmup_steps=self._comm_state.start_localSGD_iter)  # type: ignore[union-attr]
            self._averages[optimizer] = averager.average_parameters
        if isinstance(optimizer, torch.optim.LBFGS):
            _decide_alike(optimizer, self.reduce)
        return optimizer

    def bind(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module. Training runs through DDP's forward; evaluation needs no other process."""
        step = self.method(name)
        if name != "training_step" or not isinstance(self.model, DistributedDataParallel):
            return step
        # In manual optimization backward runs within the step, and says so itself through `pre_backward`.
        self._prepares_backward = not getattr(self.module, "automatic_optimization", True)
        return through_ddp(self.model, step, prepares_backward=self._prepares_backward)

    def as_forward(self, module: Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method`` as it runs inside of DDP's forward; as it is where the module is not wrapped."""
        return through_ddp(module, method) if isinstance(module, DistributedDataParallel) else method

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def pre_backward(self, closure_loss: Any) -> None:
        """In manual optimization: tell DDP that a backward pass over ``closure_loss`` comes."""
        if self._prepares_backward:
            prepare_for_backward(self.model, closure_loss)

    def no_backward_sync(self, module: Module | None = None) -> AbstractContextManager[Any]:
        """A context in which backward keeps gradients local; the forward pass belongs into it too.

        Args:
            module: as :meth:`setup_module` returned it; None for the strategy's own.
        """
        model = self.model if module is None else module
        if not isinstance(model, DistributedDataParallel):
            return nullcontext()
        slot = model.module.__dict__
        if model.static_graph and not slot["held_back"]:
            # DDP records a static graph in its first backward pass, which it can't do in `no_sync`. Averaging the first gradients
            # of a window early changes nothing: they are equal everywhere, and so stay what they are in the second average.
            slot["held_back"] = True
            return nullcontext()
        return model.no_sync()

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """Another name of :meth:`no_backward_sync`, for manual optimization."""
        return self.no_backward_sync()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, **kwargs)
        if self._averages:
            # Also after a step that the fp16 scaler left out: every process has to count the same steps.
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._averages[optimizer](trained)
        return result

    def accumulated_gradients(self) -> dict[str, Tensor]:
        """Their means over all processes: with those of the window's other batches they average to the same."""
        assert self.module is not None
        trained = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        zeros = {name: torch.zeros_like(parameter) for name, parameter in trained.items() if parameter.grad is None}
        means = self.reduce_named({name: (zeros.get(name, parameter.grad), "mean") for name, parameter in trained.items()})  # type: ignore[misc]
        return {name: mean for name, mean in means.items() if name not in zeros or mean.any()}

    def own_gradients(self) -> dict[str, Tensor]:
        """Those of this process, with which as many processes go on to the same bits; sums of means would be rounded otherwise.

        Every process gets those of all, so large models do without: :data:`MOST_OWN_GRADIENTS` bytes are the most.
        """
        assert self.module is not None
        found = {name: parameter.grad for name, parameter in self.module.named_parameters() if parameter.grad is not None}
        size = self.world_size * sum(gradient.numel() * gradient.element_size() for gradient in found.values())
        return {name: gradient.cpu() for name, gradient in found.items()} if size <= MOST_OWN_GRADIENTS else {}

    def own_buffers(self) -> dict[str, Tensor]:
        """Those that DDP does not broadcast; inside of an accumulation window, all: it does so after the window."""
        broadcast = self._broadcasts_buffers and not self._within_window()
        ignored = getattr(self.module, IGNORED_BY_DDP, ())
        return {name: buffer for name, buffer in super().own_buffers().items() if not broadcast or name in ignored}

    @property
    def _broadcasts_buffers(self) -> bool:
        return all(self._ddp_kwargs.get(name) is not False for name in ("broadcast_buffers", "forward_sync_buffers"))

    def _within_window(self) -> bool:
        """Whether DDP leaves the buffers of the processes apart in the next forward pass, as it does in an accumulation window."""
        if self.between is not None:
            return self.between.within_window
        return isinstance(self.model, DistributedDataParallel) and not self.model.require_forward_param_sync

    def engine_state(self) -> dict[str, Any]:
        """The order of the buckets, on which the rounding of sums over more than two processes depends, and whether a window is open."""
        state: dict[str, Any] = {"within_window": True} if self._within_window() else {}
        if self.world_size < 3 or not isinstance(self.model, DistributedDataParallel):
            return state
        if not self._bucket_order:
            from lightning.fabric.strategies.ddp_buckets import order_of

            self._bucket_order = order_of(self.model)
        return {**state, "bucket_order": self._bucket_order}

    def expect_engine_state(self, state: Mapping[str, Any]) -> None:
        self._bucket_order = list(state.get("bucket_order", ()))
        self._begins_within_window = bool(state.get("within_window"))

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def sync_buffers(self) -> None:
        """Give every process the buffers of rank 0, such as running statistics, which are those that a checkpoint holds."""
        if self.module is not None and self._ddp_kwargs.get("broadcast_buffers", True):
            ignored = getattr(self.module, IGNORED_BY_DDP, ())
            collectives.broadcast_tensors(buffer for name, buffer in self.module.named_buffers() if name not in ignored)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        self.model, self.between = self.module, None
        self._averages.clear()
        if self.module is not None and self.layer_sync is not None:
            self.layer_sync.revert(self.module)
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the names of this strategy into a registry."""
        unused = {"_find_unused_parameters_false": False, "_find_unused_parameters_true": True}
        for name, start_method in (("ddp", "popen"), ("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork")):
            described = f"DDPStrategy with `start_method={start_method!r}`"
            strategy_registry.register(name, cls, description=described, start_method=start_method)
            for suffix, find in unused.items():
                text = f"{described} and `find_unused_parameters={find}`"
                strategy_registry.register(name + suffix, cls, description=text, start_method=start_method, find_unused_parameters=find)


class Forward(Module):
    """What DistributedDataParallel wraps: its forward is the module's, or one call of any function that was set before.

    So a training step runs between DDP's own work before and after a forward pass, which then needs to know nothing of
    steps, and the step's arguments don't go through DDP, which would copy and convert them.
    """

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        self.__dict__.update(call=None, held_back=False)  # not through Module.__setattr__, which is slow
        if hasattr(module, IGNORED_BY_DDP):
            self.__dict__[IGNORED_BY_DDP] = [f"module.{name}" for name in getattr(module, IGNORED_BY_DDP)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.__dict__["call"]
        if call is None:
            return self.module(*args, **kwargs)
        self.__dict__["call"] = None  # the step itself may call the wrapped module
        return call()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def through_ddp(ddp: DistributedDataParallel, function: Callable[..., Any], prepares_backward: bool = False) -> Callable[..., Any]:
    """``function`` as it runs inside of DDP's forward.

    Args:
        ddp: from :meth:`DDPStrategy.wrap`.
        function: computes with the wrapped module.
        prepares_backward: whether backward runs within the function, after :func:`prepare_for_backward`.
    """
    slot = ddp.module.__dict__

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        slot["call"] = partial(function, *args, **kwargs)
        return ddp(None)  # with device_ids, DDP wants something to move to the device

    @wraps(function)
    def run_with_backward(*args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            output = function(*args, **kwargs)
            ddp.require_backward_grad_sync = False  # after the forward pass DDP would wait for a backward pass that is over
            return output

        slot["call"] = call
        try:
            return ddp(None)
        finally:
            ddp.require_backward_grad_sync = ddp.require_forward_param_sync = True

    return run_with_backward if prepares_backward else run


def prepare_for_backward(model: DistributedDataParallel, output: Any) -> None:
    """Tell DDP that a backward pass comes, where its forward can't know.

    Args:
        model: whose gradients are to be averaged.
        output: the loss, or anything with tensors, from which unused parameters are found.
    """
    if not (torch.is_grad_enabled() and model.require_backward_grad_sync):
        model.require_forward_param_sync = False
        return
    model.require_forward_param_sync = True
    model.reducer._rebuild_buckets()
    searched = model.find_unused_parameters and not model.static_graph
    model.reducer.prepare_for_backward(_tensors_in(output) if searched else [])


def _decide_alike(optimizer: Optimizer, reduce: Callable[[Any], Any]) -> None:
    """Let an optimizer see the mean loss of all processes, whose gradient it has.

    By the loss it decides how long to search and how far to go; by that of each process they would part, and wait for each other.
    """
    step = optimizer.step
    if hasattr(step, "decides_alike"):
        return

    @wraps(step)
    def decide_alike(closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        return step(lambda: reduce(closure()), *args, **kwargs)

    decide_alike.decides_alike = True  # type: ignore[attr-defined]
    optimizer.step = decide_alike  # type: ignore[assignment, method-assign]


def _tensors_in(output: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def _check_arguments(start_method: str, hook: Any, wrapper: Any, averaging_period: int | None, state: Any, kwargs: dict[str, Any]) -> None:
    if start_method not in START_METHODS:
        raise ValueError(f"start_method={start_method!r} is not known. Accepted: {', '.join(map(repr, START_METHODS))}.")
    ours = {"self", "module", "device_ids", "output_device", "process_group", "dim"}
    accepted = [name for name in inspect.signature(DistributedDataParallel.__init__).parameters if name not in ours]
    unknown = [name for name in kwargs if name not in accepted]
    if unknown:
        raise TypeError(
            f"DDPStrategy got the argument {unknown[0]!r}, which neither it nor DistributedDataParallel takes. "
            f"Beyond its own it accepts: {', '.join(accepted)}."
        )
    if wrapper is not None and hook is None:
        raise ValueError("ddp_comm_wrapper was given without the ddp_comm_hook that it wraps. Give both, or leave it out.")
    if averaging_period is not None and not hasattr(state, "start_localSGD_iter"):
        raise ValueError(
            f"model_averaging_period={averaging_period} needs ddp_comm_hook=post_localSGD_hook and a PostLocalSGDState as ddp_comm_state, "
            f"not {state!r}: other hooks average the gradients in every step already."
        )
