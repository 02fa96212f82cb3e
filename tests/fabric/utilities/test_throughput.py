"""Rates of work, and the peaks of devices."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.throughput import Throughput, ThroughputMonitor, get_available_flops, measure_flops


def test_rates_appear_once_the_window_is_full() -> None:
    throughput = Throughput(window_size=3)
    throughput.update(time=1.0, batches=1, samples=2)
    throughput.update(time=2.0, batches=2, samples=4)
    assert throughput.compute() == {"time": 2.0, "batches": 2, "samples": 4}
    throughput.update(time=3.5, batches=3, samples=7)
    assert throughput.compute() == {
        "time": 3.5, "batches": 3, "samples": 7, "device/batches_per_sec": 0.8, "device/samples_per_sec": 2.0,
    }  # fmt: skip


def test_rates_look_back_over_the_window_alone() -> None:
    throughput = Throughput(window_size=2)
    for time, batches in ((0, 1), (10, 2), (11, 4)):
        throughput.update(time=time, batches=batches, samples=batches)
    assert throughput.compute()["device/batches_per_sec"] == 2.0


def test_several_devices_items_and_operations() -> None:
    throughput = Throughput(available_flops=100, world_size=2, window_size=2, separator="|")
    for step in (1, 2):
        throughput.update(time=step, batches=step, samples=step * 2, lengths=step * 20, flops=30)
    assert throughput.compute() == {
        "time": 2, "batches": 2, "samples": 4, "lengths": 40,
        "device|batches_per_sec": 1.0, "device|samples_per_sec": 2.0, "device|items_per_sec": 20.0, "device|flops_per_sec": 30.0,
        "batches_per_sec": 2.0, "samples_per_sec": 4.0, "items_per_sec": 40.0, "flops_per_sec": 60.0, "device|mfu": 0.3,
    }  # fmt: skip


def test_operations_count_since_the_first_update_of_the_window() -> None:
    throughput = Throughput(window_size=3)
    for step, flops in enumerate((1, 10, 100, 1000)):
        throughput.update(time=step, batches=step, samples=step, flops=flops)
    assert throughput.compute()["device/flops_per_sec"] == 550.0


def test_items_and_operations_that_are_told_now_and_then_give_no_rate() -> None:
    throughput = Throughput(window_size=3)
    for step in range(3):
        told = 10 * step if step % 2 else None
        throughput.update(time=step, batches=step, samples=step, lengths=told, flops=told)
    assert set(throughput.compute()) == {"time", "batches", "samples", "device/batches_per_sec", "device/samples_per_sec"}


def test_reset_forgets() -> None:
    throughput = Throughput(window_size=2)
    throughput.update(time=5, batches=5, samples=5)
    throughput.reset()
    assert throughput.compute() == {}
    throughput.update(time=1, batches=1, samples=1)


@pytest.mark.parametrize(
    ("update", "match"),
    [
        ({"time": 1.0, "batches": 5, "samples": 10}, r"time=1.0.*last one was 4.0"),
        ({"time": 5.0, "batches": 4, "samples": 10}, r"batches=4.*last one was 4"),
        ({"time": 5.0, "batches": 5, "samples": 8}, r"samples=8.*last one was 8"),
        ({"time": 5.0, "batches": 5, "samples": 10, "lengths": 11}, r"lengths=11.*last one was 20"),
        ({"time": 5.0, "batches": 9, "samples": 8}, "8 samples can't make 9 batches"),
        ({"time": 5.0, "batches": 5, "samples": 10, "lengths": 9}, "10 samples can't have lengths of 9"),
    ],
)
def test_totals_that_do_not_fit_raise_and_add_nothing(update: dict[str, Any], match: str) -> None:
    throughput = Throughput(window_size=2)
    throughput.update(time=4.0, batches=4, samples=8, lengths=20)
    with pytest.raises(ValueError, match=match):
        throughput.update(**update)
    assert throughput.compute() == {"time": 4.0, "batches": 4, "samples": 8, "lengths": 20}


@pytest.mark.parametrize("arguments", [{"world_size": 0}, {"window_size": 1}])
def test_wrong_arguments_raise(arguments: dict[str, int]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name}="):
        Throughput(**arguments)


def test_measured_operations_of_a_network() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), torch.empty(2, 3)
    forward = 2 * 2 * (3 * 4 + 4 * 5)
    assert measure_flops(model, lambda: model(x)) == forward
    assert measure_flops(model, lambda: model(x), lambda y: y.sum()) == forward * 3 - 2 * 2 * 3 * 4  # x needs no gradient


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.4),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA A100-SXM4-80GB", "int8", 624),
        ("Tesla V100-PCIE-16GB", torch.float16, 112),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, 80),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA GB200", torch.bfloat16, 2500),
        ("NVIDIA H20", torch.bfloat16, 148),
        ("NVIDIA GeForce RTX 3080", torch.float16, 59.5),
        ("NVIDIA GeForce RTX 3080 Ti", torch.float16, 68.2),
        ("NVIDIA GeForce RTX 2080 SUPER", torch.float16, 44.6),
    ],
)
def test_peak_of_a_gpu(name: str, dtype: Any, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert get_available_flops(torch.device("cuda"), dtype) == int(peak * 1e12)


def test_peak_of_float32_follows_the_matmul_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-40GB")
    assert get_available_flops(torch.device("cuda"), torch.float32) == 156e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")  # has no TF32
    assert get_available_flops(torch.device("cuda"), torch.float32) == 8.1e12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Unheard Of", torch.float32),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float32),
        ("Tesla T4", torch.bfloat16),
        ("Tesla T4", "int3"),
    ],
)
def test_unknown_peak_warns(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    with pytest.warns(UserWarning, match=f"peak of '{name}'.* not known"):
        assert get_available_flops(torch.device("cuda"), dtype) is None


def test_cpu_has_no_known_peak() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_available_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    ("platform", "kind", "cores", "peak"),
    [("TPU", "v4", 1, 275), ("TPU", "v3", 2, 61.5), ("TPU", "v5litepod", 1, 197), ("CPU", "", 1, None)],
)
def test_peak_of_a_tpu(platform: str, kind: str, cores: int, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tpu = SimpleNamespace(get_tpu_type=lambda: kind, num_logical_cores_per_chip=lambda: cores)
    runtime = SimpleNamespace(device_type=lambda: platform)
    for name, module in {
        "torch_xla": SimpleNamespace(runtime=runtime),
        "torch_xla.runtime": runtime,
        "torch_xla._internal": SimpleNamespace(tpu=tpu),
        "torch_xla._internal.tpu": tpu,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert get_available_flops(torch.device("xla"), torch.bfloat16) == (None if peak is None else peak * 1e12)


class FabricStandIn:
    """The part of Fabric that the monitor uses."""

    device = torch.device("cpu")
    world_size = 2

    class strategy:
        class precision:
            precision = "bf16-mixed"

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log_dict(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))


def test_monitor_logs_through_fabric() -> None:
    fabric = FabricStandIn()
    monitor = ThroughputMonitor(fabric, window_size=2)  # type: ignore[arg-type]
    for step in (1, 2):
        monitor.update(time=step, batches=step, samples=step)
    metrics = monitor.compute_and_log()
    assert metrics["batches_per_sec"] == 2.0
    monitor.compute_and_log(step=7)
    assert fabric.logged == [(metrics, 0), (metrics, 7)]
    monitor.reset()
    assert monitor.compute() == {}


def test_monitor_is_silent_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = FabricStandIn()
    monitor = ThroughputMonitor(fabric)  # type: ignore[arg-type]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monitor.update(time=1, batches=1, samples=1)
    assert monitor.compute_and_log() == {}
    assert fabric.logged == []
