"""One run over validation or test data: alone, inside fit, or as the sanity check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.data import set_epoch
from lightning.pytorch.dispatch import no_op, override_of, scoped
from lightning.pytorch.loops import bind
from lightning.pytorch.loops.batches import parameters_of
from lightning.pytorch.loops.gathering import Gathering
from lightning.pytorch.metric_entry import Entry, is_metric
from lightning.pytorch.reduction import warn_of_local_values
from lightning.pytorch.trainer.states import RunningStage

if TYPE_CHECKING:
    from lightning.pytorch.data import EvalLoaders
    from lightning.pytorch.trainer.trainer import Trainer

Results = list[dict[str, float]]


class EvaluationLoop:
    """The loop of ``validate``, ``test``, of validation inside ``fit``, and of the sanity check.

    Args:
        trainer: whose model is evaluated.
        name: ``"validation"`` or ``"test"``, which its hooks carry in their names.
        source: ``"val"`` or ``"test"``, which its loaders carry.
    """

    def __init__(self, trainer: Trainer, name: str, source: str) -> None:
        self.trainer = trainer
        self.name = name
        self.source = source
        self.loaders: EvalLoaders | None = None
        self.limit = float("inf")  # batches of each loader; the sanity check sets it
        self.batch_idx = 0
        self.seen: list[int] = []  # batches of each loader in all validation of fit
        self.counts: list[int] = []  # the same, or from 0 where validation is no part of fit: the x values of step rows
        self.entries: dict[Any, Entry] = {}
        self.verbose = True

    def __getstate__(self) -> dict[str, Any]:
        return bind.without_bound(self, EvaluationLoop(self.trainer, self.name, self.source))

    @property
    def num_batches(self) -> list[float]:
        """Batches that are taken from each loader."""
        return [] if self.loaders is None else [min(n, self.limit) for n in self.loaders.num_batches]

    def run(self, finishing: Callable[[], None] = no_op) -> Results:
        """Run through all loaders once.

        Args:
            finishing: called when all is logged, before the hook ``on_validation_end`` or ``on_test_end``.

        Returns:
            one dict of metrics for each loader.
        """
        if getattr(self.trainer._config, f"limit_{self.source}_batches") == 0:
            return []
        with no_gradients(self.trainer):
            return self._run(finishing)

    def _run(self, finishing: Callable[[], None]) -> Results:
        trainer, name = self.trainer, self.name
        hooks, metrics = trainer._hooks, trainer._metrics
        stage = RunningStage.TESTING if name == "test" else RunningStage.VALIDATING
        if trainer.sanity_checking:
            stage = RunningStage.SANITY_CHECKING
        fitting = trainer.state.fn == "fit"
        with trainer._in_stage(stage):
            self.loaders = trainer._data.evaluation(self.source)
            if not self.num_batches:  # a process may have no batch where others have some
                finishing()
                return []
            if fitting:
                trainer.fit_loop.refresh()
            self.bind()
            trainer.strategy.sync_buffers()
            set_epoch(self.loaders.loaders, trainer.current_epoch)
            gathering = Gathering(trainer, name, self.loaders, self.limit)
            with metrics.collecting(self.entries), self.evaluation_mode(), gathering:
                getattr(hooks, f"on_{name}_start")()
                getattr(hooks, f"on_{name}_epoch_start")()
                for index, source in gathering.over(self.loaders.sources):
                    self.run_loader(index, source)
                metrics.batch, metrics.dataloader_idx = None, None
                metrics.close_epoch()
                getattr(hooks, f"on_{name}_epoch_end")()
                metrics.reduce_epoch()  # what these hooks logged
                if metrics.strategy is not None and not trainer.sanity_checking:
                    warn_of_local_values(self.entries)
                results = self.results()
                fit = trainer.fit_loop
                metrics.end_epoch(fit.log_step if fitting else fit.progress.stepped)
                finishing()
                getattr(hooks, f"on_{name}_end")()
        return results

    def run_loader(self, index: int, loader: Any) -> None:
        """Run through one loader."""
        metrics, seen = self.trainer._metrics, self.counts
        several = len(self.num_batches) > 1
        where = (index,) if several else ()
        metrics.dataloader_idx = index if several else None
        prepare = bind.transfer(self.trainer, index)
        start, end, step, forward_context, takes_index = self.start, self.end, self.step, self.forward_context, self.takes_index
        scope, signals = f"{self.name}_step", self.trainer._signals
        self.batch_idx, before = 0, seen[index]
        entries, known, logs_steps, shown = self.entries, 0, False, not self.trainer.sanity_checking
        fetched = bind.fetched(self.trainer, loader, f"[_EvaluationLoop].{self.source}_next")
        batches, in_turn = taken(fetched, self.num_batches[index], self.trainer.strategy)
        batch_idx = -1
        for batch in batches:
            batch_idx += 1
            self.batch_idx = batch_idx
            batch = prepare(batch)
            if not in_turn(batch_idx):
                with metrics.discarding(), metrics_held(self.trainer.lightning_module), forward_context():
                    step(batch, batch_idx, *where) if takes_index else step(batch, *where)
                continue
            metrics.batch, metrics.batch_size = batch, None
            metrics.serial += 1
            start(batch, batch_idx, *where)
            metrics.scope = scope
            with forward_context():
                outputs = step(batch, batch_idx, *where) if takes_index else step(batch, *where)
            end(outputs, batch, batch_idx, *where)
            outputs = metrics.batch = batch = None  # not kept while the next one is fetched and computed
            if len(entries) != known:  # a key is new
                known, logs_steps = len(entries), shown and any(entry.on_step for entry in entries.values())
            if logs_steps:
                metrics.send_step_values(seen[index], with_epoch=False)
            seen[index] += 1
            if signals is not None and signals.pending:
                signals.heed(self.trainer.fit_loop.progress.total_batches, metrics.serial)
        if seen[index] == before:
            kind = type(self.loaders.loaders[index]).__name__  # type: ignore[union-attr]
            rank_zero_warn(f"The {self.source} loader number {index}, a {kind}, gave no batch: nothing was computed.")

    # ---- around the batches -------------------------------------------------------------------------------------------

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """The module in evaluation mode; afterwards each submodule is in the mode that it was in."""
        name, module, metrics = self.name, self.trainer.lightning_module, self.trainer._metrics
        modes = {submodule: submodule.training for submodule in module.modules()}
        scoped(getattr(module, f"on_{name}_model_eval"), f"on_{name}_model_eval", metrics)()
        override = override_of(module, f"on_{name}_model_train", LightningModule)
        try:
            yield
            if override is not None:
                scoped(override, f"on_{name}_model_train", metrics)()
        except BaseException:
            restore_modes(modes)
            raise
        if override is None:
            restore_modes(modes)

    def bind(self) -> None:
        """Resolve what a batch calls."""
        trainer, name = self.trainer, self.name
        assert self.loaders is not None
        hooks = trainer._hooks
        several = len(self.loaders.loaders) > 1
        self.counts = self.seen if trainer.state.fn == "fit" and not trainer.sanity_checking else []
        self.counts += [0] * (len(self.loaders.loaders) - len(self.counts))
        step = trainer.strategy.step_of(f"{name}_step")
        self.takes_index = takes_batch_idx(step, f"{name}_step", several)
        self.step = bind.profiled(trainer, step, f"[Strategy]{type(trainer.strategy).__name__}.{name}_step")
        for hook in ("start", "end"):
            override = override_of(trainer.lightning_module, f"on_{name}_batch_{hook}", LightningModule)
            if override is not None:
                check_takes_loader(override, f"on_{name}_batch_{hook}", several, 3 if hook == "start" else 4)
        self.start = getattr(hooks, f"on_{name}_batch_start")
        self.end = getattr(hooks, f"on_{name}_batch_end")
        self.forward_context = bind.forward_context(trainer, "test" if name == "test" else "val")

    def results(self) -> Results:
        """The epoch's metrics as numbers, one dict for each loader; what was logged for none in particular stands in all."""
        assert self.loaders is not None
        results: list[dict[str, Any]] = [{} for _ in self.loaders.loaders]
        common: dict[str, Any] = {}
        for entry in self.entries.values():
            if entry.has_epoch_value:
                target = common if entry.dataloader_idx is None else results[entry.dataloader_idx]
                target[entry.forked(False)] = entry.epoch_value()
        from lightning.pytorch.metrics import HostCopy

        return [HostCopy({**result, **common}).read() for result in results]


