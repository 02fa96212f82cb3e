"""What is said where training waits for its loader; no test depends on how fast the machine is, only on sleeping being slow."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from simulated_device import Event, World

from lightning.pytorch.loops import batches, input_bound
from lightning.pytorch.loops.batches import Waits, counted, looked_ahead
from lightning.pytorch.loops.input_bound import DeviceIdle, advice_for


class Slow(Dataset[Tensor]):
    """Samples that take their time."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.seconds)
        return torch.tensor([float(index)])

    def __len__(self) -> int:
        return self.count


class SlowStream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        for index in range(6):
            time.sleep(0.05)
            yield torch.tensor([float(index)])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """What is said, in runs of which nobody finds that they are too short."""
    monkeypatch.setattr(batches, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(batches, "LEAST_BATCHES", 4)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "held up by its data" in record.getMessage()]


@pytest.mark.parametrize("data", [Slow(6, 0.05), SlowStream()], ids=["map", "stream"])
def test_a_slow_dataset_is_told_once(Weight: Any, make_trainer: Any, told: Any, data: Any) -> None:
    make_trainer(max_epochs=3).fit(Weight(), DataLoader(data))
    (message,) = told()
    assert "in epoch 0 it waited" in message
    assert "num_workers=0" in message
    assert "persistent_workers=True" in message
    assert ("get_worker_info" in message) is isinstance(data, SlowStream)


def test_another_run_of_the_trainer_is_told_too(Weight: Any, make_trainer: Any, told: Any) -> None:
    trainer = make_trainer()
    for _ in range(2):
        trainer.fit(Weight(), DataLoader(Slow(6, 0.05)))
        trainer.fit_loop.max_epochs += 1
    assert len(told()) == 2


