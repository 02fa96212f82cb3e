"""ThroughputMonitor: keys, the steps of rows, what is counted, what takes time, resumed runs, and devices that are behind."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.callbacks.throughput_monitor import _HostClock, _Run

FEW = {"train/time", "train/batches", "train/samples", "epoch"}
RATES = {"train/device/batches_per_sec", "train/device/samples_per_sec"}


def monitor(**arguments: Any) -> ThroughputMonitor:
    return ThroughputMonitor(**{"batch_size_fn": len, "window_size": 2, **arguments})


@pytest.fixture
def rows(Rows: Any) -> Any:
    return Rows()


def test_rows_of_training_come_with_the_others_and_have_rates_once_the_window_is_full(
    Weight: Any, make_trainer: Any, numbers: Any, rows: Any
) -> None:
    trainer = make_trainer(max_epochs=2, logger=rows, log_every_n_steps=2, callbacks=monitor(window_size=3))
    trainer.fit(Weight(), numbers(6, batch_size=2))
    assert [step for step, _ in rows.rows] == [1, 3, 5]
    assert [set(row) for _, row in rows.rows] == [FEW, FEW | RATES, FEW | RATES]
    assert [row["epoch"] for _, row in rows.rows] == [0, 1, 1]
    assert rows.of("train/batches") == [(1, 2), (3, 4), (5, 6)]
    assert rows.of("train/samples") == [(1, 4), (3, 8), (5, 12)]
    times = [value for _, value in rows.of("train/time")]
    assert times == sorted(times)
    assert times[0] > 0
    assert trainer.logged_metrics["train/batches"] == 6
    assert "train/batches" not in trainer.callback_metrics


def test_batches_of_different_sizes_are_counted_as_they_are(Weight: Any, make_trainer: Any, numbers: Any, rows: Any) -> None:
    make_trainer(logger=rows, callbacks=monitor()).fit(Weight(), numbers(5, batch_size=3))
    assert rows.of("train/samples") == [(0, 3), (1, 5)]
    _, last = rows.rows[-1]
    assert last["train/device/samples_per_sec"] == pytest.approx(2 * last["train/device/batches_per_sec"])


def test_a_row_comes_with_the_step_of_an_accumulation_window(Weight: Any, make_trainer: Any, numbers: Any, rows: Any) -> None:
    make_trainer(logger=rows, accumulate_grad_batches=3, log_every_n_steps=2, callbacks=monitor()).fit(Weight(), numbers(10))
    assert rows.of("train/batches") == [(1, 6), (3, 10)]


def test_items_operations_and_the_share_of_the_peak(Weight: Any, make_trainer: Any, numbers: Any, rows: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        flops_per_batch = 100

    callback = monitor(length_fn=lambda batch: 7 * len(batch), separator="|", available_flops=1000, world_size=2)
    make_trainer(logger=rows, callbacks=callback).fit(Model(), numbers(4, batch_size=2))
    _, row = rows.rows[-1]
    assert row["train|lengths"] == 28
    assert row["train|device|items_per_sec"] == pytest.approx(7 * row["train|device|samples_per_sec"])
    assert row["train|device|flops_per_sec"] == pytest.approx(100 * row["train|device|batches_per_sec"])
    assert row["train|device|mfu"] == pytest.approx(row["train|device|flops_per_sec"] / 1000)
    assert row["train|items_per_sec"] == pytest.approx(2 * row["train|device|items_per_sec"])


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_other_stages_count_their_batches(Evaluated: Any, make_trainer: Any, numbers: Any, rows: Any, task: str) -> None:
    trainer = make_trainer(logger=rows, log_every_n_steps=2, callbacks=monitor())
    for _ in range(2):
        getattr(trainer, task)(Evaluated(), numbers(5))
    mine = [(step, set(row)) for step, row in rows.rows if f"{task}/time" in row]
    keys = {"time", "batches", "samples", "device/batches_per_sec", "device/samples_per_sec"}
    assert mine == [(step, {f"{task}/{key}" for key in keys}) for step in (2, 4)] * 2


def test_validation_in_fit_goes_on_along_the_x_axis(Evaluated: Any, make_trainer: Any, numbers: Any, rows: Any) -> None:
    trainer = make_trainer(max_epochs=2, num_sanity_val_steps=2, logger=rows, log_every_n_steps=2, callbacks=monitor())
    trainer.fit(Evaluated(), numbers(4), numbers(3))
    assert rows.of("validate/batches") == [(2, 2), (4, 1), (6, 3)]


class Slow:
    """Sleeps where it is told to."""

    seconds = 0.2


def test_validation_is_no_time_of_training(Evaluated: Any, make_trainer: Any, numbers: Any, rows: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        slept = 0.0

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            before = time.perf_counter()
            time.sleep(Slow.seconds)
            Model.slept += time.perf_counter() - before

    began = time.perf_counter()
    make_trainer(max_epochs=2, val_check_interval=2, logger=rows, callbacks=monitor()).fit(Model(), numbers(4), numbers(1))
    whole = time.perf_counter() - began
    assert Model.slept >= 4 * Slow.seconds
    assert rows.of("train/time")[-1][1] <= whole - Model.slept  # 4 validations, 3 of which lie between training batches


def test_a_number_of_operations_is_that_of_training(Evaluated: Any, make_trainer: Any, numbers: Any, rows: Any) -> None:
    class Plain(Evaluated):  # type: ignore[misc]
        def setup(self, stage: str) -> None:
            self.flops_per_batch = 30

    class Asked(Evaluated):  # type: ignore[misc]
        @property
        def flops_per_batch(self) -> int:
            return 30 if self.training else 10

    def of_validation(model: Any, task: str) -> float:
        trainer = make_trainer(logger=rows, callbacks=monitor())
        rows.rows.clear()
        trainer.fit(model, numbers(2), numbers(2)) if task == "fit" else trainer.validate(model, numbers(2), verbose=False)
        row = next(row for _, row in rows.rows if row.get("validate/batches") == 2)
        return round(row.get("validate/device/flops_per_sec", 0) / row["validate/device/batches_per_sec"])

    assert of_validation(Plain(), "fit") == 0  # not known, rather than three times too many
    assert of_validation(Plain(), "validate") == 30
    assert of_validation(Asked(), "fit") == 10


def test_totals_go_on_in_a_resumed_run(Evaluated: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    first, second = Rows(), Rows()
    trainer = make_trainer(logger=first, callbacks=monitor(length_fn=len))
    trainer.fit(Evaluated(), numbers(4), numbers(3))
    trainer.save_checkpoint("end.ckpt")
    trainer = make_trainer(max_epochs=2, logger=second, callbacks=monitor(length_fn=len))
    trainer.fit(Evaluated(), numbers(4), numbers(3), ckpt_path="end.ckpt")
    assert second.of("train/batches") == [(4, 5), (5, 6), (6, 7), (7, 8)]
    assert second.of("train/lengths") == second.of("train/samples") == second.of("train/batches")
    assert second.of("train/time")[0][1] > first.of("train/time")[-1][1]
    assert second.of("validate/batches") == [(4, 1), (5, 2), (6, 3)]
    trainer.fit_loop.max_epochs = 3
    second.rows.clear()
    trainer.fit(Evaluated(), numbers(4), numbers(3))  # not resumed: another run of the same trainer
    assert second.of("train/batches")[0][1] == 1


def test_nothing_is_counted_where_nobody_gets_it(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    def unwanted(batch: Any) -> int:
        raise AssertionError

    make_trainer(callbacks=monitor(batch_size_fn=unwanted)).fit(Weight(), numbers(2))


def test_wrong_arguments_raise_at_once() -> None:
    with pytest.raises(TypeError, match="windw_size"):
        monitor(windw_size=3)
    with pytest.raises(ValueError, match="window_size=1"):
        monitor(window_size=1)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batch_size_fn": lambda batch: None}, TypeError, r"batch_size_fn=...\)` returned None.*number of samples"),
        ({"batch_size_fn": lambda batch: 1.5}, TypeError, "returned 1.5, a float"),
        ({"length_fn": lambda batch: "4"}, TypeError, "length_fn.*'4', a str.*number of items"),
        ({"batch_size_fn": lambda batch: 0}, ValueError, "returned 0: 0 samples can't make 1 batches"),
        ({"length_fn": lambda batch: 1}, ValueError, "returned 1 for a batch of 2 samples.*batch.numel"),
        ({"batch_size_fn": lambda batch: torch.empty((), device="meta")}, TypeError, "tensor on meta.*return a number"),
    ],
)
def test_functions_that_return_no_such_number_raise(
    Weight: Any, make_trainer: Any, numbers: Any, rows: Any, arguments: dict[str, Any], error: type, match: str
) -> None:
    with pytest.raises(error, match=match):
        make_trainer(logger=rows, callbacks=monitor(**arguments)).fit(Weight(), numbers(4, batch_size=2))


def test_whole_numbers_of_other_types_are_taken(Weight: Any, make_trainer: Any, numbers: Any, rows: Any) -> None:
    sizes = iter([2.0, torch.tensor(2), torch.tensor([2])])
    make_trainer(logger=rows, callbacks=monitor(batch_size_fn=lambda batch: next(sizes))).fit(Weight(), numbers(6, batch_size=2))
    assert rows.of("train/samples") == [(0, 2), (1, 4), (2, 6)]


@pytest.mark.parametrize(("length_fn", "warns"), [(lambda batch: batch.size(1), True), (Tensor.numel, False)])
def test_the_length_of_one_sample_warns(
    Weight: Any, make_trainer: Any, rows: Any, length_fn: Any, warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    loader = torch.utils.data.DataLoader(torch.zeros(4, 8), batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(logger=rows, callbacks=monitor(length_fn=length_fn)).fit(Weight(), loader)
    told = [str(one.message) for one in caught if "length_fn" in str(one.message)]
    assert len(told) == warns
    assert all("returned 8 for a batch of 2 samples" in message and "2 times too low" in message for message in told)


# ---- a device that is behind ------------------------------------------------------------------------------------------


class Behind(_HostClock):
    """Marks at the times 0, 1, 2, ..., which are over once the device has come so far."""

    behind = 3

    def __init__(self) -> None:
        self.now, self.reached, self.waited = 0, 0, list[int]()

    def mark(self) -> int:
        self.now += 1
        return self.now - 1

    def done(self, mark: int) -> bool:
        return mark <= self.reached

    def wait(self, mark: int) -> None:
        if mark > self.reached:
            self.waited.append(mark)
            self.reached = mark

    def seconds(self, begin: int, end: int) -> float:
        assert end <= self.reached  # the times of events that are not over can't be asked for
        return float(end - begin)


def test_rows_are_ready_when_the_device_has_come_so_far_and_nobody_waits() -> None:
    clock = Behind()
    run = _Run(clock, Throughput(window_size=2), {})
    rows = []
    for _ in range(10):
        run.update(2, None, None)
        rows.append(run.row({}))
    assert not any(row.ready() for row in rows)
    clock.reached = 4
    assert [row.ready() for row in rows] == [True] * 4 + [False] * 6
    assert rows[3].read() == {"time": 4.0, "batches": 4, "samples": 8, "device/batches_per_sec": 1.0, "device/samples_per_sec": 2.0}
    assert rows[0].read() == {"time": 1.0, "batches": 1, "samples": 2}  # as it was then
    assert clock.waited == []


def test_updates_that_are_over_do_not_pile_up() -> None:
    clock = Behind()
    run = _Run(clock, Throughput(window_size=2), {})
    for _ in range(1000):
        clock.reached = clock.now - 1
        run.update(1, None, None)
    assert len(run._waiting) <= Behind.behind
    assert clock.waited == []


def test_a_pause_is_left_out_and_totals_wait() -> None:
    clock = Behind()
    run = _Run(clock, Throughput(window_size=2), {"time": 10.0, "batches": 5, "samples": 5})
    run.update(1, None, None)
    clock.now += 100  # a validation
    run.pause()
    run.update(1, None, None)
    assert run.totals() == {"time": 12.0, "batches": 7, "samples": 7}
    assert clock.waited == [1, 102, 103]


def test_time_goes_on_where_nothing_was_done_between_two_events() -> None:
    class Still(_HostClock):
        def seconds(self, begin: Any, end: Any) -> float:
            return 0.0

    run = _Run(Still(), Throughput(window_size=2), {})
    for _ in range(3):
        run.update(1, None, None)
    assert math.isclose(run.totals()["time"], 3e-9)
