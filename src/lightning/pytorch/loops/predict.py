"""One run over prediction data."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.data import has_iterable_dataset, replace_batch_sampler
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks.prediction_writer import BasePredictionWriter
from lightning.pytorch.loops import bind
from lightning.pytorch.loops.evaluate import metrics_held, no_gradients, restore_modes, taken, takes_batch_idx
from lightning.pytorch.loops.gathering import Gathering
from lightning.pytorch.trainer.states import RunningStage

if TYPE_CHECKING:
    from lightning.pytorch.data import EvalLoaders
    from lightning.pytorch.trainer.trainer import Trainer


class PredictionLoop:
    """The loop of ``predict``.

    Args:
        trainer: whose model predicts.

    Attributes:
        streams: whether outputs are given one by one, while ``trainer.predict_stream`` is being iterated over.
        dataloader_idx: the loader that is run through.
    """

    streams = False

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.loaders: EvalLoaders | None = None
        self.return_predictions = True
        self.dataloader_idx = 0
        self._predictions: list[list[Any]] = []
        self.epoch_batch_indices: list[list[list[int]]] = []
        self.current_batch_indices: list[int] = []

    @property
    def num_batches(self) -> list[float]:
        """Batches that are taken from each loader."""
        return [] if self.loaders is None else self.loaders.num_batches

    @property
    def predictions(self) -> list[Any]:
        """What ``predict_step`` returned for each batch; with several loaders, a list of that for each."""
        return self._predictions[0] if len(self._predictions) == 1 else self._predictions

    def run(self) -> Any:
        """Run through all loaders once.

        Returns:
            the list of what ``predict_step`` returned for each batch; with several loaders, a list of such lists.
        """
        with no_gradients(self.trainer):
            for _ in self.outputs():  # which gives none where nobody waits for them
                pass
        return self.predictions if self.return_predictions and self._predictions else None

    def stream(self) -> Iterator[Any]:
        """Run through all loaders once, and give what ``predict_step`` returned for each batch, on the CPU, keeping nothing."""
        outputs, evaluating, signals = self.outputs(), no_gradients(self.trainer), self.trainer._signals
        assert signals is not None
        self.return_predictions, self.streams = False, True
        try:
            while True:
                with evaluating:  # not while the caller has its turn
                    try:
                        box = [next(outputs)]
                    except StopIteration:
                        return
                signals.in_loop = False  # Ctrl-C ends the caller's turn at once
                yield box.pop()
                signals.in_loop = True
        finally:
            outputs.close()
            del self.streams

    def outputs(self) -> Generator[Any, None, None]:
        """Run through all loaders once; gives the outputs of each batch if :attr:`streams`, else none."""
        trainer = self.trainer
        hooks, module = trainer._hooks, trainer.lightning_module
        self._predictions = []
        if trainer.limit_predict_batches == 0:
            return
        with trainer._in_stage(RunningStage.PREDICTING):
            self.loaders = trainer._data.evaluation("predict")
            if not self.num_batches:  # a process may have no batch where others have some
                return
            writers = [c for c in trainer.callbacks if isinstance(c, BasePredictionWriter)]
            self.wants_indices = bool(writers)
            self.keeps = self.return_predictions or any(writer.interval.on_epoch for writer in writers)
            count = len(self.loaders.loaders)
            self._predictions = [[] for _ in range(count)]
            self.epoch_batch_indices = [[] for _ in range(count)]
            modes = {submodule: submodule.training for submodule in module.modules()}
            module.on_predict_model_eval()
            try:
                with Gathering(trainer, "predict", self.loaders) as gathering:
                    hooks.on_predict_start()
                    hooks.on_predict_epoch_start()
                    for index, loader in gathering.over(self.loaders.loaders):
                        yield from self.run_loader(index, loader)
                    hooks.on_predict_epoch_end()
                    hooks.on_predict_end()
            finally:
                restore_modes(modes)

    def run_loader(self, index: int, loader: Any) -> Iterator[Any]:
        """Run through one loader."""
        trainer = self.trainer
        hooks, several = trainer._hooks, len(self.num_batches) > 1
        metrics, signals = trainer._metrics, trainer._signals
        where = (index,) if several else ()
        bound = trainer.strategy.step_of("predict_step")
        takes_index = takes_batch_idx(bound, "predict_step", several)
        step = bind.profiled(trainer, bound, f"[Strategy]{type(trainer.strategy).__name__}.predict_step")
        prepare = bind.transfer(trainer, index)
        forward_context = bind.forward_context(trainer, "predict")
        batches = recorded(loader, self) if self.wants_indices else loader
        fetched = bind.fetched(trainer, batches, "[_PredictionLoop].predict_next")
        own, in_turn = taken(fetched, self.num_batches[index], trainer.strategy)
        self.dataloader_idx, keeps, streams = index, self.keeps, self.streams
        keeps_indices = keeps and self.wants_indices
        batch_idx = -1
        for batch in own:
            batch_idx += 1
            batch = prepare(batch)
            if not in_turn(batch_idx):
                with metrics_held(trainer.lightning_module), forward_context():
                    step(batch, batch_idx, *where) if takes_index else step(batch, *where)
                continue
            hooks.on_predict_batch_start(batch, batch_idx, *where)
            with forward_context():
                outputs = step(batch, batch_idx, *where) if takes_index else step(batch, *where)
            if outputs is None:
                rank_zero_warn("`predict_step` returned None: there will be no prediction for this batch.")
            hooks.on_predict_batch_end(outputs, batch, batch_idx, *where)
            if keeps_indices:
                self.epoch_batch_indices[index].append(self.current_batch_indices)
            if keeps:
                self._predictions[index].append(move_data_to_device(outputs, "cpu"))
            batch = None  # neither is kept while the next batch is fetched and computed
            metrics.serial += 1
            if streams:
                box = [move_data_to_device(outputs, "cpu")]
                outputs = None
                yield box.pop()
            outputs = None
            if signals is not None and signals.pending:
                signals.heed(trainer.fit_loop.progress.total_batches, metrics.serial)


class RecordedSampler:
    """A batch sampler that remembers which samples it sent for, in the order in which their batches will arrive.

    Args:
        batch_sampler: the loader's own.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)
        self.sent: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.sent.clear()
        for indices in self.batch_sampler:
            self.sent.append(list(indices))
            yield indices

    def __len__(self) -> int:
        return len(self.batch_sampler)


def recorded(loader: Any, loop: PredictionLoop) -> Iterator[Any]:
    """The loader's batches, with ``loop.current_batch_indices`` set to the indices of the samples of each."""
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None or has_iterable_dataset(loader):
        rank_zero_warn(
            f"The prediction loader, a {type(loader).__name__}, has no sampler of indices: a prediction writer gets no batch indices.",
            category=PossibleUserWarning,
        )
        loop.current_batch_indices = []
        yield from loader
        return
    sampler = RecordedSampler(loader.batch_sampler)
    for batch in replace_batch_sampler(loader, sampler):
        loop.current_batch_indices = sampler.sent.popleft()
        yield batch
