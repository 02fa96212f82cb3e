"""FSDP2: weights, gradients and optimizer states are divided among the processes, and gathered a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.strategies import fsdp_options, fsdp_units, sharding
from lightning.fabric.strategies.fsdp_module import Plan, Root, WholeParameters, divide, root_of
from lightning.fabric.strategies.meta_device import materialize
from lightning.fabric.strategies.parallel import DEFAULT_LIMIT, DEFAULT_TIMEOUT
from lightning.fabric.strategies.sharded import ShardedStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.precision import Precision

STATE_DICT_TYPES = ("full", "sharded")


class FSDPStrategy(ShardedStrategy):
    """Train in several processes, each with a part of every weight and a part of the data (``torch.distributed.fsdp.fully_shard``).

    The modules that ``auto_wrap_policy`` chooses are gathered one after the other, when their turn comes, so it should choose the
    blocks that make up most of the model.

    With ``precision="bf16-mixed"`` or ``"16-mixed"`` on GPUs, weights are gathered in the low precision, and operations choose theirs
    as under autocast elsewhere. Parts that compute in float32 inside ``torch.autocast(enabled=False)`` then need weights of their own
    precision: pass ``mixed_precision=MixedPrecisionPolicy()``, which gathers float32. To have all operations in the low precision, pass
    ``MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)`` with ``precision=32``.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this machine, one for each of its processes.
        cluster_environment: knows the ranks, and where the processes meet.
        checkpoint_io: writes and reads checkpoints that are one file.
        precision_plugin: the numbers that the module computes with.
        process_group_backend: which library carries collectives; None for what suits the devices.
        timeout: how long a collective may take before it fails.
        cpu_offload: keep weights, gradients and optimizer states on the host: True, a ``CPUOffload``, or a ``CPUOffloadPolicy``.
        mixed_precision: a ``MixedPrecisionPolicy``, or a ``MixedPrecision`` of the first FSDP; None for what the precision asks for.
        auto_wrap_policy: a set of classes of modules, or a policy of ``torch.distributed.fsdp.wrap``.
        activation_checkpointing: another name of ``activation_checkpointing_policy``.
        activation_checkpointing_policy: the modules whose activations are computed again in the backward pass: classes, or a policy.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"``: weights stay gathered from the forward to the backward pass;
            ``"HYBRID_SHARD"``: weights are divided within each machine (or as ``device_mesh`` says), and machines hold copies;
            ``"_HYBRID_SHARD_ZERO2"``: both; ``"NO_SHARD"``: every process holds all weights.
        state_dict_type: ``"full"`` writes checkpoints as one file, ``"sharded"`` as a directory to which each process writes its parts.
            Either is read under every strategy and number of processes.
        device_mesh: for the hybrid strategies: ``(copies, shards)``, or a DeviceMesh of these dimensions.
        precision: another name of ``precision_plugin``.
        watchdog_timeout: how long the processes may go without reaching the next batch before the run is ended; see
            :class:`~lightning.fabric.strategies.parallel.ParallelStrategy`.
        kwargs: of FSDP2: ``reshard_after_forward``, ``shard_placement_fn``, ``ignored_params``, ``reduce_scatter_unused_params``; of the
            first FSDP: ``ignored_modules``, ``ignored_states``, ``forward_prefetch``, ``param_init_fn`` (initialises what a module on
            the meta device owns), ``sync_module_states`` (whether all processes begin with the weights of rank 0; False: they do already).

    Raises:
        TypeError: for an argument that nobody knows.
        ValueError: for what FSDP2 can't express, and for arguments that contradict each other.

    Example::

        Trainer(strategy=FSDPStrategy(auto_wrap_policy={Block}), devices=8, precision="bf16-true")
    """

    strategy_name = "fsdp"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: Any = None,
        activation_checkpointing: Any = None,
        activation_checkpointing_policy: Any = None,
        sharding_strategy: Any = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "full",
        device_mesh: Any = None,
        *,
        precision: Precision | None = None,
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
        if state_dict_type not in STATE_DICT_TYPES:
            raise ValueError(f"state_dict_type={state_dict_type!r} is not known. Accepted: {', '.join(map(repr, STATE_DICT_TYPES))}.")
        self.options = fsdp_options.read_options(
            auto_wrap_policy,
            activation_checkpointing,
            activation_checkpointing_policy,
            mixed_precision,
            cpu_offload,
            sharding_strategy,
            device_mesh,
            kwargs,
        )
        self.saves_directories = state_dict_type == "sharded"
        self.device_mesh: Any = None  # of the run, once the processes have met
        self._roots: list[Root] = []
        self._handles: list[Any] = []

    # ---- what was asked for -----------------------------------------------------------------------------------------

    @property
    def state_dict_type(self) -> str:
        """The form of checkpoints: ``"full"`` or ``"sharded"``."""
        return "sharded" if self.saves_directories else "full"

    @property
    def sharding_strategy(self) -> str:
        """What is divided: ``"FULL_SHARD"``, ``"SHARD_GRAD_OP"``, ``"HYBRID_SHARD"``, ``"_HYBRID_SHARD_ZERO2"`` or ``"NO_SHARD"``."""
        return self.options.sharding_strategy

    @property
    def mixed_precision_config(self) -> Any:
        """The MixedPrecisionPolicy of all units."""
        return fsdp_options.mixed_precision_policy(self.options, self.precision.policy, self.root_device)

    @property
    def offloads(self) -> bool:
        """Whether what is divided is kept in the memory of the host."""
        return hasattr(fsdp_options.offload_policy(self.options, self.root_device), "pin_memory")

    # ---- setting up -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        super().setup_environment()
        self._build_mesh()

    def _build_mesh(self) -> Any:
        if self.device_mesh is None:
            self.device_mesh = fsdp_options.build_mesh(self.options, self.root_device, self.world_size, self.num_nodes)
        return self.device_mesh

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """A context to build a module in: in the precision of the run, and on the host, from where each process takes its part.

        Args:
            empty_init: build it on the ``meta`` device, without memory: for a model larger than a device's, or the host's. It gets its
                weights when it is divided, from the ``reset_parameters`` of each layer, and from the checkpoint, if one is loaded.
        """
        with torch.device("meta" if empty_init else "cpu"), self.precision.module_init_context():
            yield

    def setup_module(self, module: Module, training: bool = True) -> Module:
        """Return the module, its weights divided in place: those that all processes begin with are rank 0's.

        A module that is divided already, by an earlier run or by ``fully_shard`` in ``configure_model``, stays so.

        Args:
            module: the user's, on any device, the ``meta`` device too.
            training: whether it will be trained, rather than only evaluated.

        Raises:
            ValueError: if the policy chooses no module, or weights that can't be gathered together.
        """
        from torch.distributed.fsdp import FSDPModule

        self._build_mesh()
        root = root_of(module)
        if root is not None:
            self.module_to_device(module)
            root.discard_gradients()
            self._roots.append(root)
            return module
        divided = any(isinstance(part, FSDPModule) for part in module.modules())
        module = self.precision.convert_module(module)
        module = self._synchronize_layers(module, divided)
        if not any(True for _ in module.parameters()):
            self.module_to_device(module)
            return module
        self._checkpoint_activations(module)
        plan = self._plan(module, divided)
        divide(module, plan)
        without_value = materialize(module, self.root_device, self.offloads, self.options.extra.get("param_init_fn"))
        try:
            root = Root(module, WholeParameters(module, plan.whole, self.device_mesh))
        except AssertionError as error:
            raise ValueError(fsdp_units.explain(module, error)) from error
        root.without_value = without_value
        self._prepare(root)
        scaler = getattr(self.precision, "grad_scaler", None) if self.precision.policy.scaler else None
        if scaler is not None:
            sharding.make_scaler_agree(scaler)
        return module

    def module_to_device(self, module: Module) -> None:
        """Move the module to the device of this process; weights that are kept on the host stay there."""

        def move(tensor: Tensor) -> Tensor:
            return tensor if self.offloads and sharding.is_dtensor(tensor) else tensor.to(self.root_device)

        module._apply(move)

    def _synchronize_layers(self, module: Module, divided: bool) -> Module:
        if self.layer_sync is None:
            return module
        if divided:
            rank_zero_warn(
                "Parts of the module were given to `fully_shard` already, so its layers can't be synchronised: do so before that."
            )
            return module
        from torch.nn.modules.batchnorm import _BatchNorm

        for layer in module.modules():
            if isinstance(layer, _BatchNorm):  # what takes its place depends on the device that it is on
                if any(tensor.is_meta for tensor in layer.parameters()):
                    layer.to_empty(device=self.root_device)
                    layer.reset_parameters()
                layer.to(self.root_device)
        return self.layer_sync.apply(module)

    def _checkpoint_activations(self, module: Module) -> None:
        """Compute activations again in backward, inside of what gathers weights, so that they are there for it."""
        policy = self.options.checkpoint_policy
        for part in [] if policy is None else fsdp_options.selected(policy, module):
            if not isinstance(vars(part).get("forward"), partial):
                vars(part)["forward"] = partial(_checkpointed, part.forward)

    def _plan(self, module: Module, divided: bool) -> Plan:
        options = self.options
        policy = self.mixed_precision_config
        ignored = fsdp_options.ignored_parameters(options, module)
        whole = (
            []
            if divided
            else [
                (part, name) for part, name in fsdp_units.undividable(module, policy.param_dtype) if part._parameters[name] not in ignored
            ]
        )
        arguments = {
            "mesh": fsdp_units.mesh_of(module) or self.device_mesh,
            "mp_policy": policy,
            "offload_policy": fsdp_options.offload_policy(options, self.root_device),
            "reshard_after_forward": options.reshard_after_forward,
            "shard_placement_fn": options.extra.get("shard_placement_fn"),
        }
        units = fsdp_units.choose_units(module, options.wrap_policy, divided, ignored)
        return Plan(arguments, self.root_device, units, ignored, whole, options.extra.get("sync_module_states", True))

    def _prepare(self, root: Root) -> None:
        extra = self.options.extra
        if extra.get("reduce_scatter_unused_params"):
            root.module.set_reduce_scatter_unused_params(True)
        if extra.get("forward_prefetch"):
            for unit, following in zip(root.units, root.units[1:]):
                unit.set_modules_to_forward_prefetch([following])
        root.convert_buffers(getattr(self.options.mixed_precision, "buffer_dtype", None))
        self._roots.append(root)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer, which from now on finds no gathered weights when it steps.

        Raises:
            ValueError: if it holds parameters that the module had before it was divided.
            MisconfigurationException: if it can't step divided and plain parameters together, and has both.
        """
        parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        mine = []
        for root in self._roots:
            root.reshard()
            if not parameters.isdisjoint(root.module.parameters()):
                mine.append(root)
        if self._roots and not mine:
            raise ValueError(
                f"The {type(optimizer).__name__} holds none of the module's parameters: they became others when the module was divided. "
                "Create optimizers in `configure_optimizers`, or after the module was set up."
            )
        self._prepare_to_step(optimizer)
        for root in mine:
            self._handles += [optimizer.register_step_pre_hook(root.before_step), optimizer.register_step_post_hook(root.after_step)]
        return optimizer

    def bind(self, name: str) -> Callable[..., Any]:
        """The function ``name`` of the module, to be called as it runs with gathered weights.

        Raises:
            RuntimeError: if the module was built on the meta device, and some of its tensors never got a value.
        """
        assert self.module is not None
        step = self.method(name)
        manual = name == "training_step" and not getattr(self.module, "automatic_optimization", True)
        return self._entering(self.module, step, manual)

    def as_forward(self, module: Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, which computes with a module that was set up, as it runs with gathered weights."""
        return self._entering(module, method)

    def _entering(self, module: Module, function: Callable[..., Any], manual: bool = False) -> Callable[..., Any]:
        root = root_of(module)
        if root is None:
            return function
        if root.without_value:
            raise RuntimeError(
                f"The module was built on the meta device, and nothing gave values to {', '.join(map(repr, root.without_value[:8]))}. "
                "Give the modules that hold them a method `reset_parameters`, pass FSDPStrategy(param_init_fn=...), or load a checkpoint."
            )
        return root.through(function, manual)

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def pre_backward(self, closure_loss: Any) -> None:
        """In manual optimization: let gradients be reduced in the backward pass over ``closure_loss``."""
        root = root_of(self.module)
        if root is not None and root.manual:
            root.before_backward(closure_loss)

    def no_backward_sync(self, module: Module | None = None) -> AbstractContextManager[Any]:
        """A context in which backward keeps gradients local, and whole, until the last batch of an accumulation window.

        Args:
            module: as :meth:`setup_module` returned it; None for the strategy's own.
        """
        root = root_of(self.module if module is None else module)
        return nullcontext() if root is None else _WithoutSync(root)

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """Another name of :meth:`no_backward_sync`, for manual optimization."""
        return self.no_backward_sync()

    # ---- state ------------------------------------------------------------------------------------------------------

    def reshard(self, module: Module) -> None:
        """Let go of weights that are gathered, so that the module has those that optimizers and checkpoints know."""
        root = root_of(module)
        if root is not None:
            root.reshard()

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        state, root = super().get_module_state_dict(module), root_of(module)
        for name, dtype in {} if root is None else root.buffer_dtypes.items():
            if name in state:
                state[name] = state[name].to(dtype)
        return state

    def load_module_state_dict(self, module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        super().load_module_state_dict(module, state_dict, strict)
        root = root_of(module)
        if root is not None:
            root.without_value = [name for name in root.without_value if name not in state_dict]

    def mean_gradients(self) -> dict[str, Tensor]:
        root = root_of(self.module)
        return {} if root is None else root.accumulated_gradients()

    # ---- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Bring what this process holds back to the host. The module stays divided, for a next run of the same processes."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for root in self._roots:
            root.reset()
        self._roots.clear()
        self.model = self.module
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the names of this strategy into a registry."""
        strategy_registry.register("fsdp", cls, description="FSDP2: weights, gradients and optimizer states divided among processes")
        strategy_registry.register("fsdp_cpu_offload", cls, description="the same, kept in the memory of the host", cpu_offload=True)


class _WithoutSync:
    """A context that costs no more than setting a few attributes."""

    def __init__(self, root: Root) -> None:
        self.root = root

    def __enter__(self) -> None:
        self.root.set_gradient_sync(False)

    def __exit__(self, *exception: Any) -> None:
        self.root.set_gradient_sync(True)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
