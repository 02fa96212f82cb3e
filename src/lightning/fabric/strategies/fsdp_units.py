"""Which parts of a module FSDP2 gathers on their own, and which it can't divide."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning.fabric.strategies import fsdp_options, sharding
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning


def choose_units(module: Module, policy: Any, divided: bool, ignored: set[Any]) -> list[Module]:
    """The modules below ``module`` whose weights are gathered together, each on its own.

    Args:
        module: to be divided.
        policy: chooses them; None for none.
        divided: whether the user has divided parts of it.
        ignored: parameters that are left alone.

    Raises:
        ValueError: if the policy chooses no module, or one that can't be.
    """
    if divided:
        if policy is not None:
            rank_zero_warn("Parts of the module were given to `fully_shard` already, so auto_wrap_policy is not used.")
        return []
    if policy is None:
        _advise(module)
        return []
    chosen = fsdp_options.selected(policy, module, ignored)
    is_one_unit = next(module.children(), None) is None or (isinstance(policy, tuple) and isinstance(module, policy))
    if not chosen and is_one_unit:  # the policy may be for other modules too, and there is nothing below this one to choose
        return []
    if not chosen:
        kinds = sorted({type(part).__name__ for part in module.modules() if part is not module})
        raise ValueError(
            f"auto_wrap_policy={policy!r} chooses no module of {type(module).__name__}, which would be gathered whole. "
            f"It is made of: {', '.join(kinds)}. Choose the blocks that hold most of the weights."
        )
    for unit in chosen:
        if isinstance(unit, (torch.nn.ModuleList, torch.nn.ModuleDict)) and type(unit).forward is Module.forward:
            raise ValueError(
                f"auto_wrap_policy={policy!r} chooses a {type(unit).__name__}, which is never called, so that its weights would never be "
                "gathered. Choose the modules that it holds."
            )
    # torch's attention computes with the weights of this layer, and never calls it.
    return _without_shared(
        module, [unit for unit in chosen if not isinstance(unit, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)]
    )


def mesh_of(module: Module) -> Any:
    """The mesh over which parts of the module are divided already."""
    return next((parameter.device_mesh for parameter in module.parameters() if sharding.is_dtensor(parameter)), None)


def undividable(module: Module, compute_dtype: torch.dtype | None) -> list[tuple[Module, str]]:
    """Parameters that every process keeps whole: single numbers, and, where weights are computed with in another dtype, those of
    layers whose statistics are kept in their own."""
    from torch.nn.modules.batchnorm import _NormBase

    found: dict[Tensor, tuple[Module, str]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and (parameter.ndim == 0 or (compute_dtype is not None and isinstance(part, _NormBase))):
                found.setdefault(parameter, (part, name))
    return list(found.values())


def _without_shared(module: Module, chosen: list[Module]) -> list[Module]:
    """The chosen modules but for those that share weights with modules outside of them: a weight is gathered in one place."""
    owners: dict[Tensor, set[Module]] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(part)
    kept = []
    for unit in chosen:
        inside = set(unit.modules())
        if all(owners[parameter] <= inside for parameter in unit.parameters()):
            kept.append(unit)
        else:
            rank_zero_info(f"A {type(unit).__name__} shares weights with another module, and is gathered with what holds both.")
    return kept


def _advise(module: Module) -> None:
    """Say that a module is gathered whole, and what to do.

    Raises:
        ValueError: if it is a single block, of which nothing can be gathered on its own.
    """
    holders = [part for part in module.modules() if any(parameter is not None for parameter in part._parameters.values())]
    if len(holders) == 1:
        raise ValueError(
            f"FSDPStrategy was given no auto_wrap_policy, and all weights of {type(module).__name__} are those of one block, a "
            f"{type(holders[0]).__name__}: each process would gather the whole model in every step, and nothing would be gained. Use "
            "strategy='ddp'; or, to train it so all the same, choose the block: "
            f"FSDPStrategy(auto_wrap_policy={{{type(holders[0]).__name__}}})."
        )
    kinds: Counter[str] = Counter()
    for part in module.modules():
        if (
            part is not module
            and next(part.children(), None) is not None
            and not isinstance(part, (torch.nn.ModuleList, torch.nn.ModuleDict))
        ):
            kinds[type(part).__name__] += sum(parameter.numel() for parameter in part.parameters())
    example = f"{{{kinds.most_common(1)[0][0]}}}" if kinds else "{Block}"
    rank_zero_warn(
        f"FSDPStrategy was given no auto_wrap_policy, so all weights of {type(module).__name__} are gathered at once in every step: at its "
        "peak each process holds the whole model. Pass the classes of the blocks that it is made of, such as "
        f"FSDPStrategy(auto_wrap_policy={example}).",
        category=PossibleUserWarning,
    )


def explain(module: Module, error: AssertionError) -> str:
    dtypes = sorted({str(parameter.dtype) for parameter in module.parameters() if parameter.requires_grad})
    if "uniform original parameter dtype" in str(error):
        return (
            f"The weights of {type(module).__name__} are of {', '.join(dtypes)}, and those that are gathered together must be of "
            "one dtype. Convert them, or let auto_wrap_policy choose the modules of each dtype."
        )
    return f"{type(module).__name__} can't be divided: {error}"
