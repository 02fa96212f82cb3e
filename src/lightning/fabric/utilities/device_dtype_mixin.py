"""A module that knows its device and dtype without looking at its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module
from typing_extensions import Self


class DeviceDtypeMixin(Module):
    """Tracks ``device`` and ``dtype`` through every conversion, in the module and in all its submodules of this kind.

    Example::

        >>> class Net(DeviceDtypeMixin): ...
        >>> Net().to(torch.float64).dtype, Net().device
        (torch.float64, device(type='cpu'))
    """

    __jit_unused_properties__ = ["device", "dtype"]

    def __init__(self) -> None:
        super().__init__()
        self._device: torch.device = torch.get_default_device() if hasattr(torch, "get_default_device") else torch.device("cpu")
        self._dtype: torch.dtype = torch.get_default_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the module was last converted to."""
        return self._dtype

    @dtype.setter
    def dtype(self, new_dtype: torch.dtype) -> None:
        raise RuntimeError("Cannot set the dtype explicitly: call module.to(new_dtype), which converts the parameters too.")

    @property
    def device(self) -> torch.device:
        """The device that the module was last moved to."""
        return self._device

    def _remember(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        for module in self.modules():
            if isinstance(module, DeviceDtypeMixin):
                if device is not None:
                    module._device = device
                if dtype is not None:
                    module._dtype = dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move and convert as :meth:`torch.nn.Module.to` does."""
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        super().to(*args, **kwargs)
        self._remember(_with_index(device), dtype)
        return self

    def cuda(self, device: torch.device | int | None = None) -> Self:
        """Move to a CUDA device, the current one unless given."""
        if device is None or isinstance(device, int):
            device = torch.device("cuda", torch.cuda.current_device() if device is None else device)
        super().cuda(device)
        self._remember(_with_index(device))
        return self

    def cpu(self) -> Self:
        """Move to the CPU."""
        super().cpu()
        self._remember(torch.device("cpu"))
        return self

    def type(self, dst_type: str | torch.dtype) -> Self:
        """Convert all parameters and buffers to ``dst_type``."""
        super().type(dst_type)
        if isinstance(dst_type, torch.dtype):
            self._remember(dtype=dst_type)
        return self

    def float(self) -> Self:
        """Convert floating-point parameters and buffers to 32 bits."""
        super().float()
        self._remember(dtype=torch.float32)
        return self

    def double(self) -> Self:
        """Convert floating-point parameters and buffers to 64 bits."""
        super().double()
        self._remember(dtype=torch.float64)
        return self

    def half(self) -> Self:
        """Convert floating-point parameters and buffers to 16 bits."""
        super().half()
        self._remember(dtype=torch.float16)
        return self


def _with_index(device: torch.device | None) -> torch.device | None:
    # `cuda` without an index means the current device: remember which one that was.
    if device is not None and device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
