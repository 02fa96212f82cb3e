"""Checkpoints of runs on XLA devices, which hold nothing but CPU tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning.fabric.accelerators.xla import has_torch_xla
from lightning.fabric.checkpoint.io import PathLike, TorchCheckpointIO
from lightning.fabric.utilities.apply_func import apply_to_collection


class XLACheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whose tensors may be on XLA devices: copies on the CPU are saved, which any machine can load.

    The strategies for XLA make such copies for every CheckpointIO. This one is for checkpoints that are saved by hand.

    Raises:
        ModuleNotFoundError: without ``torch_xla``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not has_torch_xla():
            raise ModuleNotFoundError('XLACheckpointIO needs the package torch_xla: `pip install "torch_xla[tpu]"`.')

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any = None) -> None:
        super().save_checkpoint(on_cpu(checkpoint), path, storage_options=storage_options)


def on_cpu(data: Any) -> Any:
    """Return ``data``, a nested collection, with copies on the CPU in place of the tensors on XLA devices.

    Example::

        >>> import torch
        >>> weight = torch.ones(2)
        >>> on_cpu({"weight": weight})["weight"] is weight
        True
    """
    return apply_to_collection(data, Tensor, lambda tensor: tensor.detach().cpu() if tensor.device.type == "xla" else tensor)
