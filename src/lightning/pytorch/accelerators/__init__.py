"""The documented import path of what ``lightning.fabric.accelerators`` owns."""

from lightning.fabric.accelerators import (
    ACCELERATOR_REGISTRY,
    Accelerator,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    TPUAccelerator,
    XLAAccelerator,
    find_usable_cuda_devices,
)

AcceleratorRegistry = ACCELERATOR_REGISTRY

__all__ = [
    "ACCELERATOR_REGISTRY",
    "Accelerator",
    "AcceleratorRegistry",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "TPUAccelerator",
    "XLAAccelerator",
    "find_usable_cuda_devices",
]
