"""What the arguments of FSDPStrategy, many of which were made for torch's first FSDP, ask of ``fully_shard``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

if TYPE_CHECKING:
    from lightning.fabric.precision import PrecisionPolicy

# Name: whether weights stay gathered between forward and backward, and whether groups of processes hold copies of each other.
SHARDING_STRATEGIES = {
    "FULL_SHARD": (False, False),
    "SHARD_GRAD_OP": (True, False),
    "NO_SHARD": (True, True),
    "HYBRID_SHARD": (False, True),
    "_HYBRID_SHARD_ZERO2": (True, True),
}
# What can't be expressed, and what to do instead.
REFUSED = {
    "device_id": "The strategy knows the device of each process: leave it out.",
    "process_group": "FSDP2 is told by a mesh who shares what: pass `device_mesh=(copies, shards)` or a DeviceMesh.",
    "mesh": "Pass it as `device_mesh`.",
    "mp_policy": "Pass it as `mixed_precision`.",
    "offload_policy": "Pass it as `cpu_offload`.",
    "dp_mesh_dims": "Use ModelParallelStrategy to combine it with other ways of dividing a model.",
}
# Arguments of the first FSDP of which FSDP2 knows one value only.
FIXED = {
    "use_orig_params": (True, "FSDP2 never flattens parameters: leave it out. Optimizers see the parameters as the module has them."),
    "limit_all_gathers": (True, "FSDP2 never holds more than the weights that it needs next: leave it out."),
    "backward_prefetch": ("BACKWARD_PRE", "FSDP2 always gathers the next weights before the gradients of the current ones: leave it out."),
}
FREE = ("forward_prefetch", "ignored_modules", "ignored_states", "param_init_fn", "sync_module_states")
OF_FSDP2 = ("ignored_params", "reduce_scatter_unused_params", "reshard_after_forward", "shard_placement_fn")


@dataclass
class Options:
    """The arguments, checked; torch's own objects are made of them when the processes have met."""

    wrap_policy: Any = None
    checkpoint_policy: Any = None
    mixed_precision: Any = None
    cpu_offload: Any = None
    sharding_strategy: str = "FULL_SHARD"
    device_mesh: Any = None
    keep_gathered: bool = False  # between forward and backward
    has_copies: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def reshard_after_forward(self) -> bool | int | None:
        """As ``fully_shard`` takes it; None is its own rule: yes, but for the root, whose weights backward needs at once."""
        given: bool | int | None = self.extra.get("reshard_after_forward")
        return given if given is not None else (False if self.keep_gathered else None)


def read_options(
    auto_wrap_policy: Any,
    activation_checkpointing: Any,
    activation_checkpointing_policy: Any,
    mixed_precision: Any,
    cpu_offload: Any,
    sharding_strategy: Any,
    device_mesh: Any,
    kwargs: dict[str, Any],
) -> Options:
    """Check the arguments of FSDPStrategy.

    Raises:
        TypeError: for an argument that nobody knows, or one of a type that can't be.
        ValueError: for what FSDP2 can't express, and for arguments that contradict each other.
    """
    name = getattr(sharding_strategy, "name", sharding_strategy)
    if not isinstance(name, str) or name.upper() not in SHARDING_STRATEGIES:
        accepted = ", ".join(map(repr, SHARDING_STRATEGIES))
        raise ValueError(f"sharding_strategy={sharding_strategy!r} is not known. Accepted: {accepted}, or a torch ShardingStrategy.")
    keep_gathered, has_copies = SHARDING_STRATEGIES[name.upper()]
    if device_mesh is not None and "HYBRID" not in name.upper():
        if name.upper() != "FULL_SHARD" or _dimensions(device_mesh) != 1:
            raise ValueError(
                f"device_mesh={device_mesh!r} needs sharding_strategy='HYBRID_SHARD', not {name!r}: it says how many processes hold copies "
                "of each other, and over how many the weights are divided."
            )
    elif device_mesh is not None and _dimensions(device_mesh) != 2:
        raise ValueError(f"device_mesh={device_mesh!r}: give two numbers, of copies and of shards, or a DeviceMesh of two dimensions.")
    if activation_checkpointing is not None and activation_checkpointing_policy is not None:
        raise ValueError(
            "activation_checkpointing and activation_checkpointing_policy were both given, and mean the same. Keep the second."
        )
    policy = activation_checkpointing if activation_checkpointing_policy is None else activation_checkpointing_policy
    _check_kwargs(kwargs)
    _check_types(mixed_precision, cpu_offload)
    return Options(
        _as_policy("auto_wrap_policy", auto_wrap_policy),
        _as_policy("activation_checkpointing_policy", policy),
        mixed_precision,
        cpu_offload,
        name.upper(),
        device_mesh,
        keep_gathered,
        has_copies,
        dict(kwargs),
    )


