"""Several XLA devices: every one holds the whole module, and gradients are averaged after backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.plugins.environments.xla import XLAEnvironment
from lightning.fabric.strategies import xla_collectives
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.strategies.single_xla import DEBUG_VARIABLE
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.strategies.xla_device import XLADeviceStrategy, current_device, require_torch_xla, sync
from lightning.fabric.strategies.xla_loader import XLALoader
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO
    from lightning.fabric.precision import Precision

TBroadcast = TypeVar("TBroadcast")


class XLAStrategy(XLADeviceStrategy, ParallelStrategy):
    """Train on several XLA devices, such as the chips of a TPU, each with a copy of the module and a part of the data.

    torch_xla starts the processes, from copies of this one: it uses one device of a machine, or all.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this machine.
        checkpoint_io: writes and reads checkpoints.
        precision: the numbers that the module computes with.
        precision_plugin: another name of ``precision``.
        debug: let torch_xla print why it compiles programs and runs them.
        sync_module_states: begin with the weights and buffers of rank 0 everywhere.

    Raises:
        ModuleNotFoundError: without ``torch_xla``.

    Example::

        Trainer(accelerator="tpu", devices=8, strategy="xla")
    """

    strategy_name = "xla"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        *,
        precision_plugin: Precision | None = None,
        debug: bool = False,
        sync_module_states: bool = True,
    ) -> None:
        require_torch_xla(type(self).__name__)
        super().__init__(accelerator, parallel_devices, XLAEnvironment(), checkpoint_io, precision or precision_plugin)
        self.debug = debug
        self.sync_module_states = sync_module_states
        self._trained: list[Module] = []
        self._holds_back = False  # whether gradients stay local
        self._averaged = False  # whether those of the current step are averaged
        self._failed = False

    # ---- where this process is --------------------------------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        """Whether this is a process of the run, rather than the one that starts them."""
        return isinstance(self.cluster_environment, XLAEnvironment) and self.cluster_environment.is_started

    @property
    def root_device(self) -> torch.device:
        if self.is_started:
            return current_device()
        return self.parallel_devices[0] if self.parallel_devices else torch.device("xla", 0)

    @property
    def process_group_backend(self) -> str | None:
        """None: torch_xla carries collectives by itself."""
        return None

    def set_world_ranks(self) -> None:
        """Tell this process its rank; where several devices are threads of one process, the launcher has told them."""
        if self.is_started and isinstance(rank_zero_only.rank, int):  # type: ignore[attr-defined]
            rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def configure_launcher(self) -> None:
        """Let torch_xla start the processes, if there is more than one device."""
        if self.num_processes == 1 or self.is_started:
            self.launcher = None
            return
        from lightning.fabric.launchers.xla import XLALauncher

        assert isinstance(self.cluster_environment, XLAEnvironment)
        variables = {DEBUG_VARIABLE: "1"} if self.debug else {}
        self.launcher = XLALauncher(self.cluster_environment, self.num_processes, num_nodes=self.num_nodes, variables=variables)

    # ---- setting up -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Make the device ready."""
        if not self.is_started:
            if self.debug:
                os.environ[DEBUG_VARIABLE] = "1"
            import torch_xla

            torch_xla.device(self.root_device.index)
        self._failed = False
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Nothing to do: torch_xla's processes have met."""

    def setup_module(self, module: Module, training: bool = True) -> Module:
        """Return the module converted, and on the device; with ``sync_module_states`` with its weights equal in all processes.

        Raises:
            MisconfigurationException: if batch normalisation is to be synchronised.
        """
        if self.layer_sync is not None:
            raise MisconfigurationException(
                f"{type(self.layer_sync).__name__} (sync_batchnorm=True) was given, and {type(self).__name__} can't synchronise layers: "
                "torch's need a process group. Leave it out."
            )
        module = Strategy.setup_module(self, module, training)
        if self.sync_module_states:
            self.broadcast_states(module)
        if training:
            self._trained.append(module)
        return module

    def broadcast_states(self, module: Module) -> None:
        """Overwrite weights and buffers with those of rank 0."""
        if self.world_size > 1:
            xla_collectives.broadcast_tensors([*module.parameters(), *module.buffers()])

    def process_dataloader(self, dataloader: Any) -> Any:
        """Return a loader that uploads batches in the background; hooks for data see batches that are on the device."""
        return XLALoader(dataloader, self.root_device)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Return the batch on the device, where the loader has brought it already, unless the user has made another."""
        return move_data_to_device(batch, device or self.root_device)

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def backward(self, tensor: Tensor, module: Module | None = None, *args: Any, **kwargs: Any) -> None:
        """Run backward on a scalar, and average the gradients over all processes, unless they are held back."""
        super().backward(tensor, module, *args, **kwargs)
        if not self._holds_back:
            self.average_gradients(parameter for module in self._trained for parameter in module.parameters())
            self._averaged = True

    def average_gradients(self, parameters: Any) -> None:
        """Average the gradients over all processes. What is equal everywhere stays what it is."""
        if self.world_size == 1:
            return
        import torch_xla.core.xla_model as xm

        # Not in place, as in `xm.reduce_gradients`: torch_xla 2.9 loses what happens in place to a gradient that was added to before, so
        # that the optimizer would see the local gradients of an accumulation window.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        averaged = [gradient.detach().clone() for gradient in gradients]
        if gradients:
            xm.all_reduce(xm.REDUCE_SUM, averaged, scale=1.0 / self.world_size)
        with torch.no_grad():
            for gradient, mean in zip(gradients, averaged):
                gradient.copy_(mean)

    def _average_if_due(self, optimizer: Optimizer) -> None:
        """Average gradients of a backward pass that the user has run by other means than :meth:`backward`."""
        if not self._averaged:
            self.average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
            self._averaged = True

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer with a closure that computes the gradients, and send all of it to the device."""

        def averaged() -> Any:
            result = closure()  # type: ignore[misc]
            self._average_if_due(optimizer)
            return result

        if closure is None:
            self._average_if_due(optimizer)
        result = super().optimizer_step(optimizer, None if closure is None else averaged, **kwargs)
        self._averaged = False
        return result

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, algorithm: Literal["norm", "value"] | str = "norm") -> None:
        """Clip the gradients, which have been averaged, by their norm or by value."""
        self._average_if_due(optimizer)
        super().clip_gradients(optimizer, clip_val, algorithm)

    def no_backward_sync(self, module: Module | None = None) -> AbstractContextManager[Any]:
        """A context in which backward keeps gradients local."""
        return self._held_back()

    @contextmanager
    def _held_back(self) -> Generator[None, None, None]:
        outer, self._holds_back = self._holds_back, True
        try:
            yield
        finally:
            self._holds_back = outer

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """Another name of :meth:`no_backward_sync`."""
        return self.no_backward_sync()

    # ---- processes --------------------------------------------------------------------------------------------------

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over all processes."""
        self._refuse_group(group)
        if self.world_size == 1:
            return tensor
        if self.before_gathering is not None:
            self.before_gathering(tensor, False)
        return xla_collectives.reduce(tensor, reduce_op)

    def reduce_named(self, values: Mapping[str, tuple[Tensor, str]], group: Any = None) -> dict[str, Tensor]:
        """Reduce many values, each with those of the same name."""
        self._refuse_group(group)
        return Strategy.reduce_named(self, values) if self.world_size == 1 else xla_collectives.reduce_named(values)

    def compare(self, kinds: Mapping[str, str], details: Any = None) -> list[Any] | None:
        return None if self.world_size == 1 else xla_collectives.compare(kinds, details)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self._refuse_group(group)
        if self.world_size == 1:
            return tensor
        if self.before_gathering is not None:
            self.before_gathering(tensor, True)
        return xla_collectives.all_gather(tensor, sync_grads)

    def gather_objects(self, obj: Any) -> list[Any]:
        return [obj] if self.world_size == 1 else xla_collectives.gather_object(obj)

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return obj if self.world_size == 1 else xla_collectives.broadcast(obj, src)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Wait until all processes are here, and have computed what was recorded."""
        if self.world_size > 1:
            xla_collectives.barrier()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self.world_size == 1 else xla_collectives.reduce_boolean_decision(decision, all)

    def sync_buffers(self) -> None:
        """Give every process the buffers of rank 0, such as running statistics, which are those that a checkpoint holds."""
        if self.world_size > 1 and self.module is not None:
            xla_collectives.broadcast_tensors(self.module.buffers())

    def _refuse_group(self, group: Any) -> None:
        if group is not None:
            raise ValueError(f"group={group!r} was given; {type(self).__name__} talks to all processes at once. Leave it out.")

    # ---- the end ----------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Remember that this process has failed: what is recorded may wait for others, and is never computed."""
        self._failed = True

    def teardown(self) -> None:
        if self._failed and self.world_size > 1:
            return
        sync()
        super().teardown()
        self._trained.clear()
        if self.debug:
            os.environ.pop(DEBUG_VARIABLE, None)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the names of this strategy into a registry."""
        strategy_registry.register("xla", cls, description=cls.__name__)
        strategy_registry.register("xla_debug", cls, description=f"{cls.__name__} with `debug=True`", debug=True)
