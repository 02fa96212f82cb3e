"""What strategies share under which each process holds a part of the weights: clipping, states and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric import collectives
from lightning.fabric.checkpoint import io, sharded
from lightning.fabric.checkpoint.background import BackgroundCheckpointIO
from lightning.fabric.precision import Precision
from lightning.fabric.strategies import sharding
from lightning.fabric.strategies.objects import restore
from lightning.fabric.strategies.parallel import ParallelStrategy
from lightning.fabric.utilities.cloud_io import local_path
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states


class ShardedStrategy(ParallelStrategy):
    """Several processes, whose module has weights that are divided among them (DTensor), in whatever way.

    Its checkpoints are one file or, if ``saves_directories``, directories to which each process writes its own part. Both are read under
    every strategy and number of processes.
    """

    forward_is_collective = True
    restore_checkpoint_after_setup = True
    saves_directories = False
    file_option = "state_dict_type='full'"  # what to pass for checkpoints of one file
    _handles: list[Any]  # of the hooks that modules and optimizers got
    _saves_in: tuple[Any, Any] | None = None  # the group of all processes, and that of what is saved in the background

    # ---- setting up -------------------------------------------------------------------------------------------------

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """The context of ``configure_model``: all processes draw the random numbers of rank 0, and afterwards go on with their own."""
        if self.failing or not collectives.is_distributed():
            yield
            return
        own = self._random_states()
        first = collectives.broadcast(own)
        self._set_random_states(first)
        try:
            yield
        finally:
            (host, device), (host_of_first, device_of_first) = own, first
            others = {name: state for name, state in host.items() if _plain(state) != _plain(host_of_first.get(name))}
            now = collect_rng_states(include_cuda=False)
            self._set_random_states(({**now, **others}, None if _plain(device) == _plain(device_of_first) else device))

    def _random_states(self) -> tuple[dict[str, Any], Tensor | None]:
        """Of this process, and of its device."""
        device = self.root_device
        return collect_rng_states(include_cuda=False), None if device.type == "cpu" else _generators(device).get_rng_state(device)

    def _set_random_states(self, states: tuple[dict[str, Any], Tensor | None]) -> None:
        set_rng_states(states[0])
        if states[1] is not None:
            _generators(self.root_device).set_rng_state(states[1].cpu(), self.root_device)

    def _prepare_to_step(self, optimizer: Optimizer) -> None:
        """See that the optimizer's implementation can step its parameters.

        Raises:
            MisconfigurationException: if it is to take a group's parameters at once, and some are divided and some plain; for LBFGS.
        """
        for group in optimizer.param_groups:
            if isinstance(optimizer, torch.optim.LBFGS) and any(sharding.number_of_shards(each) > 1 for each in group["params"]):
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} makes one vector of all parameters, which divided ones (DTensor) can't be. Use another "
                    "optimizer, or strategy='ddp'."
                )
            chosen = next((name for name in ("fused", "foreach") if group.get(name)), None)
            if chosen is not None and _is_mixed(group):
                raise MisconfigurationException(
                    f"{type(optimizer).__name__}({chosen}=True) can't step divided parameters (DTensor) and plain ones in one group. Give "
                    "it two: [{'params': divided}, {'params': plain}], or divide all, such as by `fully_shard` on the whole model."
                )
        if any(_is_mixed(group) for group in optimizer.param_groups):
            self._handles += [optimizer.register_step_pre_hook(_one_by_one), optimizer.register_step_post_hook(_by_default)]
        on = {parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}
        if "cpu" in on and self.root_device.type != "cpu":
            # The scaler tells a fused optimizer of an overflow by a tensor, and torch lets the CPU read it before its copy has arrived.
            # With this, torch 2.13's `GradScaler.step` decides by itself.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def method(self, name: str) -> Callable[..., Any]:
        """The step function ``name`` of the module.

        Where that was asked for, what is compiled is each divided part by itself, between the hooks that gather its weights; the step as a
        whole where there are no such parts.
        """
        assert self.module is not None
        units = [] if self.compiler is None else parts_of(self.module)
        for unit in units:
            if not isinstance(vars(unit).get("forward"), _CompiledForward):
                self._handles.append(_CompiledForward(unit, self.compiler))
        return getattr(self.module, name) if units else super().method(name)

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def clip_gradients(self, optimizer: Optimizer, clip_val: float, algorithm: Literal["norm", "value"] | str = "norm") -> None:
        """Clip the gradients of the optimizer's parameters, by the norm that all of them have together, or by value.

        Raises:
            ValueError: if the algorithm is another.
        """
        if clip_val <= 0:
            return
        if algorithm not in ("norm", "value"):
            raise ValueError(f"gradient_clip_algorithm={algorithm!r} is not known. Accepted: 'norm', 'value'.")
        own, by = type(self.precision), f"clip_grad_by_{algorithm}"
        if own.clip_gradients is not Precision.clip_gradients or getattr(own, by) is not getattr(Precision, by):
            self.precision.clip_gradients(optimizer, clip_val, algorithm)
            return
        self.precision.unscale_gradients(optimizer)
        if algorithm == "norm":
            sharding.clip_norm_(self.precision.main_params(optimizer), clip_val)
        else:
            sharding.clip_value_(self.precision.main_params(optimizer), clip_val)

    def clip_gradients_norm(
        self, module: Module, optimizer: Optimizer, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
    ) -> Tensor:
        """Clip by norm, and return the norm that there was; see :func:`~lightning.fabric.strategies.sharding.clip_norm_`."""
        self.precision.unscale_gradients(optimizer)
        return sharding.clip_norm_(self.precision.main_params(optimizer), max_norm, norm_type, error_if_nonfinite)

    def sync_buffers(self) -> None:
        """Give every process the buffers of rank 0, which are those that a checkpoint holds."""
        if self.module is not None:
            collectives.broadcast_tensors(buffer for buffer in self.module.buffers() if not sharding.is_dtensor(buffer))

    # ---- state ------------------------------------------------------------------------------------------------------

    def reshard(self, module: Module) -> None:
        """Let go of weights that are gathered, so that the module has those that optimizers and checkpoints know."""

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The weights of a module, gathered on rank 0, or, for a directory, as they are divided; every process must call it."""
        self.reshard(module)
        state = module.state_dict()
        return state if self.saves_directories else sharding.full_state(state)

    def load_module_state_dict(self, module: Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        self.reshard(module)
        sharding.load_sharded_state_dict(module, state_dict, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, gathered or divided as the weights are; every process must call it."""
        state = optimizer.state_dict()
        return state if self.saves_directories else sharding.full_state(state)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        sharding.load_optimizer_state(optimizer, state)

    def accumulated_gradients(self) -> dict[str, Tensor]:
        """The gradients of an accumulation window that is not over, by name, as a checkpoint holds them; every process must call it."""
        gradients = self.mean_gradients()
        return gradients if self.saves_directories else sharding.full_state(gradients)

    def mean_gradients(self) -> dict[str, Tensor]:
        """The gradients that were accumulated so far, averaged over the processes that have different data, divided as the weights."""
        raise NotImplementedError

    def load_accumulated_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Go on with an accumulation window: give the parameters what :meth:`accumulated_gradients` returned."""
        assert self.module is not None
        for name, parameter in self.module.named_parameters():
            if name in gradients:
                parameter.grad = sharding.distribute_like(sharded.materialized(gradients[name]), parameter)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint as one file, or as a directory: all of it, or nothing; every process must call it.

        Raises:
            TypeError: for storage options, or a checkpoint plugin, with directories.
        """
        if not self.saves_directories:
            super().save_checkpoint(sharding.full_state(checkpoint), filepath, storage_options)
            return
        if storage_options is not None or type(self._plain_io) is not io.TorchCheckpointIO:
            given = f"storage_options={storage_options!r}" if storage_options is not None else type(self._plain_io).__name__
            raise TypeError(
                f"{given} was given, and checkpoints that are directories are written by all processes, past it. Leave it out, or use "
                f"{type(self).__name__}({self.file_option})."
            )
        if not isinstance(self.checkpoint_io, BackgroundCheckpointIO):
            sharding.save_sharded_checkpoint(checkpoint, filepath)
            return
        target = sharding.directory_of(filepath)
        plain, tensors = sharded.split(checkpoint)
        group = self._saving_group()

        def write(parts: tuple[Any, dict[str, Tensor]], in_background: bool) -> None:
            sharding.write_sharded_checkpoint(*parts, target, group if in_background else None)

        def agree(order: int) -> int:
            return int(collectives.reduce(order, "max", group))

        self.checkpoint_io.submit(filepath, (plain if self.is_global_zero else {}, tensors), write, agree)

    @property
    def _plain_io(self) -> io.CheckpointIO:
        """What reads and writes, also where that happens in the background."""
        return self.checkpoint_io.writer if isinstance(self.checkpoint_io, BackgroundCheckpointIO) else self.checkpoint_io

    def _saving_group(self) -> Any:
        """The group for what is saved in the background, whose messages must not come between those of training; all must call it."""
        if not collectives.is_distributed():
            return None
        world = torch.distributed.group.WORLD
        if self._saves_in is None or self._saves_in[0] is not world:
            self._saves_in = world, torch.distributed.new_group(backend="gloo")
        return self._saves_in[1]

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(self.checkpoint_io, BackgroundCheckpointIO):
            self.checkpoint_io.leave_soon()  # what is being saved needs the others, which may be gone
        super().on_exception(exception)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of either form, such that a machine holds its weights once, however many processes it has.

        In that of a directory, weights and optimizer states are left unread until they are loaded.
        """
        return self._read(checkpoint_path, weights_only, sharded.LEFT_UNREAD)

    def _read(self, path: Any, weights_only: bool | None, left_unread: Iterable[str]) -> dict[str, Any]:
        if isinstance(self.checkpoint_io, BackgroundCheckpointIO):
            self.checkpoint_io.settle()
        if type(self._plain_io).load_checkpoint is not io.TorchCheckpointIO.load_checkpoint:
            return super().load_checkpoint(path, weights_only)
        if sharded.is_sharded_checkpoint(path):
            return sharded.open_sharded(path, weights_only, left_unread)
        mapped = local_path(path) is not None
        return io.load(path, io.keep_on_cpu, weights_only, mmap=mapped)  # type: ignore[no-any-return]

    def load_state(
        self, path: Any, state: MutableMapping[str, Any] | None = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        given = state or {}
        checkpoint = self._read(path, weights_only, [name for name, value in given.items() if isinstance(value, (Module, Optimizer))])
        return restore(self, checkpoint, given, strict) if given else checkpoint


def parts_of(module: Module) -> list[Module]:
    """The modules inside of a divided one whose weights are gathered by themselves."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule) and part is not module]


class _CompiledForward:
    """Takes the place of a module's ``forward``, until it is removed.

    Args:
        module: whose.
        compiler: makes a compiled function of it.
    """

    def __init__(self, module: Module, compiler: Any) -> None:
        self.module, self.before = module, vars(module).get("forward")
        self.compiled = compiler(module.forward)
        vars(module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there before."""
        vars(self.module).pop("forward", None)
        if self.before is not None:
            vars(self.module)["forward"] = self.before


def _is_mixed(group: Mapping[str, Any]) -> bool:
    """Whether a group has both divided and plain parameters."""
    return len({sharding.is_dtensor(parameter) for parameter in group["params"]}) > 1


def _one_by_one(optimizer: Optimizer, *_: Any) -> None:
    """Let a step not take all parameters of a mixed group at once, which it does by default on a GPU, and which torch refuses."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and _is_mixed(group):
            group["foreach"] = False


def _by_default(optimizer: Optimizer, *_: Any) -> None:
    """Undo :func:`_one_by_one`, so that no checkpoint holds its choice."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is False and _is_mixed(group):
            group["foreach"] = None


def _generators(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def _plain(value: Any) -> Any:
    """Tensors as bytes, so that states can be compared."""
    if isinstance(value, Tensor):
        return value.cpu().numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