def _dimensions(mesh: Any) -> int:
    return len(mesh) if isinstance(mesh, (tuple, list)) else mesh.ndim


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in REFUSED:
            raise ValueError(f"FSDPStrategy({name}=...) has no meaning with FSDP2. {REFUSED[name]}")
        if name in FIXED:
            accepted, advice = FIXED[name]
            if getattr(value, "name", value) != accepted:
                raise ValueError(f"FSDPStrategy({name}={value!r}) can't be expressed with FSDP2. {advice}")
        elif name not in FREE + OF_FSDP2:
            raise TypeError(
                f"FSDPStrategy got the argument {name!r}, which neither it nor fully_shard takes. "
                f"Beyond its own it accepts: {', '.join(sorted((*FIXED, *FREE, *OF_FSDP2)))}."
            )


def _check_types(mixed_precision: Any, cpu_offload: Any) -> None:
    if mixed_precision is not None and not hasattr(mixed_precision, "param_dtype"):
        raise TypeError(f"mixed_precision={mixed_precision!r}: give a torch MixedPrecisionPolicy, a MixedPrecision, or None.")
    if getattr(mixed_precision, "keep_low_precision_grads", False):
        raise ValueError(
            "mixed_precision with keep_low_precision_grads=True can't be expressed with FSDP2: gradients have the dtype of the parameters. "
            "Leave it out, or keep the parameters themselves in it (precision='bf16-true')."
        )
    known = isinstance(cpu_offload, bool) or cpu_offload is None or type(cpu_offload).__name__ in OFFLOADS
    if not known:
        raise TypeError(f"cpu_offload={cpu_offload!r}: give True, False, a torch CPUOffload, or a CPUOffloadPolicy.")


OFFLOADS = ("CPUOffload", "CPUOffloadPolicy", "OffloadPolicy")


# ---- policies over modules ----------------------------------------------------------------------------------------------


def _as_policy(name: str, policy: Any) -> Any:
    """Classes as a tuple; anything that decides by itself as it is."""
    if policy is None:
        return None
    if isinstance(policy, type) and issubclass(policy, Module):
        return (policy,)
    if isinstance(policy, (set, frozenset, list, tuple)):
        wrong = [entry for entry in policy if not (isinstance(entry, type) and issubclass(entry, Module))]
        if wrong or not policy:
            raise TypeError(f"{name}={policy!r}: give a set of one or more classes of modules, such as {{Block}}, or a policy of torch's.")
        return tuple(policy)
    if callable(policy) or hasattr(policy, "_run_policy"):
        return policy
    raise TypeError(f"{name}={policy!r}: give a set of classes of modules, such as {{Block}}, or a function that decides for a module.")


def selected(policy: Any, root: Module, ignored: Iterable[torch.nn.Parameter] = ()) -> list[Module]:
    """The modules below ``root`` that a policy chooses, in the order of ``root.modules()``.

    Args:
        policy: a tuple of classes; a policy of torch's; a function of ``(module, recurse, nonwrapped_numel)``, as those of
            ``torch.distributed.fsdp.wrap``; or a function of a module alone.
        root: is never chosen itself.
        ignored: parameters that don't count.

    Raises:
        ValueError: if the policy wants other options for some modules than for the rest.
    """
    if isinstance(policy, tuple):
        return [module for module in root.modules() if isinstance(module, policy) and module is not root]
    if hasattr(policy, "_run_policy"):
        chosen = policy._run_policy(root, set(), {})
        for module, options in chosen.items():
            if options:
                raise ValueError(
                    f"auto_wrap_policy asks for {options!r} for {type(module).__name__}: let it return True or False. All are sharded "
                    "with the same options; shard those that need others with `fully_shard` in `configure_model`."
                )
        return [module for module in root.modules() if module in chosen and module is not root]
    if len([p for p in inspect.signature(policy).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]) == 1:
        return [module for module in root.modules() if module is not root and policy(module)]
    found: set[Module] = set()
    _visit(policy, root, set(ignored), found)
    return [module for module in root.modules() if module in found and module is not root]


