"""What each process of a resumed run needs beside weights, optimizers and callbacks: its random numbers, its data, what it has logged."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.fabric.collectives import is_distributed
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import collect_rng_states
from lightning.pytorch import packed
from lightning.pytorch.loops.progress import Next
from lightning.pytorch.metric_entry import Entry, Options, is_metric

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

State = dict[str, Any]

PUBLISHED = ("_callback", "_steps", "_logged", "_bar")
KEPT = ("value", "total", "host_total", "weight", "serial", "merged", "dtype")  # of an entry


# ---- saving ---------------------------------------------------------------------------------------------------------


def states(trainer: Trainer, gradients: Collection[str] = (), callbacks: State | None = None) -> Any:
    """The state of every process, in the order of their ranks; all must call it.

    A process that fails can't ask the others, and has None in their places. The states of very many are packed, on rank 0 alone.

    Args:
        trainer: whose run.
        gradients: the names of the parameters whose gradients a step to come still uses.
        callbacks: the states of the callbacks of this process.
    """
    strategy, own = trainer.strategy, _own_state(trainer)
    from lightning.pytorch.apart import differences

    own["apart"] = differences(trainer, callbacks or {})
    found = strategy.own_gradients() if gradients and strategy.world_size > 1 else {}
    own["gradients"] = {name: gradient for name, gradient in found.items() if name in gradients}
    if strategy.world_size >= packed.MANY and is_distributed() and not getattr(strategy, "failing", False):
        return packed.gather_packed(own)
    return [own] if strategy.world_size == 1 else strategy.gather_objects(own)


def before_validation(trainer: Trainer) -> State:
    """What a validation depends on, at its start: a checkpoint that is saved in the middle of one lets it begin anew."""
    seen = list(trainer.validate_loop.seen)
    return {"random": collect_rng_states(), "validation": trainer._data.validation_state(), "seen": seen}


def before_stop(trainer: Trainer) -> State:
    """What an epoch has logged that is ended in the middle: the hooks of its end, and that end itself, empty it."""
    import copy

    return copy.deepcopy(_metrics_state(trainer))


def _own_state(trainer: Trainer) -> State:
    loop = trainer.fit_loop
    now = loop.before_validation or before_validation(trainer)
    return {
        "random": now["random"],
        "validation": now["validation"],
        "training": _training_data(trainer),
        "loaded_in": (trainer._data.train_epoch, trainer._data.val_epoch),
        "seed": trainer._data.seed,
        "metrics": _metrics_state(trainer),
        "before_stop": loop.before_stop,
    }


def _training_data(trainer: Trainer) -> Any:
    """Where the training loader is, after the batches that count."""
    loop = trainer.fit_loop
    if loop.loader is None:
        return None
    at = loop.progress.position()
    batches = at["batch_idx"]
    # The last batch counts once the hooks of its end are called, which may be before the loop leaves it; until then its step is run anew.
    through = batches >= loop.loader.num_batches or (at["is_last"] and batches > 0 and at["ending"])
    over = through or at["next"] not in (Next.BATCH, Next.VALIDATE) or (batches == 0 and not loop.reading)
    return loop.loader.state_dict(None if over else batches)


def _metrics_state(trainer: Trainer) -> State:
    metrics, loop = trainer._metrics, trainer.fit_loop
    metrics.merge_steps()
    running = {id(entry.source) for entry in trainer.validate_loop.entries.values()} if loop.before_validation is not None else set()
    found = {id(metric): name for name, metric in _metrics_within(trainer)}
    return {
        "serial": metrics.serial,
        "rows_due": loop.progress.ending and loop.progress.stepped >= metrics.flush_at,
        "entries": [_entry_state(entry, found) for entry in loop.entries.values() if entry.options.sync_dist_group is None],
        "published": {name: {key: _plain(value) for key, value in getattr(metrics, name).items()} for name in PUBLISHED},
        "modules": {
            name: {"count": metric.update_count, "state": dict(metric.metric_state)}
            for name, metric in _metrics_within(trainer)
            if metric.update_count > 0 and id(metric) not in running
        },
    }


def _entry_state(entry: Entry, found: dict[int, str]) -> State:
    entry.settle()
    state: State = {name: _plain(getattr(entry, name)) for name in KEPT}
    state["key"], state["options"] = (entry.scope, entry.name, entry.dataloader_idx), astuple(entry.options)
    state["takes_metric"], state["source"] = entry.takes_metric, found.get(id(entry.source))
    return state


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _metrics_within(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """The torchmetrics objects of the model, each once."""
    module = trainer.strategy.lightning_module
    return ((name, part) for name, part in module.named_modules() if is_metric(part)) if module is not None else iter(())


# ---- going on -------------------------------------------------------------------------------------------------------


def own_part(saved: Any, rank: int, world_size: int) -> State | None:
    """The state that a process goes on from; None if the checkpoint holds none.

    Args:
        saved: from :func:`states`; None in checkpoints of others.
        rank: of this process.
        world_size: how many there are now.
    """
    saved = packed.opened(saved)
    if not saved:
        return None
    if len(saved) == world_size:
        own: State | None = saved[rank]
        if own is None:
            rank_zero_warn(
                "The checkpoint was saved by a process that failed, which knew nothing of the others: the random numbers of those, and "
                "what they have logged in the epoch, are not those of the interrupted run."
            )
        return own
    return _resharded(list(saved), rank)


def _resharded(saved: list[State | None], rank: int) -> State | None:
    """The part of a process in a run of more or fewer processes."""
    first = saved[0]
    mine = saved[rank] if rank < len(saved) else None
    base = mine if mine is not None else first
    if base is None:
        return None
    entries = []
    for state in base["metrics"]["entries"]:
        if Options(*state["options"]).sync_dist:  # reduced over all processes at the epoch's end, so they may stand in one of them
            state = _merged(state["key"], saved) if rank == 0 else None
        elif mine is None:
            state = None
        if state is not None:
            entries.append(state)
    if any(part is not None and part["metrics"]["modules"] for part in saved):
        rank_zero_warn(
            f"The checkpoint is from {len(saved)} process(es): what Metrics have gathered in its epoch can't be shared out among others, "
            "so they begin anew."
        )
    metrics = {**base["metrics"], "entries": entries, "modules": {}}
    return {
        **base,
        "metrics": metrics,
        "training": None,
        "validation": [],
        "random": None if mine is None else mine["random"],
        "gradients": {},
        "before_stop": None,
    }


def _merged(key: Any, saved: list[State | None]) -> State | None:
    """What all processes have gathered under a key, as one."""
    found = [state for part in saved if part is not None for state in part["metrics"]["entries"] if tuple(state["key"]) == tuple(key)]
    if not found:
        return None
    reduction = Options(*found[0]["options"]).reduction
    combine: Any = {"max": max, "min": min}.get(reduction, sum)
    totals = [state["total"].cpu() for state in found if state["total"] is not None]
    hosts = [state["host_total"] for state in found if state["host_total"] is not None]
    return {
        **found[0],
        "total": combine(totals) if totals else None,
        "host_total": combine(hosts) if hosts else None,
        "weight": sum(state["weight"] for state in found),
    }


def take_up(trainer: Trainer) -> None:
    """Do what a resumed run does before its data are asked for; nothing in a run that starts afresh."""
    loop, metrics = trainer.fit_loop, trainer._metrics
    p = loop.progress
    # A bound has ended the epoch in the middle, and still stands; with more steps the epoch goes on.
    ends = loop.done() or (loop.may_stop() and any(callback.stopping_reason.value for callback in trainer.early_stopping_callbacks))
    stays = p.next is Next.BATCH and p.batch_idx > 0 and not p.ending and ends
    if loop.resumed is not None:
        within = None if stays else loop.resumed.get("before_stop")
        _load_metrics(trainer, within or loop.resumed["metrics"])
        loop.random_states = loop.resumed["random"]
        trainer._data.goes_on_with(*loop.resumed["loaded_in"])
        trainer._data.seed = loop.resumed.get("seed")
    is_over, p.stopping = stays and not p.stopping, False
    if is_over:
        p.next_epoch()
        return
    if p.next is not Next.EPOCH and not stays:
        return
    # Saved by a hook of the epoch's end: what follows these hooks is still to be done.
    loop.log_step = max(p.stepped - 1, 0)
    with torch.enable_grad(), metrics.collecting(loop.entries):
        metrics.epoch_ended = True
        if p.ending:
            loop.schedulers.step_plateau("epoch")
        metrics.end_epoch(loop.log_step)
    if stays:
        p.next_epoch()
    else:
        p.start_anew()


def take_up_data(trainer: Trainer) -> None:
    """Let loaders go on where those of the interrupted run were; to be called when there are loaders."""
    loop = trainer.fit_loop
    resumed, loop.resumed = loop.resumed, None
    if resumed is None:
        return
    if resumed["training"] is not None and loop.loader is not None:
        loop.loader.load_state_dict(resumed["training"])
    trainer._data.load_validation_state(resumed["validation"])


def _load_metrics(trainer: Trainer, state: State) -> None:
    metrics, loop = trainer._metrics, trainer.fit_loop
    here = dict(_metrics_within(trainer))
    for name, kept in state["modules"].items():
        if name in here:
            _load_metric(here[name], kept)
    for saved in state["entries"]:
        entry = _entry(saved, here)
        loop.entries[entry.scope, entry.name, entry.dataloader_idx] = entry
    for name in PUBLISHED:
        getattr(metrics, name).update(state["published"][name])
    metrics.serial = state["serial"]
    loop.rows_due = state["rows_due"]


def _load_metric(metric: Any, kept: State) -> None:
    """Give a Metric what it had gathered."""
    for name, value in kept["state"].items():
        moved = [each.to(metric.device) for each in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
    metric._update_count, metric._computed = kept["count"], None


def _entry(saved: State, metrics: dict[str, Any]) -> Entry:
    scope, name, dataloader_idx = saved["key"]
    entry = Entry(name, scope, dataloader_idx, (), Options(*saved["options"]))
    if saved["takes_metric"]:
        entry.take_metric()
    entry.source = metrics.get(saved["source"])
    for key in KEPT:
        setattr(entry, key, saved[key])
    return entry
