"""Kinds of devices: how many there are, which ones a run uses, how one is made ready."""

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.accelerators.cuda import CUDAAccelerator, find_usable_cuda_devices
from lightning.fabric.accelerators.mps import MPSAccelerator
from lightning.fabric.accelerators.registry import ACCELERATOR_REGISTRY, AcceleratorRegistry, choose_accelerator
from lightning.fabric.accelerators.xla import XLAAccelerator

TPUAccelerator = XLAAccelerator

for _accelerator in (CPUAccelerator, CUDAAccelerator, MPSAccelerator, XLAAccelerator):
    _accelerator.register_accelerators(ACCELERATOR_REGISTRY)

__all__ = [
    "ACCELERATOR_REGISTRY",
    "Accelerator",
    "AcceleratorRegistry",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "TPUAccelerator",
    "XLAAccelerator",
    "choose_accelerator",
    "find_usable_cuda_devices",
]