def test_slow_steps_are_no_fault_of_the_data(Weight: Any, make_trainer: Any, told: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            time.sleep(0.1)
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

    make_trainer().fit(Model(), DataLoader(Slow(6, 0.001)))
    assert told() == []


def test_validation_does_not_hide_the_wait(Evaluated: Any, make_trainer: Any, told: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            time.sleep(0.3)

    make_trainer(val_check_interval=2).fit(Model(), DataLoader(Slow(6, 0.05)), DataLoader(Slow(1, 0)))
    assert len(told()) == 1


def test_short_runs_are_left_in_peace(Weight: Any, make_trainer: Any, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LEAST_BATCHES", 50)
    make_trainer().fit(Weight(), DataLoader(Slow(6, 0.05)))
    monkeypatch.setattr(batches, "LEAST_BATCHES", 4)
    monkeypatch.setattr(batches, "LEAST_SECONDS", 1000.0)
    make_trainer().fit(Weight(), DataLoader(Slow(6, 0.05)))
    assert told() == []


def test_a_long_epoch_is_told_before_its_end(Weight: Any, make_trainer: Any, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "FIRST_LOOK", 0.3)
    seen: list[bool] = []

    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen.append(bool(told()))
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

    make_trainer().fit(Model(), DataLoader(Slow(20, 0.05)))
    assert not seen[4]
    assert seen[-1]
    assert len(told()) == 1


# ---- what counts as waiting -------------------------------------------------------------------------------------------


def run_of(
    source: Any,
    monkeypatch: pytest.MonkeyPatch,
    fetch: float,
    step: float,
    first: float = 0.0,
    device: float | None = None,
    burst: int = 1,
) -> list[tuple[float, float, int]]:
    """What is told where every ``burst``-th batch takes ``fetch`` seconds, and each step its own on the host, and then on a device."""
    world, found = World(), list[tuple[float, float, int]]()
    monkeypatch.setattr(batches, "perf_counter", lambda: world.now)
    monkeypatch.setattr(input_bound.time, "perf_counter", lambda: world.now)
    monkeypatch.setattr(batches, "FIRST_LOOK", math.inf)

    class SimulatedIdle(DeviceIdle):
        def _event(self) -> Any:
            return Event(world)

    def loader() -> Iterator[int]:
        for index in range(100):
            world.now += (fetch if index % burst == 0 else 0) + (first if index == 0 else 0)
            yield index

    idle = None if device is None else SimulatedIdle(world)
    waits = Waits(idle, lambda waits: found.append((round(waits.seconds, 6), round(waits.whole, 6), waits.batches)))
    for _ in source(loader(), 0, 100, lambda batch: batch, waits=waits):
        world.now += step
        world.launch(device or 0.0)
    assert world.waited == 0
    return found


@pytest.mark.parametrize("source", [counted, looked_ahead])
@pytest.mark.parametrize(("fetch", "step", "told"), [(1.0, 1.0, True), (0.4, 0.8, True), (0.2, 0.8, False), (1e-5, 1e-6, False)])
def test_a_third_of_the_time_is_much(source: Any, monkeypatch: pytest.MonkeyPatch, fetch: float, step: float, told: bool) -> None:
    found = run_of(source, monkeypatch, fetch, step)
    assert bool(found) is told


@pytest.mark.parametrize("source", [counted, looked_ahead])
def test_the_first_batch_is_no_wait(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_of(source, monkeypatch, 0.1, 1.0, first=1000.0) == []


def test_the_numbers_are_those_after_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_of(counted, monkeypatch, 1.0, 1.0, first=1000.0) == [(99.0, 199.0, 99)]


def test_a_wait_counts_for_as_long_as_the_device_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_of(counted, monkeypatch, 1.0, 0.0, device=2.0) == []  # it is busy all the time
    assert run_of(counted, monkeypatch, 1.0, 0.0, device=0.9) == []  # most of the time
    # In the first wait the clocks are tied to each other.
    assert run_of(counted, monkeypatch, 1.0, 0.0, device=0.25) == [(98 * 0.75, 99.0, 99)]
    assert run_of(counted, monkeypatch, 1.0, 0.125, device=0.25) == [(98 * 0.75, 99 * 1.125 + 0.125, 99)]


def test_batches_that_come_in_bursts_are_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four steps of 0.25 s are launched at once, while the next four batches are made.
    assert run_of(counted, monkeypatch, 2.0, 0.0, device=0.25, burst=4) == [(23 * 1.0, 48.0, 99)]
    assert run_of(counted, monkeypatch, 2.0, 0.0, device=0.45, burst=4) == []


# ---- advice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "each", "on_gpu", "cpus", "parts"),
    [
        ({}, 0.1, False, 8, ["num_workers=0", "up to the 8 CPUs", "persistent_workers=True"]),
        ({}, 0.1, False, 1, ["num_workers=0", "one CPU, so that workers would gain little", "Slow's `__getitem__`"]),
        ({"num_workers": 2}, 0.1, True, 8, ["num_workers=2, of 8 CPUs", "give more", "persistent_workers=True", "pin_memory=True"]),
        ({"num_workers": 2, "persistent_workers": True}, 0.1, False, 2, ["num_workers=2 already, on 2 CPUs", "Slow's `__getitem__`"]),
        ({}, 0.0005, False, 8, ["num_workers=0", "0.50 ms", "larger batches"]),
    ],
)
def test_advice_is_for_the_loader_at_hand(arguments: Any, each: float, on_gpu: bool, cpus: int, parts: list[str]) -> None:
    advice = advice_for(DataLoader(Slow(4, 0.0), **arguments), each, on_gpu, cpus)
    assert all(part in advice for part in parts)
    hints = {"persistent_workers", "pin_memory", "give more", "already"}
    assert {hint for hint in hints if hint in advice} == {hint for hint in hints if any(hint in part for part in parts)}


def test_advice_for_other_iterables_is_to_fetch_ahead() -> None:
    assert "Batches come from a list" in advice_for([1, 2], 0.1, False, 8)
