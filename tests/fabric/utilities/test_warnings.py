"""Warning categories."""

from __future__ import annotations

import warnings

from lightning.fabric.utilities.warnings import PossibleUserWarning, disable_possible_user_warnings


def caught(module: str = "") -> list[str]:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        disable_possible_user_warnings(module)
        warnings.warn("possible", PossibleUserWarning, stacklevel=1)
        warnings.warn("certain", UserWarning, stacklevel=1)
    return [str(record.message) for record in records]


def test_possible_user_warnings_are_user_warnings() -> None:
    assert issubclass(PossibleUserWarning, UserWarning)


def test_they_alone_are_silenced() -> None:
    assert caught() == ["certain"]


def test_they_are_silenced_for_one_module() -> None:
    assert caught(__name__.replace(".", r"\.")) == ["certain"]
    assert caught("some_other_module") == ["possible", "certain"]
