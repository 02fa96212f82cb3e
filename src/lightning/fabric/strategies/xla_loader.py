"""Batches that are read and uploaded to an XLA device in the background, while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning.fabric.utilities.apply_func import apply_to_collection, move_data_to_device

CLOSING = 10.0  # seconds that the threads of a pass may take to end


class XLALoader:
    """A loader whose batches arrive on the device, through the background threads of torch_xla's ``ParallelLoader``.

    What was recorded for one batch is sent to the device when the next one is asked for. An error of the loader is raised where the
    batches are used; torch_xla would take it for the end of the data. Everything else is asked of the loader itself.

    Args:
        loader: gives batches on the CPU: tensors, or collections of such.
        device: where they go.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # Not torch_xla's MpDeviceLoader, which leaves the threads of a pass that was not finished behind.
        source = _Source(iter(self.loader))
        uploading = _uploader(source, self.device)
        try:
            for batch in uploading.per_device_loader(self.device):
                yield batch[0]
            if source.error is not None:
                raise source.error
        finally:
            closing = threading.Thread(target=uploading.close, daemon=True)
            closing.start()
            closing.join(CLOSING)  # a thread that waits for a stream of data may never end

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.loader, name)


class _Source:
    """The batches of one pass, each in a list: torch_xla's threads take None for the end."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        try:
            for batch in self.batches:
                yield [batch]
        except BaseException as error:
            self.error = error


def _uploader(source: _Source, device: torch.device) -> Any:
    import torch_xla.core.xla_model as xm
    from torch_xla.distributed.parallel_loader import ParallelLoader

    class Uploader(ParallelLoader):  # type: ignore[misc]
        def send_cpu_data_to_device(self, batches: list[Any], device: torch.device) -> list[Any]:
            # All tensors at once, wherever they are; torch_xla's own walk knows fewer kinds of collections.
            tensors: list[Tensor] = []
            apply_to_collection(batches, Tensor, tensors.append)
            uploaded = iter(xm.send_cpu_data_to_device(tensors, device))
            batches = apply_to_collection(batches, Tensor, lambda tensor: next(uploaded))
            return [move_data_to_device(batch, device) for batch in batches]  # what has a `to` of its own

    return Uploader(source, [device])
