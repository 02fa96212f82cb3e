"""Several XLA devices that share the weights of one module: torch_xla's fully sharded data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.checkpoint import sharded
from lightning.fabric.strategies import xla_collectives
from lightning.fabric.strategies.strategy import _skip_init
from lightning.fabric.strategies.xla import XLAStrategy
from lightning.fabric.strategies.xla_device import as_device_data, on_cpu, sync
from lightning.fabric.strategies.xla_shards import Layout, save_divided
from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO
    from lightning.fabric.precision import Precision

Policy = set[type[Module]] | Callable[[Module, bool, int], bool]

STATE_DICT_TYPES = ("full", "sharded")


class XLAFSDPStrategy(XLAStrategy):
    """Train on several XLA devices, each of which holds a part of the weights, gradients and optimizer states.

    The weights of a layer are gathered for as long as it computes, by
    :class:`torch_xla.distributed.fsdp.XlaFullyShardedDataParallel`. They are kept in float32; in half precision they are gathered
    and computed with in that. The module is built on the host, and only parts of it get to the device.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this machine.
        checkpoint_io: writes and reads checkpoints.
        precision: the numbers that the module computes with.
        auto_wrap_policy: which submodules are gathered by themselves: a set of classes, or a function of torch_xla's. The rest is
            gathered at once.
        activation_checkpointing_policy: a set of classes. What their modules compute in the forward pass is computed anew for the
            backward pass, rather than kept.
        state_dict_type: ``"full"`` writes checkpoints as one file, ``"sharded"`` as a directory to which each process writes its parts.
        sequential_save: with sharded checkpoints, one process after another copies its parts to the host.
        precision_plugin: another name of ``precision``.
        debug: let torch_xla print why it compiles programs and runs them.
        kwargs: go to XlaFullyShardedDataParallel, such as ``reshard_after_forward`` and ``flatten_parameters``.

    Raises:
        ModuleNotFoundError: without ``torch_xla``.
        ValueError: for another ``state_dict_type``, or policies that contradict ``kwargs``.

    Example::

        Trainer(accelerator="tpu", devices=8, strategy=XLAFSDPStrategy(auto_wrap_policy={Block}))
    """

    strategy_name = "xla_fsdp"
    forward_is_collective = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        auto_wrap_policy: Policy | None = None,
        activation_checkpointing_policy: set[type[Module]] | None = None,
        state_dict_type: Literal["full", "sharded"] = "sharded",
        sequential_save: bool = False,
        *,
        precision_plugin: Precision | None = None,
        debug: bool = False,
        **kwargs: Any,
    ) -> None:
        if state_dict_type not in STATE_DICT_TYPES:
            raise ValueError(f"state_dict_type={state_dict_type!r} is not known. Accepted: {', '.join(map(repr, STATE_DICT_TYPES))}.")
        if activation_checkpointing_policy is not None and "auto_wrapper_callable" in kwargs:
            raise ValueError(
                "activation_checkpointing_policy and auto_wrapper_callable both say how modules are wrapped. Leave one of them out."
            )
        super().__init__(accelerator, parallel_devices, checkpoint_io, precision, precision_plugin=precision_plugin, debug=debug)
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing_policy = activation_checkpointing_policy
        self.state_dict_type = state_dict_type
        self.sequential_save = sequential_save
        self._fsdp_kwargs = kwargs
        self._layouts: list[Layout] = []
        self._handles: list[Any] = []

    # ---- setting up -------------------------------------------------------------------------------------------------

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """A context to build a module in: on the host, in float32."""
        with _skip_init() if empty_init else nullcontext():
            yield

    def setup_module(self, module: Module, training: bool = True) -> Module:
        """Return torch_xla's FSDP around the module, whose weights are those of rank 0 everywhere.

        Raises:
            MisconfigurationException: for weights that are not in float32, or manual optimization.
        """
        self._check(module)
        for tensor in (*module.parameters(), *module.buffers()):
            self._take_from_rank_zero(tensor)
        layout = Layout(module)
        layout.find(self._wrap(module))
        self._layouts.append(layout)
        if self.world_size > 1:
            self._gather_apart(layout.root)
        if training:
            self._trained.append(module)
        return layout.root  # type: ignore[no-any-return]

    def _check(self, module: Module) -> None:
        if self.layer_sync is not None:
            raise MisconfigurationException("sync_batchnorm=True was given, which XLAFSDPStrategy can't do. Leave it out.")
        if not getattr(module, "automatic_optimization", True):
            raise MisconfigurationException(
                "XLAFSDPStrategy gathers weights for one training_step and reduces gradients after it, so backward can't run within it: "
                "automatic_optimization=False is not possible. Use XLAStrategy, or a loop of your own with Fabric."
            )
        other = next((f"{name!r} in {p.dtype}" for name, p in module.named_parameters() if p.dtype != torch.float32), None)
        if other is not None:
            raise MisconfigurationException(
                f"XLAFSDPStrategy keeps weights in float32, and the module has {other}. Leave the module as it is built, and say "
                "precision='bf16-true' to compute in half precision."
            )

    def _take_from_rank_zero(self, tensor: Tensor) -> None:
        """Overwrite a tensor of the host with that of rank 0; one at a time is on the device."""
        if self.world_size > 1 and not tensor.is_meta:
            sent = as_device_data(tensor.detach().cpu(), self.root_device)
            xla_collectives.broadcast_tensors([sent])
            with torch.no_grad():
                tensor.copy_(sent.cpu())

    def _wrap(self, module: Module) -> Any:
        from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel as FSDP
        from torch_xla.distributed.fsdp import checkpoint_module
        from torch_xla.distributed.fsdp.wrap import transformer_auto_wrap_policy

        for submodule in list(module.modules()):
            if isinstance(submodule, tuple(self.activation_checkpointing_policy or ())):
                checkpoint_module(submodule)
        policy = self.auto_wrap_policy
        if isinstance(policy, (set, frozenset)):
            policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=policy)
        options: dict[str, Any] = {"auto_wrap_policy": policy, "compute_dtype": self.precision.policy.param_dtype}
        if self.cluster_environment.is_stand_in():  # type: ignore[union-attr]
            options["pin_layout_in_collective_ops"] = False  # which would put the rank into programs that have to be equal
        return FSDP(Outermost(module), **{**options, **self._fsdp_kwargs})

    def _gather_apart(self, root: Any) -> None:
        """In evaluation, gather the weights of each unit in a program of its own, which has to be the same in all processes.

        What computes with them is another one where a process has fewer samples in its last batch.
        """
        for unit in [each for each in root.modules() if hasattr(each, "sharded_params")]:
            before = partial(_before_gathering, barrier=unit.optimization_barrier_in_forward)
            self._handles += [unit.register_forward_pre_hook(before), unit.module.register_forward_pre_hook(_sync_in_evaluation)]

    def as_forward(self, module: Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, which computes with a module that was set up, as it runs with gathered weights."""
        layout = self._layout_of(module)
        if layout is None:
            return method
        slot = layout.root.module.module.__dict__

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            slot["call"] = method
            result = layout.root(*args, **kwargs)
            if not torch.is_grad_enabled():
                sync()  # else what one process reads of the result would be gathered by that one alone
            return result

        return run

    def bind(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module, with gathered weights."""
        assert self.module is not None
        return self.as_forward(self.module, getattr(self.module, name))

    def _layout_of(self, module: Module | None) -> Layout | None:
        """How a module is divided, which is the user's or as :meth:`setup_module` returned it."""
        return next((layout for layout in self._layouts if module in (layout.module, layout.root)), None)

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def average_gradients(self, parameters: Any) -> None:
        """Nothing to do: gradients are reduced while backward runs."""

    def no_backward_sync(self, module: Module | None = None) -> AbstractContextManager[Any]:
        """A context in which backward keeps gradients local, and whole, until the last batch of an accumulation window."""
        layout = self._layout_of(self.module if module is None else module)
        return nullcontext() if layout is None else layout.root.no_sync()

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, algorithm: Literal["norm", "value"] | str = "norm") -> None:
        """Clip the gradients of the optimizer's parameters, by the norm of those of all processes, or by value."""
        if algorithm == "norm" and clip_val > 0:
            self.precision.unscale_gradients(optimizer)
            self._clip_norm(optimizer, clip_val)
        else:
            super().clip_gradients(optimizer, clip_val, algorithm)

    def clip_gradients_norm(
        self, module: Module, optimizer: Optimizer, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
    ) -> Tensor:
        self.precision.unscale_gradients(optimizer)
        norm = self._clip_norm(optimizer, max_norm, norm_type)
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise RuntimeError(
                f"The norm of order {norm_type} of the gradients is {float(norm)}, so they can't be clipped. Pass error_if_nonfinite=False "
                "to scale them all the same."
            )
        return norm

    def _clip_norm(self, optimizer: Optimizer, max_norm: float, norm_type: float = 2.0) -> Tensor:
        import torch_xla.core.xla_model as xm

        gradients = [parameter.grad for parameter in self.precision.main_params(optimizer) if parameter.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.root_device)
        infinite = norm_type == float("inf")
        norms = torch.stack([torch.linalg.vector_norm(gradient, norm_type) for gradient in gradients])
        local = norms.max() if infinite else norms.pow(norm_type).sum()
        total: Tensor = xm.all_reduce(xm.REDUCE_MAX if infinite else xm.REDUCE_SUM, local)
        norm = total if infinite else total.pow(1.0 / norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    # ---- state ------------------------------------------------------------------------------------------------------

    def sync_buffers(self) -> None:
        """Give every process the buffers of rank 0."""
        layout = self._layout_of(self.module)
        if self.world_size > 1 and layout is not None:
            xla_collectives.broadcast_tensors(holder._buffers[name] for holder, name, _ in layout.buffers.values())

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The weights of a module, gathered on rank 0, or, for a sharded checkpoint, as they are divided; every process must call it."""
        layout = self._layout_of(module)
        if layout is None:
            return super().get_module_state_dict(module)
        return layout.state_dict(whole=self.state_dict_type == "full", keep=self.is_global_zero or self.state_dict_type == "sharded")

    def load_module_state_dict(self, module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        layout = self._layout_of(module)
        if layout is None:
            super().load_module_state_dict(module, state_dict, strict)
        else:
            layout.load_state_dict(state_dict, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        layout = self._layout_with(optimizer)
        if layout is None:
            return super().optimizer_state(optimizer)
        return layout.optimizer_state(optimizer, self.state_dict_type == "full", self.is_global_zero)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        layout = self._layout_with(optimizer)
        if layout is None:
            super().load_optimizer_state(optimizer, state)
        else:
            layout.load_optimizer_state(optimizer, state)

    def _layout_with(self, optimizer: Optimizer) -> Layout | None:
        """How the module is divided whose parameters an optimizer steps."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return next((layout for layout in self._layouts if any(layout.of(parameter) is not None for parameter in parameters)), None)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint as one file, or as a directory: all of it, or nothing.

        Raises:
            TypeError: for storage options with sharded checkpoints.
        """
        if self.state_dict_type == "full" or not self._layouts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError(
                f"storage_options={storage_options!r} was given, and sharded checkpoints are written by all processes, past it. Leave it "
                "out, or use XLAFSDPStrategy(state_dict_type='full')."
            )
        sync()
        save_divided(on_cpu(checkpoint), filepath, self.global_rank, self.sequential_save)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of either form and of any strategy, whole and to the CPU."""
        if sharded.is_sharded_checkpoint(checkpoint_path):
            return sharded.read_sharded(checkpoint_path, "cpu", weights_only)  # type: ignore[no-any-return]
        return super().load_checkpoint(checkpoint_path, weights_only)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Make modules whole again, on the CPU of rank 0; the others get zeros. After an error of several processes they stay divided."""
        if not (self._failed and self.world_size > 1):
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for layout in self._layouts:
                self._make_whole(layout)
            self._layouts.clear()
            self.model = self.module
        super().teardown()

    def _make_whole(self, layout: Layout) -> None:
        state: Mapping[str, Any] = layout.state_dict(whole=True, keep=self.is_global_zero)
        optimizers = [optimizer for optimizer in self.optimizers if self._layout_with(optimizer) is layout]
        states = [layout.optimizer_state(optimizer, True) for optimizer in optimizers] if self.world_size == 1 else []
        if not self.is_global_zero:
            shapes = {piece.name: piece.shape for each in layout.divided for piece in each.pieces}
            state = {first: torch.zeros(()).expand(shapes[first]) for first in layout.aliases.values()}
        whole = layout.restore(state)
        for optimizer, saved in zip(optimizers, states):
            for group in optimizer.param_groups:
                group["params"] = [whole.get(parameter, parameter) for parameter in group["params"]]
            optimizer.state.clear()
            optimizer.load_state_dict(saved)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the name of this strategy into a registry."""
        strategy_registry.register("xla_fsdp", cls, description=cls.__name__)


def _before_gathering(unit: Any, inputs: Any, barrier: bool) -> None:
    unit.optimization_barrier_in_forward = barrier and torch.is_grad_enabled()  # it would make inputs a part of the program
    _sync_in_evaluation()


def _sync_in_evaluation(*_: Any) -> None:
    if not torch.is_grad_enabled():
        sync()


class Outermost(Module):
    """What FSDP wraps: its forward is the module's, or one call of any function that was set before."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module
        self.__dict__["call"] = None  # not through Module.__setattr__, which is slow

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.__dict__["call"]
        if call is None:
            return self.module(*args, **kwargs)
        self.__dict__["call"] = None  # the function itself may call the wrapped module
        return call(*args, **kwargs)
