"""The base class of accelerators: what a kind of device is called, where its devices are, how one is made ready."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.fabric.accelerators.registry import AcceleratorRegistry


class Accelerator(ABC):
    """A kind of device.

    Derive from it to bring hardware of your own, and pass an instance as ``Trainer(accelerator=...)``, or register the
    class in ``ACCELERATOR_REGISTRY`` and pass its name.

    Example::

        class NPUAccelerator(Accelerator):
            def setup_device(self, device): torch.npu.set_device(device)
            def teardown(self): pass
            @staticmethod
            def parse_devices(devices): return [0]
            @staticmethod
            def get_parallel_devices(devices): return [torch.device("npu", i) for i in devices]
            @staticmethod
            def auto_device_count(): return 1
            @staticmethod
            def is_available(): return True
            @staticmethod
            def name(): return "npu"

        trainer = Trainer(accelerator=NPUAccelerator())
    """

    @abstractmethod
    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` ready in the process that is going to use it.

        Raises:
            ValueError: if ``device`` is not of this accelerator's kind.
        """

    def setup(self, trainer: Any) -> None:
        """Called by the Trainer after its strategy has set up the processes."""

    @abstractmethod
    def teardown(self) -> None:
        """Give back what the run occupied on the device."""

    @staticmethod
    @abstractmethod
    def parse_devices(devices: Any) -> Any:
        """Turn the argument ``devices`` into what :meth:`get_parallel_devices` takes."""

    @staticmethod
    @abstractmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return one device for each process of this machine."""

    @staticmethod
    @abstractmethod
    def auto_device_count() -> int:
        """Return how many devices ``devices="auto"`` means."""

    @staticmethod
    @abstractmethod
    def is_available() -> bool:
        """Return whether this machine has such a device."""

    @staticmethod
    def name() -> str:
        """Return the name for ``Trainer(accelerator=...)``."""
        return ""

    @classmethod
    def register_accelerators(cls, accelerator_registry: AcceleratorRegistry) -> None:
        """Enter this class into ``accelerator_registry`` under its name."""

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return figures about the use of ``device``, by name.

        Raises:
            NotImplementedError: if the accelerator has none.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no statistics about its devices; override get_device_stats to add them.")
