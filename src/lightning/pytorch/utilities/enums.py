"""String enums of the trainer's arguments."""

from __future__ import annotations

from lightning.fabric.utilities.enums import LightningEnum

__all__ = ["GradClipAlgorithmType", "LightningEnum"]


class GradClipAlgorithmType(LightningEnum):
    """How gradients are clipped: each value on its own, or all of them by their common norm.

    Example::

        >>> GradClipAlgorithmType.NORM == "norm", GradClipAlgorithmType.supported_types()
        (True, ['value', 'norm'])
    """

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Whether ``val`` is the name of an algorithm, in exactly this spelling."""
        return val in GradClipAlgorithmType.supported_types()

    @staticmethod
    def supported_types() -> list[str]:
        """The names of the algorithms."""
        return [member.value for member in GradClipAlgorithmType]
