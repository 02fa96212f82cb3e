"""The precision of FSDP under its documented name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module

from lightning.fabric.precision import POLICIES, MixedPrecision, TruePrecision

ACCEPTED = ("32-true", "16-true", "bf16-true", "64-true", "16-mixed", "bf16-mixed")


class FSDPPrecision(MixedPrecision):
    """What ``FSDPStrategy`` computes with; the same as ``Trainer(precision=...)`` with the name alone.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"bf16-true"``, ``"64-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.
        scaler: a scaler of your own for ``"16-mixed"``.

    Raises:
        ValueError: for another precision, or a scaler with one that needs none.
    """

    def __init__(self, precision: str, scaler: GradScaler | None = None) -> None:
        if precision not in ACCEPTED:
            raise ValueError(f"FSDPPrecision(precision={precision!r}) is not known. Accepted: {', '.join(map(repr, ACCEPTED))}.")
        if scaler is not None and precision != "16-mixed":
            raise ValueError(f"precision={precision!r} scales no gradients; leave out scaler={scaler!r}, or use '16-mixed'.")
        self._true = None if POLICIES[precision].autocast else TruePrecision(precision)
        if self._true is None:
            super().__init__(precision, "cuda" if torch.cuda.is_available() else "cpu", scaler)
        else:
            self.precision, self.policy = precision, POLICIES[precision]

    @property
    def mixed_precision_config(self) -> Any:
        """The ``MixedPrecisionPolicy`` that weights are gathered and gradients are reduced in, on GPUs."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = self.policy
        return MixedPrecisionPolicy(policy.compute_dtype, policy.reduce_dtype, None, False) if policy.autocast else MixedPrecisionPolicy()

    def convert_module(self, module: Module) -> Module:
        return module if self._true is None or self.precision == "32-true" else self._true.convert_module(module)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return super().tensor_init_context() if self._true is None else self._true.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        return super().forward_context() if self._true is None else self._true.forward_context()

    def convert_input(self, data: Any) -> Any:
        return super().convert_input(data) if self._true is None or self.precision == "32-true" else self._true.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return super().convert_output(data) if self._true is None else self._true.convert_output(data)
