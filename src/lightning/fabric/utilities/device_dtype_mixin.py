"""A module that knows its device and dtype without looking at its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
        self._device: torch.device = torch.get_default_device()
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

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # to(), cuda(), half(), to_empty() and all the others go through here, submodules included. A tensor without
        # elements tells what the conversion does, also where there is no parameter to look at.
        super()._apply(fn, *args, **kwargs)
        converted = fn(torch.empty(0, device=self._device, dtype=self._dtype))
        self._device, self._dtype = converted.device, converted.dtype
        return self