def restore_modes(modes: dict[Module, bool]) -> None:
    """Put each submodule into the mode that it was in: a frozen part stays in evaluation mode."""
    for submodule, training in modes.items():
        submodule.training = training


def no_gradients(trainer: Trainer) -> AbstractContextManager[Any]:
    """Inference mode, or no_grad where that was asked for, or the device has nothing else."""
    # Not in fit: what a module keeps of a validation would be an inference tensor, which training cannot use.
    inference = trainer._config.inference_mode and trainer.strategy.has_inference_mode and trainer.state.fn != "fit"
    return torch.inference_mode() if inference else torch.no_grad()


def taken(loader: Any, count: float, strategy: Any) -> tuple[Iterable[Any], Callable[[int], Any]]:
    """The batches that this process takes from a loader, and whether the batch of an index is one of its own.

    Where a forward pass needs all processes, those that ran out repeat a batch, which counts nothing, until all have.
    """
    if not strategy.forward_is_collective or strategy.world_size == 1:
        return islice(loader, int_or_none(count)), always
    from lightning.fabric.uneven import Lockstep

    lockstep = Lockstep(loader, "join")
    lockstep.agree(count)
    batches = lockstep if lockstep.lengths else islice(lockstep, int_or_none(count))
    return batches, always if lockstep.is_even else lockstep.weight


