"""Norms of gradients."""

from __future__ import annotations

import torch
from torch.nn import Module

__all__ = ["grad_norm"]


def grad_norm(module: Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, torch.Tensor]:
    """The norm of each parameter's gradient, and that of all of them together, ready for ``self.log_dict``.

    Nothing is read back from the device: the values are tensors. Parameters without a gradient are left out.

    Args:
        module: whose parameters to look at.
        norm_type: the order ``p`` of the norm, above 0; ``"inf"`` for the largest absolute value.
        group_separator: stands between ``grad_{p}_norm`` and the parameter's name, so that loggers group them.

    Returns:
        ``{"grad_2.0_norm/layer.weight": ..., ..., "grad_2.0_norm_total": ...}``; empty without gradients.

    Raises:
        ValueError: if ``norm_type`` is not above 0, or not a number.

    Example::

        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([[3.0, 4.0]])).backward()
        >>> grad_norm(layer, 2)
        {'grad_2.0_norm/weight': tensor(5.), 'grad_2.0_norm_total': tensor(5.)}
    """
    try:
        order = float(norm_type)
    except (TypeError, ValueError):
        order = 0.0
    if not order > 0:
        raise ValueError(f"grad_norm(norm_type={norm_type!r}): the order of the norm must be a number above 0, or 'inf'.")
    prefix = f"grad_{order}_norm"
    norms = {
        f"{prefix}{group_separator}{name}": torch.linalg.vector_norm(parameter.grad.detach(), order)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        norms[f"{prefix}_total"] = torch.linalg.vector_norm(torch.stack(list(norms.values())), order)
    return norms
