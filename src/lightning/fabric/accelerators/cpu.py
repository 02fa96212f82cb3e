"""The CPU."""

from __future__ import annotations

from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.registry import AcceleratorRegistry
from lightning.fabric.utilities.device_parser import parse_device_count


class CPUAccelerator(Accelerator):
    """The CPU: ``devices=n`` means ``n`` processes."""

    def setup_device(self, device: torch.device) -> None:
        """Check that ``device`` is a CPU.

        Raises:
            ValueError: if it is not.
        """
        if device.type != "cpu":
            raise ValueError(f"CPUAccelerator sets up CPU devices; got {device}.")

    def teardown(self) -> None:
        """Nothing to give back."""

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """Return the number of processes: an int above 0, such an int as a string, or ``"auto"`` (1)."""
        return parse_device_count(devices, "cpu")

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return the CPU once for each process."""
        return [torch.device("cpu")] * parse_device_count(devices, "cpu")

    @staticmethod
    def auto_device_count() -> int:
        """Return 1: a CPU run is one process unless more are asked for."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Return True: there is always a CPU."""
        return True

    @staticmethod
    def name() -> str:
        return "cpu"

    @classmethod
    def register_accelerators(cls, accelerator_registry: AcceleratorRegistry) -> None:
        accelerator_registry.register("cpu", cls, description=cls.__name__, override=True)

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return :func:`get_cpu_stats`."""
        return get_cpu_stats()


def get_cpu_stats() -> dict[str, float]:
    """Return the use of processors, memory and swap in percent: ``cpu_percent``, ``cpu_vm_percent``, ``cpu_swap_percent``.

    Raises:
        ModuleNotFoundError: without the package ``psutil``.
    """
    psutil = import_psutil()
    return {
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_percent": psutil.cpu_percent(),
        "cpu_swap_percent": psutil.swap_memory().percent,
    }


def import_psutil() -> Any:
    try:
        import psutil
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Statistics of the host need the package psutil: `pip install psutil`.") from None
    return psutil
