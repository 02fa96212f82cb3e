"""Callbacks and loggers in several processes: they decide alike everywhere, and rank 0 writes."""

from __future__ import annotations

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from trainers import Evaluated, Numbers, Rows, Weight, joined

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def numbers(count: int, batch_size: int = 1) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count), batch_size=batch_size)


class Scored(Weight):
    """Validates to a score that the test gives for each rank and validation run, which is not synchronised."""

    def __init__(self, scores: list[list[float | None]]) -> None:
        super().__init__()
        self.scores = scores
        self.validated = 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        score = self.scores[self.trainer.global_rank][self.validated]
        if score is not None:
            self.log("score", score, on_epoch=True)

    def on_validation_end(self) -> None:
        self.validated += 1


# ---- early stopping -------------------------------------------------------------------------------------------------


def stopped(rank: int, size: int, scores: list[Any], strict: bool = True, min_epochs: int = 0) -> list[Any]:
    warnings.filterwarnings("ignore", ".*sync_dist=False.*|.*has not been logged.*|.*not in every process.*")
    stopping = EarlyStopping("score", patience=1)
    stopping.strict = strict
    trainer = joined(max_epochs=4, callbacks=stopping, min_epochs=min_epochs)
    trainer.fit(Scored(scores), numbers(4), numbers(2))
    return [trainer.current_epoch, trainer.global_step, stopping.stopped_epoch, stopping.stopping_reason.name]


def test_all_processes_stop_together_where_the_metric_of_one_says_so() -> None:
    falling, rising = [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]
    assert run(stopped, 2, [falling, rising]) == [[2, 4, 1, "PATIENCE_EXHAUSTED"]] * 2
    assert run(stopped, 2, [falling, falling]) == [[4, 8, 0, "NOT_STOPPED"]] * 2


def test_stop_that_one_process_asked_for_too_early_is_dropped_by_all() -> None:
    falling, better_again = [4.0, 3.0, 2.0, 1.0], [2.0, 3.0, 1.0, 0.0]
    for scores in ([falling, better_again], [better_again, falling]):
        assert run(stopped, 2, scores, True, 3, timeout=20) == [[4, 8, 0, "NOT_STOPPED"]] * 2


def test_all_processes_stop_together_where_one_of_them_lacks_the_metric() -> None:
    without, rising = [None] * 4, [1.0, 2.0, 3.0, 4.0]
    for scores in ([rising, without], [without, rising]):
        assert run(stopped, 2, scores, False, timeout=20) == [[2, 4, 1, "PATIENCE_EXHAUSTED"]] * 2
        for outcome in run_to_end(stopped, 2, scores, timeout=20):
            assert outcome.error == "RuntimeError", outcome.trace
            assert "`score`" in outcome.message


# ---- time -----------------------------------------------------------------------------------------------------------


