"""``Trainer(gc_interval=...)``: garbage is collected between batches, and at no other time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import Numbers, Weight, quiet

from lightning.fabric.utilities.exceptions import MisconfigurationException


class Littering(Weight):
    """Makes so many objects in cycles that Python would collect in each step; notes when it is collected, and between which steps."""

    def __init__(self) -> None:
        super().__init__()
        self.within = False
        self.events: list[tuple[int, bool]] = []  # the step, and whether it was going on
        self.steps = 0

    def noting(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self.events.append((self.steps, self.within))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.within = True
        for _ in range(3000):
            cycle: list[Any] = []
            cycle.append(cycle)
        loss = super().training_step(batch, batch_idx)
        self.within = False
        self.steps += 1
        return loss


@pytest.fixture
def littering() -> Iterator[Littering]:
    model = Littering()
    gc.callbacks.append(model.noting)
    yield model
    gc.callbacks.remove(model.noting)


def loader(count: int = 12) -> Any:
    return torch.utils.data.DataLoader(Numbers(count))


@pytest.fixture(scope="module", autouse=True)
def frozen_again() -> Iterator[None]:
    """As tests/conftest.py has left it: runs with ``gc_interval`` end with everything that was frozen let go of."""
    yield
    gc.collect()
    gc.freeze()


def test_python_collects_within_steps(littering: Littering) -> None:
    quiet().fit(littering, loader())
    assert any(within for _, within in littering.events)


def test_collections_come_between_batches_and_at_the_interval(littering: Littering) -> None:
    quiet(max_epochs=2, gc_interval=5).fit(littering, loader())
    during = [(step, within) for step, within in littering.events if 0 < step < 24]
    assert not any(within for _, within in littering.events)
    assert [step for step, _ in during] == [5, 10, 15, 20]


def test_python_collects_again_afterwards() -> None:
    assert gc.isenabled()
    quiet(gc_interval=5).fit(Weight(), loader())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_python_collects_again_after_an_error() -> None:
    class Failing(Weight):
        def on_train_batch_end(self, *args: Any) -> None:
            assert not gc.isenabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quiet(gc_interval=5).fit(Failing(), loader())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_who_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        quiet(gc_interval=5).fit(Weight(), loader())
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("given", [0, -1, 1.5, "often"])
def test_other_values_are_errors(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match="gc_interval="):
        quiet(gc_interval=given)
