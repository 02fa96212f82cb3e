"""The precisions of XLA devices."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from lightning.fabric.accelerators.xla import has_torch_xla
from lightning.fabric.precision import TruePrecision

ACCEPTED = ("32-true", "16-true", "bf16-true")


class XLAPrecision(TruePrecision):
    """Full or half precision on XLA devices.

    Half precision converts the module and its inputs. The environment variables ``XLA_USE_BF16`` and ``XLA_USE_F16``, which
    did this behind PyTorch's back, have no effect in today's torch_xla.

    Args:
        precision: ``"32-true"``, ``"16-true"`` or ``"bf16-true"``.

    Raises:
        ModuleNotFoundError: without ``torch_xla``.
        ValueError: for another precision.
    """

    def __init__(self, precision: str = "32-true") -> None:
        if not has_torch_xla():
            raise ModuleNotFoundError('XLAPrecision needs the package torch_xla: `pip install "torch_xla[tpu]"`.')
        if precision not in ACCEPTED:
            raise ValueError(f"XLAPrecision(precision={precision!r}) is not known. Accepted: {', '.join(map(repr, ACCEPTED))}.")
        super().__init__(precision)

    def convert_module(self, module: Module) -> Module:
        return module if self.precision == "32-true" else super().convert_module(module)

    def convert_input(self, data: Any) -> Any:
        return data if self.precision == "32-true" else super().convert_input(data)
