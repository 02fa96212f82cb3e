"""What counts as an optimizer, a process group, something with a state."""

from __future__ import annotations

from typing import Any

import torch

from lightning.fabric.utilities.types import CollectibleGroup, Optimizable, Steppable, _Stateful


class OnlySteps:
    def step(self, closure: Any = None) -> None: ...


class Group:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_optimizer_is_steppable_optimizable_and_stateful() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)])
    assert isinstance(optimizer, Steppable)
    assert isinstance(optimizer, Optimizable)
    assert isinstance(optimizer, _Stateful)


def test_object_with_step_alone_is_not_optimizable() -> None:
    assert isinstance(OnlySteps(), Steppable)
    assert not isinstance(OnlySteps(), Optimizable)
    assert not isinstance(OnlySteps(), _Stateful)


def test_group_has_size_and_rank() -> None:
    assert isinstance(Group(), CollectibleGroup)
    assert not isinstance(OnlySteps(), CollectibleGroup)