def always(batch_idx: int) -> bool:
    """Every batch is this process's own."""
    return True


@contextmanager
def metrics_held(module: Module) -> Iterator[None]:
    """The Metrics of the module keep their states, whatever is computed inside."""
    kept = {metric: deepcopy(metric.__dict__) for metric in module.modules() if is_metric(metric)}
    try:
        yield
    finally:
        for metric, state in kept.items():
            metric.__dict__.update(state)


def int_or_none(count: float) -> int | None:
    """The bound for ``islice``: None where there is none."""
    return None if count == float("inf") else int(count)


def takes_batch_idx(step: Callable[..., Any], name: str, several: bool) -> bool:
    """Whether a step takes the batch's index.

    Raises:
        RuntimeError: if it takes a dataloader_idx and there is one loader, or does not and there are several.
    """
    takes_loader = check_takes_loader(step, name, several, 3)
    count, variadic, _ = parameters_of(step)
    return variadic or count - (1 if takes_loader else 0) >= 2


def check_takes_loader(function: Callable[..., Any], name: str, several: bool, count_with: int) -> bool:
    """Whether a step or hook takes the loader's index; with several loaders it must, with one it must not have to.

    Raises:
        RuntimeError: if it is otherwise.
    """
    count, variadic, names = parameters_of(function)
    if variadic:
        return False
    takes = "dataloader_idx" in names or count >= count_with
    if several and not takes:
        raise RuntimeError(f"There are several loaders, and `{name}` does not take `dataloader_idx`: add it as the last parameter.")
    if takes and not several and not _has_default(function, names[-1]):
        raise RuntimeError(
            f"`{name}` takes `{names[-1]}`, and there is only one loader: leave the parameter out, or give it the default 0."
        )
    return takes


def _has_default(step: Callable[..., Any], parameter: str) -> bool:
    import inspect

    found = inspect.signature(step).parameters.get(parameter)
    return found is not None and found.default is not inspect.Parameter.empty
