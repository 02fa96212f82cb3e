"""Class methods that refuse to be called on an instance."""

from __future__ import annotations

import inspect

import pytest

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core.class_only import class_only


class Base:
    @class_only
    def build(cls, size: int = 1) -> tuple[type, int]:
        """Build it."""
        return cls, size


class Derived(Base):
    pass


def test_it_is_a_class_method_of_the_class_it_is_called_on() -> None:
    assert Base.build(size=2) == (Base, 2)
    assert Derived.build() == (Derived, 1)


def test_it_keeps_name_documentation_and_signature() -> None:
    assert (Base.build.__name__, Base.build.__doc__) == ("build", "Build it.")
    assert list(inspect.signature(Base.build).parameters) == ["size"]


def test_looking_it_up_on_an_instance_is_allowed_and_calling_it_is_not() -> None:
    found = Derived().build
    assert callable(found)
    with pytest.raises(TypeError, match=r"`Derived\.build` makes a new object and cannot be called on an instance"):
        found(size=3)


@pytest.mark.parametrize("owner", [LightningModule(), LightningDataModule()])
def test_loading_a_checkpoint_on_an_instance_is_refused(owner: LightningModule | LightningDataModule) -> None:
    name = type(owner).__name__
    with pytest.raises(TypeError, match=f"`{name}.load_from_checkpoint` makes a new object.*keep what it returns"):
        owner.load_from_checkpoint("any.ckpt")
