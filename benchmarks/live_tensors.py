"""Bytes of the tensors that are alive: counted where operations make them, until the last reference to them goes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """A context in which every new storage is counted, on any device, until it is freed.

    What another library than torch has allocated (arrays of numpy, the scratch memory of kernels) is not seen.

    Attributes:
        live: bytes of what was made in the context and is alive now.
        peak: the most of it since the last :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self.add(each.untyped_storage())
        return made

    def add(self, storage: Any) -> None:
        """Count a storage, unless it is known."""
        key = storage._cdata
        if key in self.storages:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self.storages[key]
            self.live -= size

        self.storages[key] = (weakref.ref(storage, freed), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.live
