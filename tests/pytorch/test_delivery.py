"""Loggers get their rows in the background: none is lost, none comes out of order, and training waits for no logger."""

from __future__ import annotations

import csv
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.pytorch import Callback
from lightning.pytorch import delivery as delivery_module
from lightning.pytorch.delivery import Delivery
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException


@pytest.fixture
def Slow(Rows: Any) -> Any:
    """A logger that takes 50 ms for each row, and knows from which threads it was called."""

    class Slow(Rows):  # type: ignore[misc]
        seconds = 0.05

        def __init__(self) -> None:
            super().__init__()
            self.threads: set[threading.Thread] = set()
            self.saved = 0  # rows when `save` was called last

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            time.sleep(self.seconds)
            self.threads.add(threading.current_thread())
            super().log_metrics(metrics, step)

        def save(self) -> None:
            self.saved = len(self.rows)

        def finalize(self, status: str) -> None:
            self.finalized.append((status, len(self.rows), self.saved))

    return Slow


def threads() -> list[str]:
    """The threads that deliver rows."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("logger-")]


# ---- slow loggers -----------------------------------------------------------------------------------------------------


def test_slow_logger_gets_everything_in_order_before_it_is_closed(Logging: Any, make_trainer: Any, numbers: Any, Slow: Any) -> None:
    class Clock(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.began = time.monotonic()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.seconds = time.monotonic() - self.began

    logger, clock = Slow(), Clock()
    make_trainer(logger=logger, callbacks=clock).fit(Logging(), numbers(40))
    assert logger.of("x") == [(step, float(step)) for step in range(40)]
    assert logger.finalized == [("success", 40, 40)]
    assert clock.seconds < 1.5  # of 2 that the rows take
    assert threading.main_thread() not in logger.threads
    assert threads() == []


def test_loggers_do_not_wait_for_each_other(Logging: Any, make_trainer: Any, numbers: Any, Slow: Any, Rows: Any) -> None:
    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer._metrics.settle()
            self.counts = len(slow.rows), len(quick.rows)

    slow, quick, look = Slow(), Rows(), Look()
    slow.seconds = 0.2
    make_trainer(logger=[slow, quick], callbacks=look).fit(Logging(), numbers(10))
    assert look.counts[0] < 10
    assert look.counts[1] == 10
    assert slow.rows == quick.rows


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_rows_of_a_run_that_fails_reach_a_slow_logger(
    Logging: Any, make_trainer: Any, numbers: Any, Slow: Any, error: type[BaseException]
) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 10:
                raise error("boom")

    logger = Slow()
    with pytest.raises(error):
        make_trainer(logger=logger, callbacks=Fails()).fit(Logging(), numbers(40))
    assert logger.of("x") == [(step, float(step)) for step in range(10)]
    assert logger.finalized == [("failed", 10, 10)]
    assert threads() == []


def test_rows_of_a_run_that_is_terminated_reach_a_slow_logger(Logging: Any, make_trainer: Any, numbers: Any, Slow: Any) -> None:
    class Terminates(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 10:
                os.kill(os.getpid(), signal.SIGTERM)

    logger = Slow()
    with pytest.raises(SIGTERMException):
        make_trainer(logger=logger, callbacks=Terminates()).fit(Logging(), numbers(40))
    assert logger.of("x")[:10] == [(step, float(step)) for step in range(10)]  # the last may be left to the run that goes on
    assert logger.finalized == [("failed", len(logger.rows), len(logger.rows))]


def test_logger_that_answers_promptly_has_its_rows_at_the_end_of_an_epoch(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    seen: list[int] = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(len(rows.rows))

    rows = Rows()
    make_trainer(logger=rows, callbacks=Look(), max_epochs=3).fit(Logging(), numbers(4))
    assert seen == [0, 4, 8]


def test_flush_loggers_waits_for_all_rows(Logging: Any, make_trainer: Any, numbers: Any, Slow: Any) -> None:
    seen: list[tuple[bool, int]] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((trainer.flush_loggers(), len(logger.rows)))

    logger = Slow()
    make_trainer(logger=logger, callbacks=Look()).fit(Logging(), numbers(10))
    assert seen == [(True, 10)]


def test_waiting_at_the_end_is_told(
    Logging: Any, make_trainer: Any, numbers: Any, Slow: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery_module, "TELL", 0.1)
    with caplog.at_level("INFO"):
        make_trainer(logger=Slow()).fit(Logging(), numbers(20))
    told = [record.message for record in caplog.records if "Waiting for the logger Slow" in record.message]
    assert len(told) == 1


# ---- threads ----------------------------------------------------------------------------------------------------------


def test_there_is_no_thread_without_a_row(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    found: list[list[str]] = []

    class Look(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found.append(threads())

    make_trainer(callbacks=Look()).fit(Weight(), numbers(2))
    make_trainer(callbacks=Look(), logger=Rows()).fit(Weight(), numbers(2))
    assert found == [[], []]


def test_logger_that_asks_for_it_is_called_in_the_main_thread(Logging: Any, make_trainer: Any, numbers: Any, Slow: Any) -> None:
    class Bound(Slow):  # type: ignore[misc]
        called_in_background = False
        seconds = 0.0

    logger = Bound()
    make_trainer(logger=logger).fit(Logging(), numbers(5))
    assert logger.threads == {threading.main_thread()}
    assert logger.finalized == [("success", 5, 5)]


def test_logger_that_is_bound_to_its_thread_is_called_there(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Database(Rows):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.connection = sqlite3.connect("rows.db")  # raises if it is used in another thread
            self.connection.execute("create table x (step, value)")

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.connection.execute("insert into x values (?, ?)", (step, metrics["x"]))

        def save(self) -> None:
            self.connection.commit()

    logger = Database()
    make_trainer(logger=logger, max_epochs=2).fit(Logging(), numbers(5))  # without a warning
    assert logger.connection.execute("select * from x").fetchall() == [(step, float(step % 5)) for step in range(10)]
    logger.connection.close()


def test_workers_are_forked_while_a_logger_holds_its_lock(Logging: Any, make_trainer: Any, numbers: Any, Slow: Any) -> None:
    logger = Slow()
    csv_logger = CSVLogger(".")
    trainer = make_trainer(logger=[logger, csv_logger], max_epochs=2)
    trainer.fit(Logging(), numbers(10, num_workers=2))
    assert len(logger.rows) == 20
    assert len(rows_of(csv_logger)) == 20


def test_forked_process_calls_loggers_itself_and_leaves_the_rows_of_its_parent(Slow: Any) -> None:
    logger, delivery = Slow(), Delivery()
    csv_logger = CSVLogger(".")
    delivery.open()
    with csv_logger._lock:
        for step in range(5):
            delivery.send([logger, csv_logger], {"x": 1.0}, step)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(20)
                logger.rows.clear()
                delivery.send([logger], {"y": 2.0}, 7)
                csv_logger.log_metrics({"x": 3.0}, 9)
                code = 0 if logger.rows == [(7, {"y": 2.0})] else 2
                delivery.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    delivery.close()
    assert [step for step, _ in logger.rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows_of(csv_logger)] == ["0", "1", "2", "3", "4"]


def test_rows_after_the_run_are_written_at_once(make_trainer: Any, Logging: Any, numbers: Any, Rows: Any) -> None:
    rows = Rows()
    trainer = make_trainer(logger=rows)
    trainer.fit(Logging(), numbers(1))
    trainer.send_to_loggers({"late": 1.0}, 9)
    assert rows.rows[-1] == (9, {"late": 1.0})
    assert threads() == []


# ---- our own loggers --------------------------------------------------------------------------------------------------


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("every", [1, 100])
def test_rows_that_users_write_come_in_their_turn(Logging: Any, make_trainer: Any, numbers: Any, every: int) -> None:
    class Model(Logging):  # type: ignore[misc]
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % 3 == 2:
                self.logger.log_metrics({"mine": 1.0}, step=100 + batch_idx)

    logger = CSVLogger(".", flush_logs_every_n_steps=every)
    make_trainer(logger=logger).fit(Model(), numbers(7))
    assert [int(row["step"]) for row in rows_of(logger)] == [0, 1, 102, 2, 3, 4, 105, 5, 6]


def test_rows_that_users_write_to_loggers_of_their_own_come_in_their_turn(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Logging):  # type: ignore[misc]
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % 3 == 2:
                self.logger.log_metrics({"mine": 1.0}, step=100 + batch_idx)

        def on_train_epoch_end(self) -> None:
            for logger in self.loggers:
                logger.log_metrics({"mine": 1.0}, step=200)

    rows = Rows()
    make_trainer(logger=rows).fit(Model(), numbers(7))
    assert [step for step, _ in rows.rows] == [0, 1, 102, 2, 3, 4, 105, 5, 6, 200]


def test_save_writes_the_rows_that_are_on_their_way(Logging: Any, make_trainer: Any, numbers: Any) -> None:
    found: list[int] = []

    class Model(Logging):  # type: ignore[misc]
        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.logger.save()
            found.append(len(rows_of(self.logger)) if self.trainer.global_step else 0)

    make_trainer(logger=CSVLogger(".")).fit(Model(), numbers(5))
    assert found == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_loggers_of_ours_can_be_called_from_many_threads(make: Any) -> None:
    logger = make(".", name="many")

    def write(first: int) -> None:
        for step in range(first, first + 50):
            logger.log_metrics({f"x{first}": 1.0, "y": 2.0}, step)
            if step % 7 == 0:
                logger.save()

    writers = [threading.Thread(target=write, args=(100 * number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    logger.finalize("success")
    if make is CSVLogger:
        steps = [int(row["step"]) for row in rows_of(logger)]
        assert sorted(steps) == [100 * number + step for number in range(4) for step in range(50)]
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
        assert len(events.Scalars("y")) == 200


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_images_and_hyperparameters_of_users_go_beside_the_rows(Logging: Any, make_trainer: Any, numbers: Any, make: Any) -> None:
    class Model(Logging):  # type: ignore[misc]
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.logger.log_hyperparams({f"h{batch_idx}": batch_idx})
            if make is TensorBoardLogger:
                self.logger.experiment.add_image("digit", torch.zeros(1, 4, 4), batch_idx)

    logger = make(".")
    make_trainer(logger=logger).fit(Model(), numbers(5))
    assert (Path(logger.log_dir) / "hparams.yaml").read_text().split() == [word for i in range(5) for word in (f"h{i}:", str(i))]
    if make is TensorBoardLogger:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
        assert [event.step for event in events.Images("digit")] == [0, 1, 2, 3, 4]
        assert [event.step for event in events.Scalars("x")] == [0, 1, 2, 3, 4]
