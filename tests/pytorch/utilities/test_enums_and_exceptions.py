"""Names that arguments and handlers use."""

from __future__ import annotations

import pytest

import lightning.fabric.utilities
import lightning.pytorch.utilities
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException


def test_gradient_clipping_algorithms() -> None:
    assert GradClipAlgorithmType.supported_types() == ["value", "norm"]
    assert GradClipAlgorithmType("norm") is GradClipAlgorithmType.NORM
    assert GradClipAlgorithmType.VALUE == "value"
    assert GradClipAlgorithmType.supported_type("norm")
    assert not GradClipAlgorithmType.supported_type("other")


def test_sigterm_ends_the_process_like_sys_exit() -> None:
    assert issubclass(SIGTERMException, SystemExit)
    assert not issubclass(SIGTERMException, Exception)


def test_misconfiguration_is_one_class_under_both_paths() -> None:
    from lightning.fabric.utilities import exceptions

    assert MisconfigurationException is exceptions.MisconfigurationException


@pytest.mark.parametrize("package", [lightning.fabric.utilities, lightning.pytorch.utilities])
def test_every_name_of_the_package_can_be_imported(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__name__ == name


@pytest.mark.parametrize("package", [lightning.fabric.utilities, lightning.pytorch.utilities])
def test_unknown_name_raises(package: object) -> None:
    with pytest.raises(AttributeError, match=r"utilities' has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018
