"""Batches that are copied on a stream of their own: what decides about it. That it runs beside a step is checked on a GPU (tests/gpu)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import Numbers, Weight, quiet

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.overlap import WORTHWHILE, Reading, is_large, is_on, tensors_in

META, CPU = torch.device("meta"), torch.device("cpu")


class Pair(NamedTuple):
    x: Tensor
    y: Any


class Own(Mapping[str, Any]):
    def __init__(self, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


@pytest.mark.parametrize(
    "make", [lambda t: t, lambda t: [t], lambda t: (t, 1), lambda t: {"a": [t]}, lambda t: Pair(t, "b"), lambda t: Own(a=t)]
)
def test_the_first_tensor_says_where_a_batch_is(make: Any) -> None:
    assert is_on(make(torch.ones(1)), CPU)
    assert not is_on(make(torch.ones(1)), META)


@pytest.mark.parametrize("batch", [[], {}, "text", None, ["text"], SimpleNamespace()])
def test_a_batch_without_a_tensor_is_nowhere(batch: Any) -> None:
    assert not is_on(batch, CPU)


def test_all_tensors_of_nested_batches_are_found() -> None:
    a, b, c, d = (torch.full((1,), float(index)) for index in range(4))
    batch = {"a": [a, (b, "text")], "p": Pair(c, Own(z=d)), "n": 3}
    assert [each.item() for each in tensors_in(batch)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "make", [lambda t: t, lambda t: [1, t], lambda t: (t, 1), lambda t: {"a": [{"b": t}]}, lambda t: Pair(1, t), lambda t: Own(a=1, b=t)]
)
def test_a_batch_is_large_where_one_of_its_tensors_is(make: Any) -> None:
    assert is_large(make(torch.empty(WORTHWHILE, dtype=torch.uint8)))
    assert is_large(make(torch.empty(WORTHWHILE // 4)))
    assert not is_large(make(torch.empty(WORTHWHILE // 4 - 1)))


@pytest.mark.parametrize("batch", [[], {}, "text", None, ["text"], SimpleNamespace()])
def test_a_batch_without_a_tensor_is_not_large(batch: Any) -> None:
    assert not is_large(batch)


def test_a_transfer_that_only_copies_reads_nothing_of_the_device() -> None:
    with Reading(META) as reading:
        moved = torch.ones(3).to(META)
        (moved + 1).square()
    assert reading.found is None


def test_a_transfer_that_computes_with_older_tensors_of_the_device_is_noticed() -> None:
    mean = torch.ones(3, device=META)
    with Reading(META) as reading:
        torch.ones(3).to(META) - mean
    assert reading.found == "aten.sub.Tensor"


def test_on_the_cpu_it_changes_nothing() -> None:
    first, second = Weight(), Weight()
    quiet().fit(first, torch.utils.data.DataLoader(Numbers(4)))
    quiet(overlap_transfer=True).fit(second, torch.utils.data.DataLoader(Numbers(4)))
    assert [p.tolist() for p in first.parameters()] == [p.tolist() for p in second.parameters()]


def test_other_values_are_errors() -> None:
    with pytest.raises(MisconfigurationException, match="overlap_transfer="):
        quiet(overlap_transfer="yes")
