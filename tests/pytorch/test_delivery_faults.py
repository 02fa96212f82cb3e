"""Loggers that raise, hang, or can't be reached: training goes on, what can be delivered is, and the rest is counted and told."""

from __future__ import annotations

import csv
import errno
import resource
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from lightning.pytorch import Callback
from lightning.pytorch import delivery as delivery_module
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.delivery import Delivery, Outbox
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"FIRST_DELAY": 0.01, "LONGEST_DELAY": 0.02, "LAST_DELAY": 0.01}.items():
        monkeypatch.setattr(delivery_module, name, seconds)


@pytest.fixture
def Down(Rows: Any) -> Any:
    """A logger whose calls fail while ``error`` is set, and which counts them."""

    class Down(Rows):  # type: ignore[misc]
        def __init__(self, error: BaseException | None = None) -> None:
            super().__init__()
            self.error = error
            self.tried = 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.tried += 1
            if self.error is not None:
                raise self.error
            super().log_metrics(metrics, step)

    return Down


@contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings inside of this context, as text."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(warning.message) for warning in caught]


# ---- loggers that raise -----------------------------------------------------------------------------------------------


def test_logger_that_comes_back_gets_everything_in_order(Logging: Any, make_trainer: Any, numbers: Any, Down: Any) -> None:
    logger = Down(ConnectionError("no route to host"))

    class Repairs(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 20:
                while logger.tried < 4:
                    time.sleep(0.01)
                logger.error = None

    with warned() as told:
        make_trainer(logger=logger, callbacks=Repairs()).fit(Logging(), numbers(40))
    assert logger.of("x") == [(step, float(step)) for step in range(40)]
    assert len(told) == 1
    assert "Down raised ConnectionError: no route to host" in told[0]
    assert logger.finalized == ["success"]


def test_logger_that_stays_away_is_told_once_and_counted_at_the_end(Logging: Any, make_trainer: Any, numbers: Any, Down: Any) -> None:
    logger, model = Down(ConnectionError("no route to host")), Logging()
    with warned() as told:
        make_trainer(logger=logger, max_epochs=2).fit(model, numbers(30))
    assert len(model.trainer.callback_metrics) == 1
    assert model.trainer.global_step == 60
    first, last = told
    assert "Down raised ConnectionError: no route to host" in first
    assert "Down did not get 60 of 60 rows: 60 could not be delivered. Its last error: ConnectionError: no route to host" in last
    assert logger.finalized == ["success"]


def test_mistake_in_a_logger_is_shown_with_its_place_and_its_cause(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Mistaken(Rows):  # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            try:
                self.missing()
            except AttributeError as error:
                raise TypeError("not like this") from error

    with warned() as told:
        make_trainer(logger=Mistaken()).fit(Logging(), numbers(2))
    message = told[0]
    assert "TypeError: not like this" in message
    assert __file__ in message
    assert "in log_metrics: raise TypeError" in message
    assert "which came from AttributeError: 'Mistaken' object has no attribute 'missing'" in message


def test_rows_that_a_logger_refuses_do_not_hold_up_the_others(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Choosy(Rows):  # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if step in (3, 4, 5, 8):
                raise ValueError(f"no step {step}, please")
            super().log_metrics(metrics, step)

    logger = Choosy()
    with warned() as told:
        make_trainer(logger=logger).fit(Logging(), numbers(10))
    assert [step for step, _ in logger.rows] == [0, 1, 2, 6, 7, 9]
    assert len(told) == 2
    assert "did not get 4 of 10 rows: 4 it refused while it took others. Its last error: ValueError: no step" in told[-1]


def test_save_that_fails_is_repeated(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Unsaved(Rows):  # type: ignore[misc]
        failures, saved = 2, 0

        def save(self) -> None:
            if self.failures and self.rows:
                self.failures -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            self.saved = len(self.rows)

    logger = Unsaved()
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        make_trainer(logger=logger).fit(Logging(), numbers(10))
    assert len(caught) == 1
    assert [step for step, _ in logger.rows] == list(range(10))
    assert logger.saved == 10


def test_what_waits_is_bounded_and_what_is_dropped_is_counted(Down: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "MOST_VALUES", 40)
    logger, delivery = Down(ConnectionError("away")), Delivery()
    delivery.open()
    with warned() as told:
        for step in range(100):
            delivery.send([logger], {"x": 1.0, "y": 2.0}, step)
        assert len(delivery._boxes[id(logger)]._waiting) <= 20
        while logger.tried < 2:
            time.sleep(0.01)
        logger.error = None
        delivery.close()
    steps = [step for step, _ in logger.rows]
    assert steps[-20:] == list(range(80, 100))
    assert len(steps) <= 21
    assert f"did not get {100 - len(steps)} of 100 rows: {100 - len(steps)} were dropped, since more than 40 values" in told[-1]


def test_where_warnings_are_errors_they_are_raised_to_the_caller(Logging: Any, make_trainer: Any, numbers: Any, Down: Any) -> None:
    logger = Down(ConnectionError("away"))
    with pytest.raises(UserWarning, match="Down raised ConnectionError: away"):  # as they are in these tests
        make_trainer(logger=logger).fit(Logging(), numbers(3))
    assert logger.finalized == ["failed"]


# ---- loggers that hang ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_logger_that_hangs_is_left_alone(
    Logging: Any, make_trainer: Any, numbers: Any, Rows: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(delivery_module, "HANG", 0.3)
    monkeypatch.setattr(delivery_module, "ORDER", 0.2)
    monkeypatch.setattr(delivery_module, "PATIENCE", 0.2)
    release = threading.Event()

    class Hangs(Rows):  # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if step == 2:
                release.wait(60)
            super().log_metrics(metrics, step)

        def finalize(self, status: str) -> None:
            super().finalize(status)
            release.wait(60)

    class Fails(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if fails:
                raise RuntimeError("boom")

    logger, other = Hangs(), Rows()
    began = time.monotonic()
    try:
        with warned() as told, pytest.raises(RuntimeError, match="boom") if fails else nullcontext():
            make_trainer(logger=[logger, other], callbacks=Fails()).fit(Logging(), numbers(6))
        assert "Hangs did not get 4 of 6 rows" in told[-1]
        assert time.monotonic() - began < 10
        assert "in a call that did not return within 0.3 s" in told[-1]
        assert "in log_metrics" in told[-1] or "in wait" in told[-1]
        assert logger.finalized == other.finalized == ["failed" if fails else "success"]
        assert len(other.rows) == 6
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name.startswith("logger-"):
                thread.join(10)


def test_user_may_stop_waiting_for_a_logger(
    Logging: Any, make_trainer: Any, numbers: Any, Rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Rows):  # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            released.wait(0.1)
            super().log_metrics(metrics, step)

    released = threading.Event()
    logger, boxes = Endless(), []

    def interrupts(self: Outbox, *args: Any, **kwargs: Any) -> None:
        boxes.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Outbox, "_wait_for_progress", interrupts)  # Ctrl-C, and again while the end is made
    with warned() as told, pytest.raises(KeyboardInterrupt):
        make_trainer(logger=logger).fit(Logging(), numbers(200))
    assert len(boxes) == 2
    assert logger.finalized == ["failed"]
    assert sum("did not get" in message for message in told) == 1
    released.set()
    boxes[0]._thread.join(30)
    assert len(logger.rows) == 200  # as long as the process lives, they are delivered


# ---- loggers that fail at the start or at the end ---------------------------------------------------------------------


def test_hyperparameters_are_sent_again_where_the_server_is_away_at_the_start(
    Logging: Any, make_trainer: Any, numbers: Any, Down: Any
) -> None:
    class Tracking(Down):  # type: ignore[misc]
        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            if self.error is not None:
                raise RuntimeError("tracking failed") from self.error
            self.rows.append(("params", dict(params)))

    class Model(Logging):  # type: ignore[misc]
        def __init__(self, size: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()

        def on_train_start(self) -> None:
            logger.error = None

    logger = Tracking(ConnectionRefusedError("connection refused"))
    with pytest.warns(UserWarning, match="Tracking raised RuntimeError: tracking failed") as caught:
        make_trainer(logger=logger).fit(Model(), numbers(2))
    assert len(caught) == 1
    assert logger.rows == [("params", {"size": 3}), (0, {"x": 0.0, "epoch": 0}), (1, {"x": 1.0, "epoch": 0})]


@pytest.mark.parametrize("method", ["experiment", "log_hyperparams", "log_graph", "save"])
def test_mistake_of_a_logger_is_raised_before_training(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any, method: str) -> None:
    def fails(self: Any, *args: Any) -> None:
        raise TypeError("a mistake")

    logger = type("Mistaken", (Rows,), {method: property(fails) if method == "experiment" else fails})()
    model = Logging()
    model.save_hyperparameters({"size": 3})
    with pytest.raises(TypeError, match="a mistake"):
        make_trainer(logger=logger).fit(model, numbers(2))
    assert logger.rows == []
    assert model.weight.item() == 0


def test_finalize_that_fails_is_a_warning_and_the_others_are_finalized(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Broken(Rows):  # type: ignore[misc]
        def finalize(self, status: str) -> None:
            super().finalize(status)
            raise RuntimeError("could not say goodbye")

    loggers = [Broken(), Rows()]
    trainer = make_trainer(logger=loggers)
    with pytest.warns(UserWarning, match=r"being closed, Broken\.finalize raised RuntimeError: could not say goodbye"):
        trainer.fit(Logging(), numbers(2))
    assert [logger.finalized for logger in loggers] == [["success"], ["success"]]
    assert trainer.state.finished


def test_logger_that_fails_to_take_a_checkpoint_does_not_end_the_run(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class NoUpload(Rows):  # type: ignore[misc]
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            raise ConnectionError("upload failed")

    loggers = [NoUpload(), Rows()]
    trainer = make_trainer(logger=loggers, callbacks=ModelCheckpoint("saved"), enable_checkpointing=True, max_epochs=2)
    with warned() as told:
        trainer.fit(Logging(), numbers(2))
    assert trainer.global_step == 4
    assert [message for message in told if "NoUpload" in message] == [told[0]]
    assert "upload failed" in told[0]
    assert loggers[0].rows == loggers[1].rows


class Uploads:
    """Mixed into a logger: takes its time over each checkpoint, and notes what it finds."""

    called: list[Any]
    gate: threading.Event

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        assert self.gate.wait(20)
        path = checkpoint_callback.best_model_path
        self.called.append((Path(path).name, Path(path).is_file(), dict(checkpoint_callback.best_k_models)))


@pytest.mark.parametrize("background", [False, True])
def test_logger_that_uploads_checkpoints_slowly_does_not_hold_up_training(
    Logging: Any, make_trainer: Any, numbers: Any, Rows: Any, background: bool
) -> None:
    class Slow(Uploads, Rows):  # type: ignore[misc]
        pass

    logger = Slow()
    logger.called, logger.gate = [], threading.Event()

    class Opens(Callback):
        def on_train_end(self, *_: Any) -> None:
            assert logger.called == []  # all of training went by
            logger.gate.set()

    saving = ModelCheckpoint("saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(logger=logger, callbacks=[saving, Opens()], enable_checkpointing=True, async_checkpointing=background)
    trainer.fit(Logging(), numbers(3))
    assert [name for name, _, _ in logger.called] == [f"step={step}.ckpt" for step in (1, 2, 3)]  # each as it was then
    assert all(there for _, there, _ in logger.called)
    assert logger.finalized == ["success"]


def test_logger_that_wants_to_be_called_in_the_main_thread_is_told_of_checkpoints_there(
    Logging: Any, make_trainer: Any, numbers: Any, Rows: Any
) -> None:
    threads = []

    class Here(Rows):  # type: ignore[misc]
        called_in_background = False

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            threads.append(threading.current_thread())

    saving = ModelCheckpoint("saved", every_n_train_steps=1, filename="{step}")
    make_trainer(logger=Here(), callbacks=saving, enable_checkpointing=True).fit(Logging(), numbers(2))
    assert threads == [threading.main_thread()] * 2


# ---- CSV on a disk that is full ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 100])
def test_csv_rows_come_once_each_after_the_disk_was_full(
    Logging: Any, make_trainer: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    from lightning.fabric.loggers.csv_logs import ExperimentWriter

    logger = CSVLogger(".", flush_logs_every_n_steps=every)
    failures = [1, 1, 1]

    class Full:
        """A file of which a part is written before there is no room any more."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if self.file.tell() and len(data) > 5 and failures:
                return int(self.file.write(data[:5]))
            if self.file.tell() and failures:
                failures.pop()
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

    opened = ExperimentWriter._open
    monkeypatch.setattr(ExperimentWriter, "_open", lambda self, mode: Full(opened(self, mode)) if mode == "ab+" else opened(self, mode))
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        make_trainer(logger=logger, max_epochs=2).fit(Logging(), numbers(5))
    assert not failures
    assert len(caught) == 1
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(10))
    assert [float(row["x"]) for row in rows] == [float(step % 5) for step in range(10)]


# ---- TensorBoard on a disk that is full -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_tensorboard_gets_every_row_after_the_disk_was_full(Logging: Any, make_trainer: Any, numbers: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(".")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                trainer.flush_loggers()
                size = max(path.stat().st_size for path in Path(logger.log_dir).iterdir())
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, unlimited[1]))  # bytes of any file
            if batch_idx == 15:
                trainer.flush_loggers()
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    try:
        with warned() as told:
            make_trainer(logger=logger, callbacks=Fills()).fit(Logging(), numbers(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    told = [message for message in told if "Exception in thread" not in message]
    assert len(told) == 1
    assert "TensorBoardLogger raised OSError" in told[0]
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload().Scalars("x")
    assert {event.step: event.value for event in events} == {step: float(step) for step in range(20)}
