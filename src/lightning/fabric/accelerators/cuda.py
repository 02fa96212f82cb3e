"""NVIDIA and AMD GPUs through ``torch.cuda``."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.registry import AcceleratorRegistry
from lightning.fabric.utilities.device_parser import parse_devices
from lightning.fabric.utilities.rank_zero import rank_zero_info


class CUDAAccelerator(Accelerator):
    """GPUs that ``torch.cuda`` drives. The indices are those among the visible devices (``CUDA_VISIBLE_DEVICES``)."""

    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one of this process.

        Raises:
            ValueError: if it is not a CUDA device.
        """
        if device.type != "cuda":
            raise ValueError(f"CUDAAccelerator sets up CUDA devices; got {device}.")
        torch.cuda.set_device(device)
        advise_matmul_precision(device)

    def setup(self, trainer: Any) -> None:
        """Empty PyTorch's cache, so that memory which an earlier run has freed can serve this one."""
        release_cached_memory()

    def teardown(self) -> None:
        release_cached_memory()

    @staticmethod
    def set_nvidia_flags(local_rank: int) -> None:
        """Number the GPUs by their place on the bus, as ``nvidia-smi`` does, and log which ones this process sees."""
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(index) for index in range(num_cuda_devices())))
        rank_zero_info(f"LOCAL_RANK: {local_rank} - CUDA_VISIBLE_DEVICES: [{visible}]")

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Return the indices that ``devices`` asks for; see :func:`lightning.fabric.utilities.device_parser.parse_devices`."""
        return parse_devices(devices, range(num_cuda_devices()), "cuda")

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return num_cuda_devices()

    @staticmethod
    def is_available() -> bool:
        return num_cuda_devices() > 0

    @staticmethod
    def name() -> str:
        return "cuda"

    @classmethod
    def register_accelerators(cls, accelerator_registry: AcceleratorRegistry) -> None:
        accelerator_registry.register("cuda", cls, description=cls.__name__, override=True)

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return the counters of PyTorch's memory allocator for ``device`` (``torch.cuda.memory_stats``)."""
        return torch.cuda.memory_stats(device)


def num_cuda_devices() -> int:
    """Return how many GPUs are visible, asking NVML, so that no CUDA context comes about and processes may still fork."""
    return torch.cuda.device_count()


def is_cuda_available() -> bool:
    """Return whether a GPU is visible, without making a CUDA context."""
    return num_cuda_devices() > 0


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Return the indices of GPUs on which a tensor can be made now.

    Of use where GPUs run in exclusive-process mode and some are taken: ``Trainer(devices=find_usable_cuda_devices(2))``.

    Args:
        num_devices: how many; -1 for all that can be used.

    Raises:
        ValueError: if more are asked for than are visible.
        RuntimeError: if fewer than asked for can be used.
    """
    if num_devices == 0:
        return []
    visible = num_cuda_devices()
    if visible == 0:
        raise ValueError(f"num_devices={num_devices} was asked for, and this machine has no visible CUDA device.")
    if num_devices > visible:
        raise ValueError(f"num_devices={num_devices} was asked for, and this machine has {visible} visible CUDA devices. Ask for fewer.")
    usable: list[int] = []
    taken: list[int] = []
    for index in range(visible):
        try:
            torch.tensor(0, device=torch.device("cuda", index))
        except RuntimeError:
            taken.append(index)
            continue
        usable.append(index)
        if len(usable) == num_devices:
            return usable
    if num_devices > 0:
        raise RuntimeError(
            f"num_devices={num_devices} was asked for, and only {usable} can be used: the devices {taken} are taken by other processes. "
            "Wait for them, or ask for fewer."
        )
    return usable


def release_cached_memory() -> None:
    # Asking an uninitialised CUDA would make a context, which is what a CPU run on a GPU machine must not do.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@functools.lru_cache(maxsize=1)
def say_once(message: str) -> None:
    rank_zero_info(message)


def advise_matmul_precision(device: torch.device) -> None:
    """Say once how to let float32 products use the tensor cores, where there are some and they lie idle."""
    if torch.version.cuda is None or torch.get_float32_matmul_precision() != "highest":
        return
    if torch.cuda.get_device_capability(device)[0] >= 8:
        say_once(
            f"{torch.cuda.get_device_name(device)!r} has tensor cores, which float32 matrix products do not use at present. "
            "`torch.set_float32_matmul_precision('high')` (or 'medium') makes them several times faster at a lower precision."
        )


def get_nvidia_gpu_stats(device: torch.device | str | int) -> dict[str, float]:
    """Return what ``nvidia-smi`` says of one GPU: fan, memory, utilization and temperatures, each key with its unit.

    Args:
        device: a CUDA device.

    Raises:
        FileNotFoundError: if ``nvidia-smi`` is not on the path.
    """
    import shutil
    import subprocess

    command = shutil.which("nvidia-smi")
    if command is None:
        raise FileNotFoundError("nvidia-smi was not found on the path. Install the NVIDIA driver's tools, or leave GPU statistics out.")
    fields = {
        "utilization.gpu": "%",
        "memory.used": "MB",
        "memory.free": "MB",
        "utilization.memory": "%",
        "fan.speed": "%",
        "temperature.gpu": "°C",
        "temperature.memory": "°C",
    }
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,nounits,noheader", f"--id={physical_gpu_id(torch.device(device).index or 0)}"]
    answer = subprocess.run([command, *query], encoding="utf-8", capture_output=True, check=True).stdout
    return {f"{name} ({unit})": number_or_nan(value) for (name, unit), value in zip(fields.items(), answer.strip().split(","))}


def physical_gpu_id(index: int) -> str:
    """The name by which ``nvidia-smi`` knows the visible device ``index``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(index) if not visible else visible.split(",")[index].strip()


def number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # nvidia-smi writes [N/A] for what the card lacks
