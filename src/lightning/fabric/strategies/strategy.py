"""Strategy: how a module, its optimizers and its data are laid out over devices and processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.precision import Precision
from lightning.fabric.strategies.hooks import StrategyHooks
from lightning.fabric.utilities.apply_func import move_data_to_device

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO

T = TypeVar("T")
TBroadcast = TypeVar("TBroadcast")
TReduce = TypeVar("TReduce")


class Strategy(StrategyHooks):
    """One process on one device, and the interface that every other strategy fills in.

    It knows plain modules and optimizers only. The loops ask it for bound functions once, before the first step.

    Args:
        accelerator: the kind of device.
        checkpoint_io: writes and reads checkpoints; None for one atomic local or remote file.
        precision: the numbers that the module computes with; None for 32 bits.
    """

    strategy_name = "single_device"
    launcher: Any = None  # starts the processes; None where there is one, or something else has started them
    is_distributed = False  # whether there may be other processes to talk to
    has_inference_mode = True  # whether tensors of its devices can be made in `torch.inference_mode`
    forward_is_collective = False  # whether a forward pass needs every process, as where weights are sharded
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None  # what makes a compiled function of a step
    _compiled: dict[str, Callable[..., Any]]  # steps, by name
    before_gathering: Callable[[Tensor, bool], None] | None = None  # looks at what is gathered from, or reduced over, all processes
    restore_checkpoint_after_setup = False  # whether weights are restored after module and optimizers were set up, not before

    def __init__(
        self, accelerator: Accelerator | None = None, checkpoint_io: CheckpointIO | None = None, precision: Precision | None = None
    ) -> None:
        self._accelerator = accelerator
        self._checkpoint_io = checkpoint_io
        self._precision = precision
        self.module: Module | None = None
        self.model: Any = None  # the module as it runs: wrapped, where the strategy wraps it
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self._lightning_optimizers: list[Any] = []

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Accelerator | None:
        """The kind of device."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator

    @property
    def precision(self) -> Precision:
        """The numbers that the module computes with."""
        if self._precision is None:
            self._precision = Precision()
        return self._precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        self._precision = precision

    @property
    def precision_plugin(self) -> Precision:
        """Another name of :attr:`precision`."""
        return self.precision

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes and reads checkpoints."""
        if self._checkpoint_io is None:
            from lightning.fabric.checkpoint.io import TorchCheckpointIO

            self._checkpoint_io = TorchCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO | None) -> None:
        self._checkpoint_io = checkpoint_io

    @property
    def lightning_module(self) -> Any:
        """The module as the user wrote it."""
        return self.module

    # ---- where this process is --------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return torch.device("cpu")

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return 1

    @property
    def global_rank(self) -> int:
        """This process's index among all."""
        return 0

    @property
    def local_rank(self) -> int:
        """This process's index on its machine."""
        return 0

    @property
    def node_rank(self) -> int:
        """The index of this process's machine."""
        return 0

    @property
    def is_global_zero(self) -> bool:
        """Whether this process speaks for all: it logs, prints and writes."""
        return self.global_rank == 0

    # ---- setting up -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Make the device of this process ready."""
        if self.accelerator is not None:
            self.accelerator.setup_device(self.root_device)

    def connect(self, model: Module) -> None:
        """Take the user's module, before it is set up."""
        self.module = self.model = model

    def setup_module(self, module: Module, training: bool = True) -> Module:
        """Return the module as it will run: converted, moved, and wrapped where the strategy wraps.

        Args:
            module: the user's.
            training: whether it will be trained, rather than only evaluated.
        """
        module = self.precision.convert_module(module)
        self.module_to_device(module)
        return module

    def module_to_device(self, module: Module) -> None:
        """Move the module to the device of this process."""
        module.to(self.root_device)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer as it will run."""
        return optimizer

    def prepare_training(self, accumulate_grad_batches: int, gradient_clip_val: float | None, gradient_clip_algorithm: str | None) -> None:
        """Learn how the loop will step, before the optimizers are set up: for engines that accumulate and clip by themselves."""

    def wrap_optimizers(self, optimizers: list[Optimizer], scheduler_configs: list[Any]) -> list[Optimizer]:
        """Return the optimizers of the module as they will run, after it was set up.

        Args:
            optimizers: those that the user's ``configure_optimizers`` returned.
            scheduler_configs: the schedulers that came with them; an engine that steps its own changes this list in place.
        """
        return [self.setup_optimizer(optimizer) for optimizer in optimizers]

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[Module, list[Optimizer], Any]:
        """Return a module, the optimizers that were made of its parameters, and their scheduler, as they will run.

        Args:
            module: the user's.
            optimizers: where setting up replaces parameters, they get the new ones.
            scheduler: for engines that step it themselves.

        Raises:
            RuntimeError: if an optimizer can't go on with the parameters as they are then.
        """
        from lightning.fabric.strategies.objects import follow_parameters

        before = list(module.parameters())
        model = self.setup_module(module)
        follow_parameters(optimizers, before, list(module.parameters()))
        return model, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """A context to build a module in: on the device and in the precision of the run.

        Args:
            empty_init: leave the weights uninitialised, where they will be loaded anyway.
        """
        with self.root_device, self.precision.module_init_context(), _skip_init() if empty_init else nullcontext():
            yield

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """A context in which new tensors are on the device and in the precision of the run."""
        with self.root_device, self.precision.tensor_init_context():
            yield

    def bind(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module, to be called as it runs under this strategy."""
        return self.method(name)

    def method(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module as its author wrote it, or compiled where that was asked for."""
        step: Callable[..., Any] = getattr(self.module, name)
        if self.compiler is None:
            return step
        if name not in self._compiled:
            self._compiled[name] = self.compiler(step)
        return self._compiled[name]

    def compile_with(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None) -> None:
        """Compile the steps of the module that is set up next, inside of whatever the strategy wraps it in.

        Args:
            compiler: makes a compiled function of one, as ``torch.compile`` does; None to compile nothing any more.

        Raises:
            ValueError: if the strategy can't.
        """
        self.compiler, self._compiled = compiler, {}

    def as_forward(self, module: Module, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, which computes with a module, as it runs in place of that module's forward pass.

        Args:
            module: as :meth:`setup_module` returned it.
            method: such as ``training_step`` of the module.
        """
        return method

    def process_dataloader(self, dataloader: T) -> T:
        """Return the loader as this process needs it."""
        return dataloader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Return the batch on the device of this process."""
        return move_data_to_device(batch, device or self.root_device)

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def no_backward_sync(self, module: Module | None = None) -> AbstractContextManager[Any]:
        """A context in which backward keeps gradients local, for all but the last batch of an accumulation window.

        Args:
            module: as :meth:`setup_module` returned it; None for the strategy's own.
        """
        return nullcontext()

    def pre_backward(self, closure_loss: Any) -> None:
        """To be called in manual optimization before backward runs on ``closure_loss``, however the user runs it."""

    def backward(self, tensor: Tensor, module: Module | None = None, *args: Any, **kwargs: Any) -> None:
        """Run backward on a scalar, scaled where the precision needs it."""
        tensor = self.precision.pre_backward(tensor, module)
        self.precision.backward(tensor, module, *args, **kwargs)
        self.precision.post_backward(tensor, module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer with a closure that computes the gradients."""
        return self.precision.optimizer_step(optimizer, closure=closure, **kwargs)

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, algorithm: Literal["norm", "value"] | str = "norm") -> None:
        """Clip the gradients of the optimizer's parameters, by their norm or by value."""
        self.precision.clip_gradients(optimizer, clip_val, algorithm)

    def clip_gradients_norm(
        self, module: Module, optimizer: Optimizer, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
    ) -> Tensor:
        """Scale the gradients of the optimizer's parameters such that their common norm is at most ``max_norm``; return what it was.

        Args:
            module: as :meth:`setup_module` returned it.
            optimizer: of its parameters.
            max_norm: the largest norm.
            norm_type: which norm; infinity for the largest absolute value.
            error_if_nonfinite: raise if the norm is infinite or no number, which means that the host waits for the device to know it.

        Raises:
            RuntimeError: if it is, and ``error_if_nonfinite``.
        """
        self.precision.unscale_gradients(optimizer)
        parameters = list(self.precision.main_params(optimizer))
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite)

    def clip_gradients_value(self, module: Module, optimizer: Optimizer, clip_val: float) -> None:
        """Limit each element of the gradients of the optimizer's parameters to between ``-clip_val`` and ``clip_val``."""
        self.clip_gradients(optimizer, clip_val, "value")

    # ---- processes --------------------------------------------------------------------------------------------------

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over all processes."""
        return tensor

    def reduce_named(self, values: Mapping[str, tuple[Tensor, str]], group: Any = None) -> dict[str, Tensor]:
        """Reduce many values at once, each with those of the same name in the other processes; all of them must call it.

        Args:
            values: for each name a tensor, and how to reduce it: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``.
            group: the processes; None for all.
        """
        return {name: tensor for name, (tensor, _) in values.items()}

    def compare(self, kinds: Mapping[str, str], details: Any = None) -> list[Any] | None:
        """Find out whether all processes hold the same; None if they do, else the details of each. All of them must call it.

        Args:
            kinds: names, each with what must be equal.
            details: what to tell the others where something differs; None for ``kinds``.
        """
        return None

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Another name of :meth:`reduce`."""
        return self.reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor from all processes."""
        return tensor

    def gather_objects(self, obj: Any) -> list[Any]:
        """The objects of all processes, in the order of their ranks; all of them must call it.

        A process that fails asks nobody, and has None in the places of the others.
        """
        return [obj]

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        """Return the object of process ``src`` on every process."""
        return obj

    def barrier(self, name: str | None = None) -> None:
        """Wait until all processes are here."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any, say True."""
        return decision

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a DistributedSampler has to know; nothing where there is one process."""
        return {}

    def sync_buffers(self) -> None:
        """Give every process the buffers of rank 0, before evaluation; all of them must call it."""

    # ---- state ------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights of the user's module, as a checkpoint holds them; every process must call it."""
        assert self.module is not None
        return self.get_module_state_dict(self.module)

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The weights of a module of the user's that was set up, as a checkpoint holds them; every process must call it."""
        return module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of the user's module.

        Args:
            checkpoint: holds them under ``"state_dict"``.
            strict: whether all keys must match.

        Raises:
            RuntimeError: if ``strict`` and keys do not match, or shapes differ.
        """
        assert self.module is not None
        self.load_module_state_dict(self.module, checkpoint["state_dict"], strict)

    def load_module_state_dict(self, module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Load what :meth:`get_module_state_dict` returned, here or under another strategy.

        Args:
            module: the user's.
            state_dict: its weights.
            strict: whether all keys must match.

        Raises:
            RuntimeError: if ``strict`` and keys do not match, or shapes differ.
        """
        module.load_state_dict(state_dict, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer; every process must call it."""
        return optimizer.state_dict()

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Another name of :meth:`optimizer_state`."""
        return self.optimizer_state(optimizer)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load the state of an optimizer."""
        optimizer.load_state_dict(state)

    def accumulated_gradients(self) -> dict[str, Tensor]:
        """The gradients of an accumulation window that is not over, by name, as a checkpoint holds them; every process must call it."""
        assert self.module is not None
        return {name: parameter.grad for name, parameter in self.module.named_parameters() if parameter.grad is not None}

    def own_gradients(self) -> dict[str, Tensor]:
        """What :meth:`accumulated_gradients` has averaged over all processes, as this one has it: on the CPU; none where nothing was."""
        return {}

    def own_buffers(self) -> dict[str, Tensor]:
        """The buffers in a checkpoint that nothing makes equal in all processes, by name, as this process has them."""
        assert self.module is not None
        found: dict[str, Tensor] = {}
        for path, part in self.module.named_modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and name not in part._non_persistent_buffers_set and not hasattr(buffer, "device_mesh"):
                    found[f"{path}.{name}" if path else name] = buffer
        return found

    def engine_state(self) -> dict[str, Any]:
        """What the bits of the next steps depend on beside weights and optimizers; every process must call it."""
        return {}

    def expect_engine_state(self, state: Mapping[str, Any]) -> None:
        """Learn, before the module is set up, what :meth:`engine_state` returned in the run that this one goes on from."""

    def load_accumulated_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Go on with an accumulation window: give the parameters what :meth:`accumulated_gradients` returned."""
        assert self.module is not None
        for name, parameter in self.module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint: all of it, or nothing; every process must call it."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU, so that the device never holds it twice."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=weights_only)

    def save_state(self, path: Any, state: Mapping[str, Any], filter: Mapping[str, Callable[[str, Any], bool]] | None = None) -> None:
        """Write objects to a checkpoint; every process must call it.

        Args:
            path: where to.
            state: modules and optimizers that were set up, other objects with a ``state_dict``, and plain values, by name.
            filter: for names in ``state``, which entries of that ``state_dict`` are kept.
        """
        from lightning.fabric.strategies.objects import collect

        self.save_checkpoint(collect(self, state, filter or {}), path)

    def load_state(
        self, path: Any, state: MutableMapping[str, Any] | None = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into objects, and return what is left of it; every process must call it.

        Args:
            path: where it is.
            state: as for :meth:`save_state`; plain values are replaced in it. None leaves all of the checkpoint.
            strict: whether the checkpoint must hold every name in ``state``, and the keys of modules must match.
            weights_only: False unpickles anything in the file; for files from a source you trust.

        Raises:
            KeyError: if ``strict`` and the checkpoint lacks a name.
            RuntimeError: if weights don't fit.
            pickle.UnpicklingError: if a value that is asked for needs ``weights_only=False``.
        """
        from lightning.fabric.strategies.objects import restore

        checkpoint = self.load_checkpoint(path, weights_only=weights_only)
        return restore(self, checkpoint, state, strict) if state else checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def watch(self, position: Callable[[], Any]) -> None:
        """Watch over the processes of a run until :meth:`teardown`; nothing to do for one.

        Args:
            position: where the run is.
        """

    def on_exception(self, exception: BaseException) -> None:
        """Hear that this process has failed: from here on nothing may wait for another one."""

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Enter the names of this strategy into a registry; this one has none."""

    def teardown(self) -> None:
        """Bring module and optimizer state back to the CPU, and free the device."""
        self.precision.teardown()
        if self.module is not None:
            self.module.cpu()
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                if isinstance(state, dict):
                    state.update({k: v.cpu() for k, v in state.items() if isinstance(v, Tensor) and v.device.type != "cpu"})
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()


@contextmanager
def _skip_init() -> Generator[None, None, None]:
    """Turn torch's initialisers into no-ops: layers built inside keep the memory they were given."""
    from torch.overrides import TorchFunctionMode

    class SkipInit(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return func(*args, **kwargs)

    with SkipInit():
        yield
