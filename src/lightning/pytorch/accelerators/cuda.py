"""The documented import path of what ``lightning.fabric.accelerators.cuda`` owns."""

from lightning.fabric.accelerators.cuda import CUDAAccelerator, find_usable_cuda_devices, get_nvidia_gpu_stats

__all__ = ["CUDAAccelerator", "find_usable_cuda_devices", "get_nvidia_gpu_stats"]
