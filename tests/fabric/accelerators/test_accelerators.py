from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning.fabric.accelerators as fabric_accelerators
import lightning.pytorch.accelerators as pytorch_accelerators
from lightning.fabric.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator, find_usable_cuda_devices
from lightning.fabric.accelerators.cpu import get_cpu_stats
from lightning.fabric.accelerators.cuda import get_nvidia_gpu_stats, is_cuda_available, num_cuda_devices, physical_gpu_id
from lightning.fabric.utilities.exceptions import MisconfigurationException

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")
no_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="says what happens without torch_xla")
no_psutil = pytest.mark.skipif(importlib.util.find_spec("psutil") is not None, reason="says what happens without psutil")


def test_pytorch_accelerators_are_the_same_classes() -> None:
    for name in ("Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "XLAAccelerator", "find_usable_cuda_devices"):
        assert getattr(pytorch_accelerators, name) is getattr(fabric_accelerators, name)


def test_cpu_gives_one_device_for_each_process() -> None:
    assert CPUAccelerator.get_parallel_devices(CPUAccelerator.parse_devices("3")) == [torch.device("cpu")] * 3
    assert CPUAccelerator.auto_device_count() == 1
    assert CPUAccelerator.is_available()
    assert CPUAccelerator.name() == "cpu"


@pytest.mark.parametrize("accelerator", [CPUAccelerator(), CUDAAccelerator(), MPSAccelerator()])
def test_setup_device_refuses_a_device_of_another_kind(accelerator: fabric_accelerators.Accelerator) -> None:
    other = torch.device("cpu" if accelerator.name() != "cpu" else "cuda")
    with pytest.raises(ValueError, match=f"{type(accelerator).__name__} sets up .* got {other}"):
        accelerator.setup_device(other)


def test_cpu_setup_and_teardown_do_nothing() -> None:
    accelerator = CPUAccelerator()
    accelerator.setup_device(torch.device("cpu"))
    accelerator.setup(trainer=None)
    accelerator.teardown()


@no_psutil
def test_cpu_stats_say_what_to_install_without_psutil() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install psutil"):
        get_cpu_stats()


def test_cpu_stats_ask_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "psutil.py").write_text(
        "class P:\n    percent = 12.5\nvirtual_memory = swap_memory = lambda: P\ndef cpu_percent(): return 50.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "psutil", raising=False)
    expected = {"cpu_vm_percent": 12.5, "cpu_percent": 50.0, "cpu_swap_percent": 12.5}
    assert CPUAccelerator().get_device_stats(torch.device("cpu")) == expected
    monkeypatch.delitem(sys.modules, "psutil")


def test_cuda_devices_from_indices() -> None:
    assert CUDAAccelerator.get_parallel_devices([0, 2]) == [torch.device("cuda", 0), torch.device("cuda", 2)]
    assert CUDAAccelerator.auto_device_count() == num_cuda_devices()
    assert CUDAAccelerator.is_available() is is_cuda_available()


@no_gpu
def test_cuda_without_a_gpu_names_what_was_asked() -> None:
    assert not CUDAAccelerator.is_available()
    with pytest.raises(MisconfigurationException, match="devices=2 asks for the cuda devices"):
        CUDAAccelerator.parse_devices(2)
    with pytest.raises(ValueError, match="no visible CUDA device"):
        find_usable_cuda_devices(1)
    assert find_usable_cuda_devices(0) == []
    CUDAAccelerator().teardown()


def test_counting_gpus_makes_no_cuda_context() -> None:
    code = (
        "import torch\nfrom lightning.fabric.accelerators import choose_accelerator\n"
        "choose_accelerator('auto').teardown()\nassert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_set_nvidia_flags_orders_gpus_by_their_place_on_the_bus(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    with caplog.at_level("INFO"):
        CUDAAccelerator.set_nvidia_flags(1)
    import os

    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "LOCAL_RANK: 1 - CUDA_VISIBLE_DEVICES: [3,5]" in caplog.text


def test_gpu_stats_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\necho "$@" > asked\necho "17, 100, 900, 3, [N/A], 41, 43"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    stats = get_nvidia_gpu_stats(torch.device("cuda", 1))
    assert stats["utilization.gpu (%)"] == 17.0
    assert stats["memory.free (MB)"] == 900.0
    assert stats["temperature.memory (°C)"] == 43.0
    assert stats["fan.speed (%)"] != stats["fan.speed (%)"], "what the card lacks is not a number"
    assert "--id=GPU-abc" in Path("asked").read_text()


def test_gpu_stats_without_nvidia_smi_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nvidia-smi"):
        get_nvidia_gpu_stats(torch.device("cuda", 0))


def test_physical_gpu_id_is_the_index_when_all_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert physical_gpu_id(2) == "2"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="says what happens on a machine without MPS")
def test_mps_without_the_device_names_what_was_asked() -> None:
    assert not MPSAccelerator.is_available()
    with pytest.raises(MisconfigurationException, match="mps"):
        MPSAccelerator.parse_devices(1)
    MPSAccelerator().teardown()


@no_xla
def test_tpu_without_torch_xla_says_what_to_install() -> None:
    assert not XLAAccelerator.is_available()
    assert XLAAccelerator.auto_device_count() == 0
    with pytest.raises(ModuleNotFoundError, match=r"pip install .torch_xla"):
        XLAAccelerator()
    with pytest.raises(ModuleNotFoundError, match=r"pip install .torch_xla"):
        fabric_accelerators.choose_accelerator("tpu")


def test_tpu_devices_are_a_count_or_one_index() -> None:
    assert XLAAccelerator.parse_devices("8") == 8
    assert XLAAccelerator.parse_devices("3,") == [3]
    assert XLAAccelerator.get_parallel_devices(2) == [torch.device("xla", 0), torch.device("xla", 1)]
    assert XLAAccelerator.get_parallel_devices([3]) == [torch.device("xla", 3)]
    with pytest.raises(MisconfigurationException, match="one index"):
        XLAAccelerator.parse_devices([1, 2])
    with pytest.raises(MisconfigurationException, match="asks for no tpu device"):
        XLAAccelerator.parse_devices(0)
