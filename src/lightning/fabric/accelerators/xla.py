"""TPUs, through ``torch_xla``.

Where there are none, torch_xla computes on the CPU: with the environment variable ``PJRT_DEVICE=CPU``, ``accelerator="tpu"``
means as many CPU devices as ``CPU_NUM_DEVICES`` says (1). It is slow, and meant for tests of programs for TPUs; ``"auto"`` never
chooses it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.registry import AcceleratorRegistry
from lightning.fabric.utilities.device_parser import parse_devices, read_devices, refuse_none
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn

PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # the vendor's number of TPUs


class XLAAccelerator(Accelerator):
    """TPUs, through ``torch_xla``.

    Raises:
        ModuleNotFoundError: when made without ``torch_xla`` installed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not has_torch_xla():
            raise ModuleNotFoundError('accelerator="tpu" needs the package torch_xla: `pip install "torch_xla[tpu]"`.')
        super().__init__(*args, **kwargs)

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do: XLA gives each process its device. Says so where that is no TPU."""
        if self.is_stand_in():
            rank_zero_warn(
                'PJRT_DEVICE=CPU is set, so accelerator="tpu" computes on the CPU, through XLA. That is for tests; on a machine with '
                'TPUs set PJRT_DEVICE=TPU, and for training on the CPU use accelerator="cpu".'
            )

    def teardown(self) -> None:
        """Nothing to give back."""

    @staticmethod
    def parse_devices(devices: Any) -> int | list[int]:
        """Return a number of devices, or a list with the one index that was asked for.

        Raises:
            MisconfigurationException: if several indices are given; XLA runs on one device or on the first ``n``.
        """
        request = read_devices(devices, "tpu")
        if request == -1:
            return len(parse_devices(-1, range(XLAAccelerator.auto_device_count()), "tpu"))
        if isinstance(request, int) and request > 0:
            return request
        if not request:
            refuse_none(devices, "tpu")
        if isinstance(request, int) or len(request) > 1:
            raise MisconfigurationException(
                f'devices={devices!r} was given for TPUs. Accepted: a number of devices (8), all (-1 or "auto"), or one index ([3]).'
            )
        return request

    @staticmethod
    def get_parallel_devices(devices: int | list[int]) -> list[torch.device]:
        return [torch.device("xla", index) for index in (range(devices) if isinstance(devices, int) else devices)]

    @staticmethod
    def auto_device_count() -> int:
        """Return the number of TPU devices of this host, or of the CPU devices that stand in for them; 0 without ``torch_xla``."""
        if not has_torch_xla():
            return 0
        if XLAAccelerator.is_stand_in():
            return int(os.environ.get("CPU_NUM_DEVICES") or 1)
        return count_tpus()

    @staticmethod
    def is_available() -> bool:
        # Counting, rather than asking the runtime, leaves the device free for the processes that are started later.
        return XLAAccelerator.auto_device_count() > 0

    @staticmethod
    def is_stand_in() -> bool:
        """Whether the CPU stands in for TPUs, because ``PJRT_DEVICE=CPU`` is set."""
        return os.environ.get("PJRT_DEVICE", "").upper() == "CPU"

    @staticmethod
    def name() -> str:
        return "tpu"

    @classmethod
    def register_accelerators(cls, accelerator_registry: AcceleratorRegistry) -> None:
        accelerator_registry.register("tpu", cls, description=cls.__name__, override=True)

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return the memory of ``device`` in MB: ``avg. free memory (MB)`` and ``avg. peak memory (MB)``; nothing for a CPU device."""
        if self.is_stand_in():
            return {}  # it does not count its memory
        import torch_xla.core.xla_model as xm

        info = xm.get_memory_info(str(device))
        used, limit = info["bytes_used"], info["bytes_limit"]
        return {
            "avg. free memory (MB)": (limit - used) / 2**20,
            "avg. peak memory (MB)": info.get("peak_bytes_used", used) / 2**20,
        }


def count_tpus() -> int:
    """Return the number of TPU devices of this host, as torch_xla counts them."""
    if not has_tpu_chips():
        return 0
    from torch_xla._internal import tpu

    # Its `num_available_devices` asks for the kind of TPU first, which fails where there is none.
    return int(tpu.num_available_devices()) if tpu.num_available_chips() > 0 else 0


def has_tpu_chips() -> bool:
    """Whether any device of this host is Google's: where none is, torch_xla, which takes seconds to import, need not be asked."""
    return any(vendor.read_text().strip() == GOOGLE for vendor in PCI_DEVICES.glob("*/vendor"))


def has_torch_xla() -> bool:
    import importlib.util

    return importlib.util.find_spec("torch_xla") is not None