def _visit(policy: Callable[..., bool], module: Module, ignored: set[Any], found: set[Module]) -> int:
    """Ask from the leaves up, as torch's own wrapping does; the number of parameters in chosen modules below."""
    size = sum(parameter.numel() for parameter in module.parameters() if parameter not in ignored)
    if not policy(module=module, recurse=True, nonwrapped_numel=size):
        return 0
    chosen = sum(_visit(policy, child, ignored, found) for child in module.children())
    if policy(module=module, recurse=False, nonwrapped_numel=size - chosen):
        found.add(module)
        return size
    return chosen


# ---- torch's objects ----------------------------------------------------------------------------------------------------


def mixed_precision_policy(options: Options, precision: PrecisionPolicy, device: torch.device) -> Any:
    """The MixedPrecisionPolicy: the one that was given, or what a precision asks for.

    Under autocast, weights travel and are kept gathered in the dtype that they are computed with, which halves both; operations
    still choose their own. On the CPU they stay as they are: autocast there does not bring the inputs of every layer to one dtype.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    given = options.mixed_precision
    if isinstance(given, MixedPrecisionPolicy):
        return given
    if given is not None:
        casts = given.cast_forward_inputs or getattr(given, "cast_root_forward_inputs", False)
        return MixedPrecisionPolicy(given.param_dtype, given.reduce_dtype, cast_forward_inputs=casts)
    if not precision.autocast or device.type == "cpu":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(precision.compute_dtype, precision.reduce_dtype, cast_forward_inputs=False)


def offload_policy(options: Options, device: torch.device) -> Any:
    """The OffloadPolicy: where the shards are while they are not needed."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    given = options.cpu_offload
    if isinstance(given, OffloadPolicy):
        return given
    if given is True or getattr(given, "offload_params", False):
        return CPUOffloadPolicy(pin_memory=device.type == "cuda")
    return OffloadPolicy()


def build_mesh(options: Options, device: torch.device, world_size: int, num_nodes: int) -> Any:
    """The mesh of all processes: one dimension over which weights are divided, and one of copies before it where there are any.

    Raises:
        ValueError: if a mesh was given that is not one of all processes.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    given = options.device_mesh
    if isinstance(given, DeviceMesh):
        if given.size() != world_size:
            raise ValueError(f"device_mesh={given!r} holds {given.size()} processes, and the run has {world_size}.")
        return given
    if given is None and options.sharding_strategy == "NO_SHARD":
        shape: tuple[int, ...] = (world_size, 1)
    elif given is None and options.has_copies and num_nodes > 1:
        shape = (num_nodes, world_size // num_nodes)  # the weights are divided where the connections are fast
    else:
        shape = tuple(given or (world_size,))
    size = 1
    for each in shape:
        size *= each
    if size != world_size:
        raise ValueError(
            f"device_mesh={given!r} makes {' x '.join(map(str, shape))} = {size} processes, and the run has {world_size} "
            "(devices times num_nodes). Change one of them."
        )
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def ignored_parameters(options: Options, root: Module) -> set[torch.nn.Parameter]:
    """The parameters that ``ignored_params``, ``ignored_states`` and ``ignored_modules`` leave alone."""
    entries = [*options.extra.get("ignored_params", ()), *(options.extra.get("ignored_states") or ())]
    entries += list(options.extra.get("ignored_modules") or ())
    found: set[torch.nn.Parameter] = set()
    for entry in entries:
        found.update(entry.parameters() if isinstance(entry, Module) else [entry])
    return found
