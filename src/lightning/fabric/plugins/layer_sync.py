"""Layers that share their statistics among processes: synchronised batch normalisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.fabric.utilities.rank_zero import rank_zero_warn

__all__ = ["HostSyncBatchNorm", "LayerSync", "TorchSyncBatchNorm"]


class LayerSync(ABC):
    """Puts layers that share their statistics in the place of others, and back. Derive from it for layers of your own."""

    @abstractmethod
    def apply(self, model: Module) -> Module:
        """Return ``model`` with its layers replaced, before it is wrapped."""

    @abstractmethod
    def revert(self, model: Module) -> Module:
        """Return ``model`` with the layers that it had before."""


class TorchSyncBatchNorm(LayerSync):
    """Every batch normalisation uses the statistics of the batches of all processes.

    Parameters, buffers, hooks and names stay; :meth:`revert` gives each layer the class back that it had. The layers become
    torch's own ``SyncBatchNorm``, and, where processes compute on the CPU, which that does not serve, :class:`HostSyncBatchNorm`.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        >>> synced = TorchSyncBatchNorm().apply(model)
        >>> isinstance(synced[1], torch.nn.SyncBatchNorm), type(TorchSyncBatchNorm().revert(synced)[1]).__name__
        (True, 'BatchNorm2d')
    """

    def apply(self, model: Module) -> Module:
        """Return ``model``, which is on its device already, with synchronised layers in the place of batch normalisation."""
        return _replaced(model, _synced, {})

    def revert(self, model: Module) -> Module:
        """Return ``model`` with the layers that :meth:`apply` replaced; those that were synchronised before it stay so."""
        return _replaced(model, _unsynced, {})


class HostSyncBatchNorm(_BatchNorm):
    """What torch's ``SyncBatchNorm`` computes, with two all-reduces, on any device.

    A process may come with an empty batch: it takes part, and counts nothing. It is no ``torch.nn.SyncBatchNorm``, because
    DistributedDataParallel refuses those on the CPU.
    """

    process_group: Any

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not _distributed_is_initialized():
            return super().forward(input)
        return self._forward_together(input, self.process_group or torch.distributed.group.WORLD)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"Batch normalisation needs an input of at least 2 dimensions, and got {input.dim()}.")

    def _forward_together(self, input: Tensor, group: Any) -> Tensor:
        self._check_input_dim(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        mine = wide.new_tensor([input.numel() // input.size(1)])
        total: Tensor = _SumOverProcesses.apply(torch.cat([wide.sum(dims), mine]), group)
        mean, count = total[:-1] / total[-1], total[-1]
        centred = wide - mean.view(shape)
        variance: Tensor = _SumOverProcesses.apply(centred.square().sum(dims), group) / count
        if count == 1:
            raise ValueError(
                f"SyncBatchNorm: expected more than 1 value per channel over all processes, got the input {list(input.shape)}."
            )
        self._track(mean.detach(), (variance * count / (count - 1)).detach())
        output = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes through which gradients flow: each process's result depends on the inputs of all."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        summed = tensor.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.contiguous().clone()
        torch.distributed.all_reduce(summed, group=ctx.group)
        return summed, None


def _synced(layer: Module) -> Module:
    if not isinstance(layer, _BatchNorm) or isinstance(layer, (torch.nn.SyncBatchNorm, HostSyncBatchNorm)):
        return layer
    if type(layer).forward is not _BatchNorm.forward:
        rank_zero_warn(
            f"sync_batchnorm: the layer {type(layer).__name__} has a `forward` of its own, which a synchronised layer would not run; "
            "it stays as it is, with the statistics of each process alone."
        )
        return layer
    if isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
        raise ValueError(
            f"sync_batchnorm: the layer {type(layer).__name__} has not seen a batch, so its size is not known. Run one through the model "
            "first, or use BatchNorm1d, BatchNorm2d or BatchNorm3d."
        )
    on_host = _distributed_is_initialized() and all(tensor.device.type == "cpu" for tensor in [*layer.parameters(), *layer.buffers()])
    synced = _with_class(layer, HostSyncBatchNorm if on_host else torch.nn.SyncBatchNorm)
    vars(synced).update(process_group=None, unsynced_class=type(layer))
    return synced


def _unsynced(layer: Module) -> Module:
    if "unsynced_class" not in vars(layer):
        return layer
    unsynced = _with_class(layer, vars(layer)["unsynced_class"])
    for name in ("process_group", "unsynced_class"):
        del vars(unsynced)[name]
    return unsynced


def _with_class(layer: Module, kind: type[Module]) -> Module:
    """A layer of another class that shares everything with ``layer``: parameters, buffers, hooks."""
    other = kind.__new__(kind)
    vars(other).update(vars(layer))
    return other


def _replaced(module: Module, replace: Any, done: dict[Module, Module]) -> Module:
    """``replace`` every layer below ``module``; one that stands in two places stays one."""
    if module in done:
        return done[module]
    result: Module = replace(module)
    done[module] = result
    for name, child in module.named_children():
        other = _replaced(child, replace, done)
        if other is not child:
            module._modules[name] = other
    return result
