"""What ``sync_dist=True`` asks for: the values that all processes logged under a name become one.

Values are matched by name, never by position. A process that has logged nothing under a name, such as one without any
batch of an evaluation, counts nothing, and learns the value of the others.
"""

from __future__ import annotations

from dataclasses import replace
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

GROUP = 7  # the place of `sync_dist_group` among the arguments of `log`


def reduce_epoch(entries: Entries, strategy: Strategy, module: Any) -> None:
    """Reduce the epoch values that have not been reduced yet; every process must call it, also with none.

    Afterwards each entry holds the total of all processes: a mean is the mean over all samples, wherever they were.

    Raises:
        MisconfigurationException: in every process, if they log a name in different ways.
    """
    shared = {key: entry for key, entry in entries.items() if entry.options.sync_dist and _is_open(entry)}
    _complete(entries, shared, strategy, module)
    totals: dict[Any, dict[str, tuple[Tensor, str]]] = {None: {}}
    plain = [(repr(key), entry) for key, entry in shared.items() if entry.source is None]
    for name, entry in plain:
        values = totals.setdefault(entry.options.sync_dist_group, {})
        reduction = entry.options.reduction
        values[name] = (_total(entry, strategy.root_device), "sum" if reduction == "mean" else reduction)
        values[f"{name} weight"] = (
            torch.tensor(float(entry.weight), dtype=_wide(strategy.root_device), device=strategy.root_device),
            "sum",
        )
    for group, values in totals.items():
        reduced = strategy.reduce_named(values, group) if values else {}
        for name, entry in plain:
            if name in reduced:
                entry.total, entry.host_total, entry.weight = reduced[name], None, float(reduced[f"{name} weight"])
                entry.dtype = entry.dtype or torch.get_default_dtype()
                entry.synced = True


def reduce_steps(entries: Entries, strategy: Strategy) -> None:
    """Reduce the values of the current training step; every process must call it, also with none.

    A mean is that over the processes that logged the name in this step.
    """
    shared = {
        repr(key): entry
        for key, entry in entries.items()
        if entry.options.sync_dist and entry.on_step and entry.scope in BATCH_TRAIN and entry.value is not None and entry.source is None
    }
    ops = {name: entry.options.reduction for name, entry in shared.items()}
    others = strategy.compare(ops)
    for kinds in others or ():
        _refuse_difference(ops, kinds)
        ops = {**ops, **kinds}
    device = strategy.root_device
    values: dict[str, tuple[Tensor, str]] = {}
    for name, op in ops.items():
        here = shared.get(name)
        value = _neutral(op) if here is None else here.value
        values[name] = (torch.as_tensor(value, dtype=_wide(device), device=device).detach(), "sum" if op == "mean" else op)
        values[f"{name} count"] = (_number(float(here is not None), device), "sum")
    reduced = strategy.reduce_named(values) if values else {}
    for name, entry in shared.items():
        value = reduced[name] / reduced[f"{name} count"] if ops[name] == "mean" else reduced[name]
        entry.value = value.to(entry.value.dtype) if isinstance(entry.value, Tensor) else value
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


def _is_open(entry: Entry) -> bool:
    return entry.has_epoch_value and not entry.synced


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


def _complete(entries: Entries, shared: Entries, strategy: Strategy, module: Any) -> None:
    """Add empty entries for what only other processes have logged, so that all hold the same names in the same order."""
    known = {
        key: (entry.options.reduction, _portable(entry), _attribute(module, entry.source))
        for key, entry in entries.items()
        if _is_open(entry) and (entry.options.sync_dist or entry.source is not None)
    }
    others = strategy.compare({repr(key): op for key, (op, _, _) in known.items()}, known)
    for theirs in others or ():
        _refuse_difference({key: op for key, (op, _, _) in known.items()}, {key: op for key, (op, _, _) in theirs.items()})
        for key, (_, (given, options), attribute) in theirs.items():
            if key in known:
                continue
            entry = entries.get(key) or Entry(key[1], key[0], key[2], given, options)
            entries[key] = entry
            if attribute is not None:
                entry.source, entry.weight = module.get_submodule(attribute), 1
                continue
            if options.sync_dist:
                shared[key] = entry
    ordered = sorted(shared, key=repr)
    for key in ordered:
        shared[key] = shared.pop(key)


def _portable(entry: Entry) -> tuple[Any, Any]:
    """Arguments and options without the process group, which can't be sent."""
    given = (*entry.given[:GROUP], None, *entry.given[GROUP + 1 :])
    return given, replace(entry.options, sync_dist_group=None)


def _attribute(module: Any, metric: Any) -> str | None:
    return None if metric is None else next((path for path, submodule in module.named_modules() if submodule is metric), None)


def _refuse_difference(mine: dict[Any, str], theirs: dict[Any, str]) -> None:
    for key, op in theirs.items():
        if mine.get(key, op) != op:
            raise MisconfigurationException(
                f"{key!r} is logged with reduce_fx={mine[key]!r} in this process and {op!r} in another. Log it in the same way everywhere."
            )
