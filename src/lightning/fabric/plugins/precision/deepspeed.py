"""Precision under DeepSpeed, whose engine keeps the float32 copy of the weights and scales the loss itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning.fabric.precision import NO_CONTEXT, POLICIES, DefaultDtype, HalfPrecision, MixedPrecision, Precision, convert_floating
from lightning.fabric.utilities.apply_func import apply_to_collection

PRECISIONS = ("32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed")


class DeepSpeedPrecision(Precision):
    """The numbers of a run under :class:`~lightning.fabric.strategies.deepspeed.DeepSpeedStrategy`.

    ``"16-mixed"`` and ``"bf16-mixed"`` mean what DeepSpeed means by them: the module and its inputs are in 16 bits, without
    autocast, and the optimizer updates a float32 copy of the weights. With ``"16-true"`` and ``"bf16-true"`` the module is
    built in 16 bits as well, so that this copy starts from rounded weights.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.

    Raises:
        ValueError: if it is another.

    Example::

        >>> DeepSpeedPrecision("bf16-mixed").convert_input(torch.ones(1)).dtype
        torch.bfloat16
    """

    def __init__(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} does not run under DeepSpeed. Accepted: {', '.join(map(repr, PRECISIONS))}.")
        self.precision = precision
        # What scales and casts is the engine: nobody else may.
        self.policy = replace(POLICIES[precision], autocast=False, scaler=False)
        self.default_dtype: AbstractContextManager[Any] = (
            DefaultDtype(self.policy.param_dtype) if self.policy.param_dtype != torch.float32 else NO_CONTEXT
        )
        self.scale_loss: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, precision: Precision | None) -> DeepSpeedPrecision:
        """The precision under DeepSpeed that another one of the same name means; None means 32 bits.

        Raises:
            ValueError: if there is none, or the other one is of a class of its own.
        """
        if precision is None or isinstance(precision, DeepSpeedPrecision):
            return precision or cls("32-true")
        if type(precision) not in (Precision, HalfPrecision, MixedPrecision):
            raise ValueError(
                f"The precision {type(precision).__name__} ({precision.precision!r}) does not run under DeepSpeed, whose engine casts "
                f"weights and scales the loss itself. Use {', '.join(map(repr, PRECISIONS))}."
            )
        return cls(precision.precision)

    def convert_module(self, module: Module) -> Module:
        dtype = self.policy.param_dtype
        if dtype != torch.float32:
            module._apply(lambda tensor: convert_floating(tensor, dtype))
        return module

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.default_dtype

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self.default_dtype

    def convert_input(self, data: Any) -> Any:
        return apply_to_collection(data, Tensor, convert_floating, self.policy.compute_dtype)

    def pre_backward(self, tensor: Tensor, module: Module | None = None) -> Tensor:
        """Return the loss scaled by the engine, for a ``LightningModule.backward`` that differentiates it by itself."""
        return tensor if self.scale_loss is None else self.scale_loss(tensor)
