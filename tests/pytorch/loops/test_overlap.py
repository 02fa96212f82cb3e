"""Batches that are copied on a stream of their own: what decides about it. That it runs beside a step is checked on a GPU (tests/gpu)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import Numbers, Weight, quiet

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.overlap import AHEAD, WORTHWHILE, OverlappedTransfer, Reading, is_large, is_on, is_recorded

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


class Graph:
    """A batch that moves itself, as those of graph libraries do."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Graph:
        return Graph(self.x.to(device))


@dataclass
class Fields:
    x: Any
    name: str = "a"


class Recorded(Tensor):
    """A tensor that says that it lies on a GPU, and counts who tells the allocator of it."""

    times = 0
    is_cuda = True

    def record_stream(self, stream: Any) -> None:
        Recorded.times += 1


def on_gpu() -> Tensor:
    return torch.ones(1).as_subclass(Recorded)


@pytest.mark.parametrize(
    ("batch", "known", "times"),
    [
        (lambda: on_gpu(), True, 1),
        (lambda: {"a": [on_gpu(), (on_gpu(), "text")], "p": Pair(on_gpu(), Own(z=on_gpu())), "n": 3, "none": None}, True, 4),
        (lambda: Fields([on_gpu(), Fields(on_gpu())]), True, 2),
        (lambda: (on_gpu(), torch.ones(1)), True, 1),  # the second one stayed on the host
        (lambda: [Graph(torch.ones(1)), on_gpu()], False, 1),
        (lambda: (torch.ones(2).to_sparse(), on_gpu()), False, 1),
        (lambda: Graph(torch.ones(1)), False, 0),
    ],
)
def test_the_allocator_is_told_of_all_tensors_that_can_be_found(batch: Any, known: bool, times: int) -> None:
    Recorded.times = 0
    stream: Any = None
    assert is_recorded(batch(), stream) is known
    assert Recorded.times == times


def test_what_the_allocator_is_not_told_of_is_kept_until_its_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []  # the steps whose end was waited for

    class Event:
        def __init__(self, blocking: bool) -> None:
            self.step: int | None = None

        def synchronize(self) -> None:
            if self.step is not None:
                assert [reference() is None for reference in references[: self.step]] == [True] * self.step
                assert references[self.step]() is not None  # not let go of before
                done.append(self.step)

        def record(self, stream: Any) -> None:
            self.step = len(references) - 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("lightning.pytorch.loops.overlap.stream_for_copies", lambda device: None)
    transfer = OverlappedTransfer(lambda batch: batch, CPU)
    references: list[Any] = []
    stream: Any = None
    for _ in range(6):
        if references:
            transfer.hold_back(stream)
        batch = Graph(torch.ones(1))
        references.append(weakref.ref(batch))
        transfer.kept = batch
        del batch
    assert done == [0, 1, 2]
    assert [reference() is None for reference in references] == [True] * 3 + [False] * 3
    assert AHEAD == 2


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
