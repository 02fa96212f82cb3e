"""The GPU of Apple silicon."""

from __future__ import annotations

from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.cpu import import_psutil
from lightning.fabric.accelerators.registry import AcceleratorRegistry
from lightning.fabric.utilities.device_parser import parse_devices


class MPSAccelerator(Accelerator):
    """The GPU of Apple silicon, through Metal Performance Shaders; there is one."""

    def setup_device(self, device: torch.device) -> None:
        """Check that ``device`` is an MPS device.

        Raises:
            ValueError: if it is not.
        """
        if device.type != "mps":
            raise ValueError(f"MPSAccelerator sets up MPS devices; got {device}.")

    def teardown(self) -> None:
        if self.is_available():
            torch.mps.empty_cache()

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Return the indices that ``devices`` asks for; a machine has one MPS device, of index 0."""
        return parse_devices(devices, range(MPSAccelerator.auto_device_count() if MPSAccelerator.is_available() else 0), "mps")

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("mps", index) for index in MPSAccelerator.parse_devices(devices)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        import platform

        return torch.backends.mps.is_available() and platform.machine() in ("arm64", "arm")

    @staticmethod
    def name() -> str:
        return "mps"

    @classmethod
    def register_accelerators(cls, accelerator_registry: AcceleratorRegistry) -> None:
        accelerator_registry.register("mps", cls, description=cls.__name__, override=True)

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return :func:`get_device_stats`."""
        return get_device_stats()


def get_device_stats() -> dict[str, float]:
    """Return the use of processors, memory and swap in percent; on Apple silicon GPU and CPU share the memory.

    Raises:
        ModuleNotFoundError: without the package ``psutil``.
    """
    psutil = import_psutil()
    return {
        "M1_vm_percent": psutil.virtual_memory().percent,
        "M1_percent": psutil.cpu_percent(),
        "M1_swap_percent": psutil.swap_memory().percent,
    }
