"""Detaching, and telling errors of memory from others."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lightning.pytorch.utilities.memory import (
    garbage_collection_cuda,
    is_cuda_out_of_memory,
    is_cudnn_snafu,
    is_oom_error,
    is_out_of_cpu_memory,
    recursive_detach,
)

CUDA = "CUDA out of memory. Tried to allocate 1.00 GiB"
CUDNN = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
CPU = "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


@pytest.mark.parametrize("to_cpu", [True, False])
def test_recursive_detach_detaches_nested_tensors(to_cpu: bool) -> None:
    value = torch.ones(2, requires_grad=True) * 2
    detached = recursive_detach({"a": value, "b": {"c": [value]}, "d": (value, 1), "e": "text"}, to_cpu=to_cpu)
    assert not any(t.requires_grad for t in (detached["a"], detached["b"]["c"][0], detached["d"][0]))
    assert detached["a"].data_ptr() == value.data_ptr()
    assert (detached["d"][1], detached["e"]) == (1, "text")
    assert value.requires_grad


@pytest.mark.parametrize(
    ("error", "cuda", "cudnn", "cpu"),
    [
        (RuntimeError(CUDA), True, False, False),
        (RuntimeError("CUDA error: out of memory"), True, False, False),
        (torch.OutOfMemoryError(CUDA), True, False, False),
        (torch.OutOfMemoryError("no text"), True, False, False),
        (RuntimeError("HIP out of memory. Tried to allocate"), True, False, False),
        (RuntimeError("MPS backend out of memory"), True, False, False),
        (RuntimeError(CUDNN), False, True, False),
        (RuntimeError(CPU), False, False, True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), False, False, True),
        (MemoryError(), False, False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, False, False),
        (RuntimeError("out of memory"), False, False, False),
        (RuntimeError(), False, False, False),
        (ValueError(CUDA), False, False, False),
        (ValueError(CPU), False, False, False),
        (KeyboardInterrupt(), False, False, False),
    ],
)
def test_errors_of_memory(error: BaseException, cuda: bool, cudnn: bool, cpu: bool) -> None:
    assert (is_cuda_out_of_memory(error), is_cudnn_snafu(error), is_out_of_cpu_memory(error)) == (cuda, cudnn, cpu)
    assert is_oom_error(error) is (cuda or cudnn or cpu)


def test_garbage_collection_frees_cycles() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        reference = weakref.ref(Node())
        garbage_collection_cuda()
        assert reference() is None
    finally:
        gc.enable()
