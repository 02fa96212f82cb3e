"""Whole weights and optimizer states into and out of a DeepSpeed engine, which divides them among the processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning.fabric.strategies.deepspeed_checkpoint import materialized


def is_partitioned(parameter: Tensor) -> bool:
    """Whether each process holds a part of the parameter only (ZeRO 3)."""
    return hasattr(parameter, "ds_id")


# ---- weights ----------------------------------------------------------------------------------------------------------


def gather_weights(module: Module, on_this_rank: bool) -> dict[str, Tensor]:
    """The whole weights of a module, on the CPU; all processes must call it.

    Args:
        module: some of its parameters are partitioned.
        on_this_rank: whether this process wants them; else the result is empty.
    """
    import deepspeed

    result: dict[str, Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters(list(part.parameters(recurse=False))):
            if on_this_rank:
                own: dict[str, Tensor] = {}
                part._save_to_state_dict(own, f"{prefix}." if prefix else "", keep_vars=False)
                result.update({name: value.cpu().clone() if isinstance(value, Tensor) else value for name, value in own.items()})
    return {name: result[name] for name in module.state_dict()} if on_this_rank else {}


def load_weights(module: Module, weights: Mapping[str, Any], strict: bool) -> None:
    """Load whole weights into a module; all processes must call it, with the same ones.

    Args:
        module: some of its parameters may be partitioned.
        weights: tensors, or things whose ``contiguous()`` reads one.
        strict: whether all names must match.

    Raises:
        RuntimeError: if ``strict`` and names do not match, or shapes differ.
    """
    if not any(is_partitioned(parameter) for parameter in module.parameters()):
        module.load_state_dict({name: materialized(value) for name, value in weights.items()}, strict=strict)
        return
    import deepspeed

    missing: list[str] = []
    problems: list[str] = []
    unexpected = set(weights)
    for prefix, part in module.named_modules(remove_duplicate=False):
        prefix = f"{prefix}." if prefix else ""
        own = {name: materialized(weights[name]) for name in _own_names(part, prefix) if name in weights}
        unexpected -= set(own)
        with deepspeed.zero.GatheredParameters(list(part.parameters(recurse=False)), modifier_rank=0):
            part._load_from_state_dict(own, prefix, {}, True, missing, [], problems)
    if strict:
        if unexpected:
            problems.insert(0, f"Unexpected key(s) in state_dict: {', '.join(sorted(unexpected))}.")
        if missing:
            problems.insert(0, f"Missing key(s) in state_dict: {', '.join(missing)}.")
    if problems:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t" + "\n\t".join(problems))


def _own_names(module: Module, prefix: str) -> Iterator[str]:
    """The names of what a module itself keeps in a state_dict, without its children."""
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, prefix, keep_vars=True)
    yield from own


def set_master_weights(module: Module, weights: Mapping[str, Any], optimizer: Any) -> None:
    """Load whole weights into the float32 copy that a ZeRO optimizer updates; all processes must call it.

    Args:
        module: has got them already.
        weights: as for :func:`load_weights`.
        optimizer: of the engine.
    """
    linked = False
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name in weights and (is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")):
            linked = True
            _set_part(parameter, materialized(weights[name]))
    if not linked and hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()


def _set_part(parameter: Any, value: Tensor, name: str | None = None) -> None:
    """Give this process its part of the float32 copy of a parameter, or of the optimizer's state of that name."""
    from deepspeed import utils

    value = value.to(parameter.device, torch.float32)
    if not is_partitioned(parameter):
        utils.safe_set_full_fp32_param(parameter, value) if name is None else utils.safe_set_full_optimizer_state(parameter, value, name)
        return
    size = parameter.ds_tensor.numel()  # the last part is padded to the length of the others
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    part = torch.zeros(size, device=value.device)
    own = value.flatten()[start : start + size]
    part[: own.numel()] = own
    utils.safe_set_local_fp32_param(parameter, part) if name is None else utils.safe_set_local_optimizer_state(parameter, part, name)


# ---- optimizer states -------------------------------------------------------------------------------------------------


def flat_parameters(optimizer: Any) -> list[Tensor]:
    """The parts of the float32 weights that this process updates, which a ZeRO optimizer has made the parameters of the basic one."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def load_optimizer_state(optimizer: Any, basic: Any, parameters: list[list[Parameter]], state: Mapping[str, Any]) -> bool:
    """Load the state of an optimizer that trained whole parameters; all processes must call it.

    Args:
        optimizer: of the engine.
        basic: the optimizer that it steps.
        parameters: those of the basic optimizer before DeepSpeed has replaced them, by group.
        state: the ``state_dict`` of such an optimizer: values by the index of the parameter, and groups.

    Returns:
        whether it could be done: if not, nothing was changed.
    """
    if optimizer is basic:
        optimizer.load_state_dict(dict(state))
        return True
    trained = [parameter for group in parameters for parameter in group]
    values: Mapping[int, Mapping[str, Any]] = state["state"]
    flat = flat_parameters(optimizer)
    if not flat or any(part is None or part.numel() == 0 for part in flat) or getattr(optimizer, "swap_optimizer", False):
        return False
    if len(state["param_groups"]) != len(parameters) or sum(len(group["params"]) for group in state["param_groups"]) != len(trained):
        return False
    if not all(_fits(value, trained[int(index)]) for index, each in values.items() for value in each.values()):
        return False
    for ours, theirs in zip(basic.param_groups, state["param_groups"]):
        ours.update({name: value for name, value in theirs.items() if name != "params"})
    if values:
        _fill(optimizer, basic, trained, values, flat)
    return True


def _shape_of(parameter: Tensor) -> torch.Size:
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


def _fits(value: Any, parameter: Tensor) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1 or value.shape == _shape_of(parameter)


def _fill(optimizer: Any, basic: Any, trained: list[Parameter], values: Mapping[int, Mapping[str, Any]], flat: list[Tensor]) -> None:
    """Give each process its part of the values of all parameters."""
    # What has the shape of its parameter is divided; the rest, such as the count of steps, is the same for all. With a single element
    # it can't be told.
    largest = max(values, key=lambda index: _shape_of(trained[int(index)]).numel())
    shape = _shape_of(trained[int(largest)])
    divided = [name for name, value in values[largest].items() if isinstance(value, Tensor) and value.shape == shape]
    shared = {name: value for name, value in values[largest].items() if name not in divided}
    if type(basic).__module__.startswith("deepspeed."):  # its optimizers count in Python's numbers, torch's in tensors
        shared = {name: value.item() if isinstance(value, Tensor) else value for name, value in shared.items()}
    for part in flat:
        here = basic.state[part]
        here.update({name: torch.zeros_like(part) for name in divided})
        here.update({name: value.clone() if isinstance(value, Tensor) else value for name, value in shared.items()})
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()
    for index, each in values.items():
        for name in divided:
            _set_part(trained[int(index)], each[name], name)
