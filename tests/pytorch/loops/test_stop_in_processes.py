"""``trainer.should_stop`` in several processes: whoever sets it, and wherever, all of them end after the same batch."""

from __future__ import annotations

import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from trainers import Numbers, Weight, joined

from lightning.pytorch.callbacks import EarlyStopping, Timer


class Stops(Weight):
    """Asks for a stop in a hook of the second epoch, or of the third batch, on some ranks."""

    def __init__(self, ranks: list[int], hook: str) -> None:
        super().__init__()
        self.ranks, self.hook, self.validated = ranks, hook, 0

    def ask(self, hook: str, here: bool) -> None:
        if hook == self.hook and here and self.trainer.global_rank in self.ranks:
            self.trainer.should_stop = True

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.ask("training_step", self.trainer.fit_loop.progress.total_batches == 2)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.ask("on_train_batch_end", self.trainer.fit_loop.progress.total_batches == 3)

    def on_train_epoch_start(self) -> None:
        self.ask("on_train_epoch_start", self.trainer.current_epoch == 1)

    def on_train_epoch_end(self) -> None:
        self.ask("on_train_epoch_end", self.trainer.current_epoch == 1)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean(), sync_dist=True)

    def on_validation_end(self) -> None:
        self.validated += 1
        self.ask("on_validation_end", self.trainer.current_epoch == 1)


def stopped(rank: int, size: int, cases: list[Any], trainer_arguments: dict[str, Any]) -> list[Any]:
    results = []
    for ranks, hook in cases:
        trainer, model = joined(max_epochs=4, **trainer_arguments), Stops(ranks, hook)
        trainer.fit(model, DataLoader(Numbers(8 * size)), DataLoader(Numbers(3)))
        results.append([trainer.global_step, trainer.current_epoch, model.validated, trainer.should_stop])
    return results


@pytest.mark.parametrize(("size", "hooks"), [(2, ["training_step", "on_train_batch_end"]), (3, ["training_step"])])
def test_all_processes_stop_after_the_same_batch_whoever_asks(size: int, hooks: list[str]) -> None:
    everybody = list(range(size))
    cases: list[Any] = [(ranks, hook) for ranks in ([0], [1], everybody) for hook in hooks]
    ranks = run(stopped, size, cases, {}, timeout=50)
    assert all(results == ranks[0] for results in ranks)
    for (asking, _), (steps, epochs, validated, stop) in zip(cases, ranks[0]):
        assert steps == 3 if asking == everybody else 3 <= steps <= 4
        assert [epochs, validated, stop] == [1, 1, True]


def test_stop_asked_for_between_batches_is_heard_at_once() -> None:
    hooks = {"on_train_epoch_start": [8, 2, 1], "on_train_epoch_end": [16, 2, 2], "on_validation_end": [16, 2, 2]}
    cases: list[Any] = [(asking, hook) for asking in ([0], [1], [0, 1]) for hook in hooks]
    for results in run(stopped, 2, cases, {}):
        assert [result[:3] for result in results] == [hooks[hook] for _, hook in cases]


def test_stop_of_one_process_waits_for_the_minimum() -> None:
    cases: list[Any] = [([1], "training_step"), ([0], "on_train_epoch_start"), ([0, 1], "training_step")]
    for results in run(stopped, 2, cases, {"min_epochs": 3}):
        assert [result[:2] for result in results] == [[24, 3]] * 3


class Differs(Weight):
    """A metric that gets worse on rank 1 alone, after the second epoch; steps take some time."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        worse = self.trainer.global_rank == 1 and self.trainer.current_epoch == 2
        self.log("val", 1.0 if worse else -float(self.trainer.current_epoch), sync_dist=False)


def stopped_by_callbacks(rank: int, size: int) -> list[Any]:
    warnings.filterwarnings("ignore", ".*sync_dist")
    results = []
    for callback in (EarlyStopping("val", patience=0), Timer(timedelta(seconds=0.3 if rank == 0 else 1000))):
        trainer = joined(max_epochs=-1, callbacks=[callback])
        trainer.fit(Differs(), DataLoader(Numbers(8 * size)), DataLoader(Numbers(3 * size)))
        results.append([trainer.global_step, trainer.current_epoch, trainer.should_stop])
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_callbacks_stop_all_processes_after_the_same_batch(size: int) -> None:
    ranks = run(stopped_by_callbacks, size)
    assert all(results == ranks[0] for results in ranks)
    early, timed = ranks[0]
    assert early == [24, 3, True]
    assert timed[2]
