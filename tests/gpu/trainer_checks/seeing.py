"""ThroughputMonitor, EpochTimes and the message on slow data measure the GPU's work, and nobody waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loops import batches as batches_module
from lightning.pytorch.profilers import EpochTimes

from .common import Check, Classifier, Place, Skip, batches
from .running_ahead import Guard, Rows


def checks(place: Place) -> list[Check]:
    return [
        ("throughput: no read from the device", lambda: no_read(place, profiler=None)),
        ("times of epochs: no read from the device", lambda: no_read(place, profiler=EpochTimes(to_loggers=True))),
        ("throughput is that of the GPU, not of the host", lambda: rates(place)),
        ("times of epochs tell GPU and host apart", lambda: times(place)),
        ("slow data are told where the GPU has nothing to do", lambda: slow_data(place, 0.005, told=True)),
        ("slow data are not told where the GPU is busy", lambda: slow_data(place, 0.05, told=False)),
        ("the peak of this GPU is known", lambda: peak(place)),
    ]


class Asleep(Classifier):
    """A model whose step keeps the GPU, not the host, busy."""

    def __init__(self, place: Place, seconds: float, **options: Any) -> None:
        super().__init__("mlp", **options)
        self.place, self.seconds = place, seconds

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.place.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


def seconds_asleep(place: Place, seconds: float) -> float:
    """What a sleep of about so many seconds really takes."""
    place.sleep(seconds)
    torch.cuda.synchronize(place.device)
    start = time.perf_counter()
    for _ in range(10):
        place.sleep(seconds)
    torch.cuda.synchronize(place.device)
    return (time.perf_counter() - start) / 10


def monitor(**options: Any) -> ThroughputMonitor:
    return ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=4, **options)


def no_read(place: Place, profiler: Any) -> str:
    guard, rows = Guard(place), Rows()
    model = Classifier("mlp", log={"on_step": True})
    model.flops_per_batch = 1000
    trainer = place.trainer(logger=rows, log_every_n_steps=2, max_epochs=2, callbacks=[guard, monitor()], profiler=profiler)
    trainer.fit(model, batches(12, pin=place.is_cuda))
    assert guard.guarded == 22
    mine = [step for step, row in rows.rows if "train/batches" in row]
    assert mine == list(range(1, 24, 2)), mine
    assert profiler is None or [step for step, row in rows.rows if "epoch_time/compute" in row] == [11, 23]
    return f"{guard.guarded} steps, {len(rows.rows)} rows"


def rates(place: Place) -> str:
    place.require_cuda()
    step, rows = seconds_asleep(place, 0.01), Rows()
    place.trainer(logger=rows, log_every_n_steps=20, callbacks=[monitor()]).fit(Asleep(place, 0.01), batches(20, pin=True))
    row = next(row for _, row in rows.rows if "train/device/batches_per_sec" in row)
    note = f"{row['train/device/batches_per_sec']:.1f} batches per second, a sleep takes {step * 1e3:.2f} ms"
    assert 0.9 < row["train/device/batches_per_sec"] * step < 1.01, note
    assert row["train/time"] > 19 * step, note
    return note


def times(place: Place) -> str:
    place.require_cuda()
    step = seconds_asleep(place, 0.01)
    trainer = place.trainer(max_epochs=2, profiler="epoch", logger=Rows())
    trainer.fit(Asleep(place, 0.01, log={"on_epoch": True}), batches(20, pin=True))
    for found in trainer.profiler.times:
        assert 0.95 * 20 * step < found["device_steps"] < 1.3 * 20 * step, (found, step)
        assert found["device_wait"] > 0.5 * found["whole"], found  # where the values of the epoch are read
        assert found["logging"] < 0.1 * found["whole"], found
    return f"{trainer.profiler.times[-1]}, a sleep takes {step * 1e3:.2f} ms"


class Slowly:
    """Batches that take 20 ms each on the host."""

    def __init__(self) -> None:
        self.data = batches(12, pin=True)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            time.sleep(0.02)
            yield batch


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def slow_data(place: Place, seconds: float, told: bool) -> str:
    place.require_cuda()
    log, listener, level = logging.getLogger("lightning.pytorch"), Listener(), logging.getLogger("lightning.pytorch").level
    least = batches_module.LEAST_SECONDS, batches_module.LEAST_BATCHES
    batches_module.LEAST_SECONDS, batches_module.LEAST_BATCHES = 0.05, 5
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        place.trainer().fit(Asleep(place, seconds), Slowly())
    finally:
        batches_module.LEAST_SECONDS, batches_module.LEAST_BATCHES = least
        log.removeHandler(listener)
        log.setLevel(level)
    found = [message for message in listener.messages if "held up by its data" in message]
    assert len(found) == told, listener.messages
    return found[0] if found else ""


def peak(place: Place) -> str:
    place.require_cuda()
    flops = get_available_flops(place.device, torch.bfloat16)
    name = torch.cuda.get_device_name(place.device)
    if flops is None:
        raise Skip(f"no: {name}")
    return f"{name}: {flops / 1e12} TFLOP/s in bfloat16"
