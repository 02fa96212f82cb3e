"""What ``sync_dist=True`` asks for: the values that all processes logged under a name become one.

Values are matched by name, never by position. A process that has logged nothing under a name, such as one without any
batch of an evaluation, counts nothing, and learns the value of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.metric_entry import BATCH_EVAL, BATCH_TRAIN, Entry

if TYPE_CHECKING:
    from lightning.fabric.strategies.strategy import Strategy

Entries = dict[tuple[Any, str, Any], Entry]


def reduce_epoch(entries: Entries, strategy: Strategy, module: Any) -> None:
    """Reduce the epoch values that have not been reduced yet; every process must call it, also with none.

    Afterwards each entry holds the total of all processes: a mean is the mean over all samples, wherever they were. Metrics
    reduce themselves when they are computed, which happens here, in the same order everywhere.

    Raises:
        MisconfigurationException: in every process, if they log a name in different ways.
    """
    open_ones = {key: entry for key, entry in entries.items() if entry.has_epoch_value and not entry.synced}
    shared = {key: entry for key, entry in open_ones.items() if entry.source is not None or entry.options.sync_dist}
    groups: dict[Any, Entries] = {entry.options.sync_dist_group: {} for entry in shared.values()}
    groups[None] = _all_of({k: e for k, e in shared.items() if e.options.sync_dist_group is None}, entries, strategy, module)
    for group, members in groups.items():
        if group is not None:
            members.update((key, entry) for key, entry in shared.items() if entry.options.sync_dist_group is group)
        values: dict[str, tuple[Tensor, str]] = {}
        for key, entry in members.items():
            if entry.source is not None:
                entry.source.compute()  # kept by the Metric until its next update
                entry.synced = True
                continue
            reduction, device = entry.options.reduction, strategy.root_device
            values[repr(key)] = (_total(entry, device), "sum" if reduction == "mean" else reduction)
            values[f"{key!r} weight"] = (_number(float(entry.weight), device), "sum")
        reduced = strategy.reduce_named(values, group) if values else {}
        for key, entry in members.items():
            if entry.source is None:
                entry.total, entry.host_total, entry.weight = reduced[repr(key)], None, float(reduced[f"{key!r} weight"])
                entry.dtype = entry.dtype or torch.get_default_dtype()
                entry.synced = True


def reduce_steps(entries: Entries, strategy: Strategy, module: Any, serial: int) -> None:
    """Reduce the values of the current training step; every process must call it, also with none.

    A mean is that over the processes that logged the name in this step.

    Args:
        entries: of the training loop.
        strategy: knows the processes.
        module: the user's.
        serial: the batch of the step.

    Raises:
        MisconfigurationException: in every process, if they log a name in different ways.
    """
    logged = {
        key: entry
        for key, entry in entries.items()
        if entry.serial == serial and entry.options.sync_dist and entry.on_step and entry.scope in BATCH_TRAIN
        and entry.value is not None and entry.source is None and entry.options.sync_dist_group is None
    }  # fmt: skip
    device = strategy.root_device
    values: dict[str, tuple[Tensor, str]] = {}
    members = _all_of(logged, entries, strategy, module)
    for key, entry in members.items():
        op = entry.options.reduction
        value = entry.value if key in logged else _neutral(op)
        values[repr(key)] = (torch.as_tensor(value, dtype=_wide(device), device=device).detach(), "sum" if op == "mean" else op)
        values[f"{key!r} count"] = (_number(float(key in logged), device), "sum")
    reduced = strategy.reduce_named(values) if values else {}
    for key, entry in members.items():
        mean = entry.options.reduction == "mean"
        value = reduced[repr(key)] / reduced[f"{key!r} count"] if mean else reduced[repr(key)]
        entry.value = value.to(entry.value.dtype if isinstance(entry.value, Tensor) else torch.get_default_dtype())
        entry.merged = False


def warn_of_local_values(entries: Entries) -> None:
    """Tell once for each name that an evaluation's metric is that of rank 0 alone."""
    names = sorted(
        entry.name
        for entry in entries.values()
        if entry.scope in BATCH_EVAL and entry.on_epoch and entry.source is None and not entry.options.sync_dist
        and not entry.options.rank_zero_only
    )  # fmt: skip
    if names:
        rank_zero_warn(
            f"{', '.join(map(repr, names))} were logged with sync_dist=False: in a run of several processes each sees a part of the data, "
            "and the value shown is that of rank 0. Use `self.log(..., sync_dist=True)` for the value of all data.",
            category=PossibleUserWarning,
        )


def _total(entry: Entry, device: torch.device) -> Tensor:
    """What the entry has gathered, in double precision where the device has it."""
    op = entry.options.reduction
    total = torch.as_tensor(_neutral(op) if entry.total is None else entry.total.detach(), dtype=_wide(device), device=device)
    if entry.host_total is None:
        return total
    host = _number(entry.host_total, device)
    if op in ("mean", "sum"):
        return total + host
    return torch.minimum(total, host) if op == "min" else torch.maximum(total, host)


def _number(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=_wide(device), device=device)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in ("mps", "xla") else torch.float64


def _neutral(reduction: str) -> float:
    return {"max": -float("inf"), "min": float("inf")}.get(reduction, 0.0)


def _all_of(mine: Entries, entries: Entries, strategy: Strategy, module: Any) -> Entries:
    """The entries of all keys that any process holds, in the same order everywhere; those that this one lacks are added, empty.

    Raises:
        MisconfigurationException: in every process, if two of them reduce a name in different ways.
    """
    specs = {key: (entry.options.reduction, entry.given, entry.options, _attribute(module, entry.source)) for key, entry in mine.items()}
    others = strategy.compare({repr(key): spec[0] for key, spec in specs.items()}, specs)
    if others is None:
        return {key: mine[key] for key in sorted(mine, key=repr)}
    _refuse_differences([{key: spec[0] for key, spec in theirs.items()} for theirs in others])
    every = {key: spec for theirs in others for key, spec in theirs.items()}
    for key, (_, given, options, attribute) in every.items():
        entry = entries.setdefault(key, Entry(key[1], key[0], key[2], given, options))
        if attribute is not None and entry.source is None:
            entry.source, entry.weight = module.get_submodule(attribute), 1
    return {key: entries[key] for key in sorted(every, key=repr)}


def _attribute(module: Any, metric: Any) -> str | None:
    return None if metric is None else next((path for path, submodule in module.named_modules() if submodule is metric), None)


def _refuse_differences(all_ops: list[dict[Any, str]]) -> None:
    """Refuse a name that two processes reduce in different ways; all of them hold the same list of all their reductions."""
    agreed: dict[Any, tuple[int, str]] = {}
    for rank, ops in enumerate(all_ops):
        for key, op in ops.items():
            first, other = agreed.setdefault(key, (rank, op))
            if other != op:
                raise MisconfigurationException(
                    f"{key} is logged with reduce_fx={other!r} on rank {first} and {op!r} on rank {rank}. Log a name in the same way "
                    "in every process."
                )
