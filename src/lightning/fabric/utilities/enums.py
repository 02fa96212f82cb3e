"""String enums that compare equal to their values whatever the case."""

from __future__ import annotations

from enum import Enum


class LightningEnum(str, Enum):
    """A string enum: ``Member == "member"`` holds in any case of letters, and members hash like their lower-case value.

    Example::

        >>> class Colour(LightningEnum):
        ...     RED = "red"
        >>> Colour.RED == "Red", Colour.from_str("RED") is Colour.RED
        (True, True)
    """

    @classmethod
    def from_str(cls, value: str) -> LightningEnum:
        """Return the member whose name or value is ``value``, in any case of letters.

        Raises:
            ValueError: if there is no such member.
        """
        for member in cls:
            if value.lower().replace("-", "_") in (member.value.lower().replace("-", "_"), member.name.lower()):
                return member
        raise ValueError(f"{value!r} is not one of {[member.value for member in cls]}")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum):
            other = other.value
        return isinstance(other, str) and self.value.lower() == other.lower()

    def __ne__(self, other: object) -> bool:
        return not self == other  # else that of str would be used, which knows nothing of case

    def __hash__(self) -> int:
        return hash(self.value.lower())

    def __str__(self) -> str:
        return str(self.value)
