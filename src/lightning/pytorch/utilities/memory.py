"""Let go of memory, and tell errors of memory from others."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.apply_func import apply_to_collection

__all__ = [
    "garbage_collection_cuda",
    "is_cuda_out_of_memory",
    "is_cudnn_snafu",
    "is_oom_error",
    "is_out_of_cpu_memory",
    "recursive_detach",
]


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """Return ``in_dict`` with each tensor in it detached from its graph.

    Args:
        in_dict: a dict of tensors, or any nested collection.
        to_cpu: whether to copy the tensors to the CPU too.

    Example::

        >>> recursive_detach({"loss": torch.ones(1, requires_grad=True) * 2, "step": 3})
        {'loss': tensor([2.]), 'step': 3}
    """

    def detach(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu() if to_cpu else tensor.detach()

    return apply_to_collection(in_dict, Tensor, detach)


def is_oom_error(exception: BaseException) -> bool:
    """Whether ``exception`` says that memory ran out: on a GPU, inside cuDNN, or on the CPU."""
    return is_cuda_out_of_memory(exception) or is_cudnn_snafu(exception) or is_out_of_cpu_memory(exception)


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Whether ``exception`` says that the memory of a GPU ran out.

    Example::

        >>> is_cuda_out_of_memory(RuntimeError("CUDA error: out of memory")), is_cuda_out_of_memory(RuntimeError("other"))
        (True, False)
    """
    if isinstance(exception, torch.OutOfMemoryError):
        return True
    text = str(exception)
    return isinstance(exception, RuntimeError) and "out of memory" in text and any(name in text for name in ("CUDA", "HIP", "MPS", "XPU"))


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Whether ``exception`` is cuDNN's complaint about an unsupported operation, which it raises when memory is short too."""
    return isinstance(exception, RuntimeError) and "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED." in str(exception)


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Whether ``exception`` says that the memory of the machine ran out."""
    if isinstance(exception, MemoryError):
        return True
    text = str(exception)
    return (
        isinstance(exception, RuntimeError)
        and "DefaultCPUAllocator" in text
        and any(words in text for words in ("can't allocate memory", "not enough memory"))
    )


def garbage_collection_cuda() -> None:
    """Collect garbage, and give the GPU memory that torch keeps for later back to the device."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if not is_oom_error(error):  # called after running out of memory, so that must not end the clean-up
            raise