class Slow(Weight):
    """Its processes differ in how long they believe to have run."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def timed(rank: int, size: int, interval: str) -> list[Any]:
    timer = Timer({"milliseconds": 150}, interval=interval)
    timer._offset = 10.0 if rank == 1 else 0.0  # the clock of rank 1 is far ahead
    trainer = joined(max_epochs=-1, callbacks=timer)
    began = time.monotonic()
    trainer.fit(Slow(), numbers(8))
    by_argument = joined(max_epochs=-1, max_time={"milliseconds": 100})
    by_argument.fit(Slow(), numbers(8))
    return [trainer.global_step, trainer.current_epoch, by_argument.global_step, time.monotonic() - began]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_all_processes_stop_at_the_same_step_when_the_time_of_rank_0_is_up(interval: str) -> None:
    first, second = run(timed, 2, interval, timeout=20)
    assert first[:3] == second[:3]
    assert first[0] > 1
    assert 0.25 < first[3] < 10


def looks(trainer: Any) -> list[int]:
    """The steps after which the processes look at the clock together."""
    asked: list[int] = []
    broadcast = trainer.strategy.broadcast

    def noting(value: Any, *args: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], bool):  # what SharedClock sends
            asked.append(trainer.global_step)
        return broadcast(value, *args)

    trainer.strategy.broadcast = noting
    return asked


def saved_by_time(rank: int, size: int, folder: str, milliseconds: int) -> list[Any]:
    saver = ModelCheckpoint(folder, save_top_k=-1, train_time_interval=timedelta(milliseconds=milliseconds))
    trainer = joined(callbacks=[saver], enable_checkpointing=True)
    saver._schedule._time -= 5.0 * rank  # the clock of rank 1 is ahead
    asked = looks(trainer)
    trainer.fit(Slow(), numbers(200))
    return [asked, sorted(os.listdir(folder)), trainer.global_step]


def test_checkpoints_by_time_are_saved_by_the_clock_of_rank_0_which_is_not_asked_in_every_step(tmp_path: Path) -> None:
    first, second = run(saved_by_time, 2, str(tmp_path), 400, timeout=60)  # two at least, in 100 steps of 10 ms each
    assert first == second
    assert len(first[1]) >= 2
    assert len(first[0]) < first[2] - 10


class Clocked(Slow):
    def __init__(self) -> None:
        super().__init__()
        self.validated_at: list[int] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean(), sync_dist=True)

    def on_validation_start(self) -> None:
        self.validated_at.append(self.trainer.global_step)


def validated_by_time(rank: int, size: int) -> list[list[int]]:
    model, trainer = Clocked(), joined(val_check_interval={"milliseconds": 150}, max_epochs=3, check_val_every_n_epoch=None)

    class Late(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            time.sleep(0.05 * rank)  # so that the clocks start at different moments

    trainer.callbacks.append(Late())
    asked = looks(trainer)
    trainer.fit(model, numbers(60), numbers(2))
    return [model.validated_at, asked]


def test_validation_by_time_falls_on_the_same_steps_everywhere_without_a_collective_in_each() -> None:
    first, second = run(validated_by_time, 2, timeout=20)
    assert first == second
    assert len(first[0]) > 1
    assert len(first[1]) < 60 * 3 / 2 - 10  # steps are of two processes' batches


# ---- checkpoints ----------------------------------------------------------------------------------------------------

BOOKS = ("best_model_path", "best_k_models", "kth_best_model_path", "last_model_path", "best_model_score", "dirpath")


def books(checkpoint: ModelCheckpoint) -> dict[str, Any]:
    return {name: str(getattr(checkpoint, name)) for name in BOOKS}


def checkpointed(rank: int, size: int, folder: str, scores: list[Any]) -> list[Any]:
    warnings.filterwarnings("ignore", ".*sync_dist=False.*|.*is not empty.*|.*2 checkpoint callbacks.*")
    best = ModelCheckpoint(Path(folder, "best"), "{epoch}-{score:.1f}", monitor="score", save_top_k=2, save_last=True)
    steps = ModelCheckpoint(Path(folder, "steps"), every_n_train_steps=3, save_top_k=-1)
    trainer = joined(max_epochs=4, callbacks=[best, steps], enable_checkpointing=True)
    model = Scored(scores)
    trainer.fit(model, numbers(4), numbers(2))
    weight = model.weight.item()
    loaded = []
    for path in ("best", "last"):
        model.validated = 0
        trainer.validate(model, numbers(2), ckpt_path=path, verbose=False)
        loaded.append([model.weight.item(), trainer.ckpt_path])
    return [books(best), books(steps), loaded, weight]


@pytest.mark.parametrize(
    "scores",
    [
        [[1.0, 2.0, 0.5, 3.0], [1.0, 2.0, 0.5, 3.0]],
        [[1.0, 2.0, 0.5, 3.0], [4.0, 1.0, 2.0, 0.0]],  # each rank has others: those of rank 0 decide
        [[1.0, 2.0, 0.5, 3.0], [None] * 4],
    ],
)
def test_checkpoints_are_the_same_in_the_books_of_every_process(tmp_path: Path, scores: Any) -> None:
    first, second = run(checkpointed, 2, str(tmp_path), scores, timeout=30)
    assert first == second
    names = ["epoch=0-score=1.0.ckpt", "epoch=2-score=0.5.ckpt", "last.ckpt"]
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == names
    assert first[0]["best_model_path"] == str(tmp_path / "best" / names[1])
    assert first[0]["kth_best_model_path"] == str(tmp_path / "best" / names[0])
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["epoch=1-step=3.ckpt", "epoch=2-step=6.ckpt"]
    loaded, weight = first[2:]
    assert [path for _, path in loaded] == [str(tmp_path / "best" / name) for name in names[1:]]
    saved = torch.load(tmp_path / "best" / names[1], weights_only=True)["state_dict"]["weight"].item()
    assert [value for value, _ in loaded] == [saved, saved]  # `last` is a copy of what was saved last
    assert saved != weight


def by_training_loss(rank: int, size: int, folder: str) -> Any:
    class Model(Weight):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("loss", batch.mean())  # each rank has its own
            return super().training_step(batch, batch_idx)

    checkpoint = ModelCheckpoint(folder, "{step}-{loss}", monitor="loss", every_n_train_steps=1, save_top_k=1)
    joined(callbacks=checkpoint, enable_checkpointing=True, logger=Rows()).fit(Model(), numbers(8))
    return books(checkpoint)


def test_checkpoints_by_a_local_step_value_are_the_same_everywhere(tmp_path: Path) -> None:
    first, second = run(by_training_loss, 2, str(tmp_path), timeout=20)
    assert first == second
    assert [str(path) for path in tmp_path.iterdir()] == [first["best_model_path"]]


def saved_by_hand(rank: int, size: int, folder: str) -> Any:
    trainer, model = joined(max_epochs=2), Weight()
    trainer.fit(model, numbers(4))
    trainer.save_checkpoint(Path(folder, "mine.ckpt"))
    exists = Path(folder, "mine.ckpt").exists()  # in every process, as soon as the call is over
    again = Weight()
    joined(max_epochs=3).fit(again, numbers(4), ckpt_path=Path(folder, "mine.ckpt"))
    return [exists, again.weight.item() - model.weight.item(), sum(sample for (sample,) in again.seen)]


def test_checkpoint_saved_by_hand_is_there_for_every_process(tmp_path: Path) -> None:
    first, second = run(saved_by_hand, 2, str(tmp_path))
    assert first[0] is second[0] is True
    assert first[1] == second[1] == pytest.approx(-(first[2] + second[2]) / 2)


# ---- failures -------------------------------------------------------------------------------------------------------


def failing(rank: int, size: int, folder: str, first: int) -> None:
    class Fails(Weight):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if rank == first and batch_idx == 2:
                raise ZeroDivisionError("the user's own")
            while batch_idx == 2 and not Path(folder, "over").exists():
                time.sleep(0.01)  # as a process does whose neighbour is gone
            if batch_idx == 2:
                raise RuntimeError("what it gets then")
            return super().training_step(batch, batch_idx)

    callbacks: list[Any] = [
        OnExceptionCheckpoint(folder), ModelCheckpoint(Path(folder, "saved"), save_on_exception=True, save_last=True),
        ModelCheckpoint(Path(folder, "linked"), save_on_exception=True, save_last="link", every_n_train_steps=50),
    ]  # fmt: skip
    try:
        joined(callbacks=callbacks, enable_checkpointing=True).fit(Fails(), numbers(8))
    finally:
        Path(folder, "over").touch()


@pytest.mark.parametrize("first", [0, 1])
def test_checkpoints_on_an_exception_wait_for_nobody(tmp_path: Path, first: int) -> None:
    outcomes = run_to_end(failing, 2, str(tmp_path), first, timeout=20)
    assert [outcomes[first].error, outcomes[1 - first].error] == ["ZeroDivisionError", "RuntimeError"], outcomes[first].trace
    assert (tmp_path / "on_exception.ckpt").exists()
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert sorted(path.name for path in (tmp_path / "linked").iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]


# ---- what is written ------------------------------------------------------------------------------------------------


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: Any = None

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *args: Any) -> None:
        self.batches.append([prediction.flatten().tolist(), batch_indices])

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = [[each.flatten().tolist() for each in predictions], batch_indices]


def predicted(rank: int, size: int, count: int) -> list[Any]:
    writer = Writer()
    kept = joined(callbacks=writer).predict(Evaluated(), numbers(count, 2))
    return [writer.batches, writer.epoch, len(kept)]


def test_each_process_writes_its_own_predictions_with_their_indices() -> None:
    for rank, (batches, epoch, kept) in enumerate(run(predicted, 2, 5)):
        indices = [[0, 2], [4]] if rank == 0 else [[1, 3]]
        values = [[float(index) for index in batch] for batch in indices]
        assert batches == [[value, index] for value, index in zip(values, indices)]
        assert epoch == [values, [indices]]
        assert kept == len(indices)
    assert run(predicted, 2, 1)[1] == [[], [[], [[]]], 0]  # a process may have nothing to predict


def written(rank: int, size: int, folder: str) -> list[Any]:
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    class Model(Evaluated):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("loss", batch.mean(), sync_dist=True, prog_bar=True)
            self.trainer.print(f"step {batch_idx}")
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    loggers: list[Any] = [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="board")]
    trainer = joined(
        logger=loggers, callbacks=[LearningRateMonitor("step"), ModelSummary(), TQDMProgressBar()], enable_progress_bar=True,
        enable_model_summary=True, enable_checkpointing=True,
    )  # fmt: skip
    printed = StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        trainer.fit(Model(), numbers(4), numbers(3))
        trainer.test(Model(), numbers(3))
    return [trainer.log_dir, books(trainer.checkpoint_callback), printed.getvalue()]  # type: ignore[arg-type]


def test_rank_0_writes_for_all(tmp_path: Path) -> None:
    first, second = run(written, 2, str(tmp_path))
    assert first[0] == second[0] == str(tmp_path / "csv" / "version_0")
    assert first[1] == second[1]
    assert first[1]["dirpath"] == str(tmp_path / "csv" / "version_0" / "checkpoints")
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["version_0"]
    assert [path.name for path in (tmp_path / "board").iterdir()] == ["version_0"]
    events = [path.name.split(".")[-2] for path in (tmp_path / "board" / "version_0").iterdir() if path.name.startswith("events")]
    assert len(set(events)) == 1  # of one process
    rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert sorted(rows[0].split(",")) == ["epoch", "loss", "lr-SGD", "step", "test", "val"]
    assert len(rows) == 1 + 2 + 2 + 1 + 1  # the learning rate and the loss of 2 steps, validation, test
    for text in ("step 0", "Epoch 0", "Test metric"):
        assert text in first[2]
    assert second[2] == ""


def watched(rank: int, size: int) -> list[Any]:
    rows = Rows()
    trainer = joined(logger=rows, log_every_n_steps=1, callbacks=[ThroughputMonitor(len, window_size=2)], profiler="epoch")
    trainer.fit(Evaluated(), numbers(8), numbers(2))
    (last,) = [row for _, row in rows.rows if row.get("train/batches") == 4]
    return [last["train/samples"], last["train/batches_per_sec"] / last["train/device/batches_per_sec"], len(trainer.profiler.times)]


def test_throughput_is_that_of_all_processes() -> None:
    assert run(watched, 2) == [[4, pytest.approx(2.0), 1]] * 2
