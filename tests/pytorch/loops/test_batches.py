"""Batches on their way to a step: which is the last, how often the loader is asked, and what a step may be called with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loops.batches import counted, looked_ahead, parameters_of, step_with_index


class Asked:
    """An iterable of numbers that counts how many it was asked for, and whether it was read to its end."""

    def __init__(self, length: int) -> None:
        self.length, self.given, self.exhausted = length, 0, False

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.given += 1
            yield number
        self.exhausted = True


@pytest.mark.parametrize("source", [counted, looked_ahead])
@pytest.mark.parametrize(("start", "stop", "expected"), [(0, 4, [0, 1, 2, 3]), (2, 4, [2, 3]), (0, 2, [0, 1]), (1, 2, [1]), (3, 4, [3])])
def test_batches_from_start_to_stop_with_the_last_marked(source: Any, start: int, stop: int, expected: list[int]) -> None:
    found = list(source(Asked(4), start, stop, lambda batch: batch * 10))
    assert found == [(number * 10, number == stop - 1) for number in expected]


def test_counted_batches_are_fetched_when_they_are_needed() -> None:
    loader = Asked(4)
    batches = counted(loader, 0, 4, lambda batch: batch)
    for taken in range(1, 5):
        next(batches)
        assert loader.given == taken


@pytest.mark.parametrize(("stop", "exhausted"), [(4, True), (3, False)])
def test_loader_is_read_to_its_end_unless_it_is_limited(stop: int, exhausted: bool) -> None:
    loader = Asked(4)
    list(counted(loader, 0, stop, lambda batch: batch))
    assert loader.exhausted is exhausted
    assert loader.given == stop


def test_one_batch_is_looked_ahead_and_moved_only_when_it_is_its_turn() -> None:
    loader, moved = Asked(4), []
    batches = looked_ahead(loader, 0, float("inf"), moved.append)
    next(batches)
    assert (loader.given, moved) == (2, [0])
    next(batches)
    assert (loader.given, moved) == (3, [0, 1])


def test_look_ahead_stops_at_the_limit() -> None:
    loader = Asked(4)
    assert [is_last for _, is_last in looked_ahead(loader, 0, 3, lambda batch: batch)] == [False, False, True]
    assert loader.given == 3


def test_loader_without_batches_is_refused_and_one_that_is_through_is_not() -> None:
    with pytest.raises(MisconfigurationException, match=r"a list_iterator, gave no batch"):
        list(looked_ahead(iter([]), 0, float("inf"), lambda batch: batch))
    assert list(looked_ahead([1, 2], 2, float("inf"), lambda batch: batch)) == []


def test_step_is_called_with_or_without_the_index_whatever_its_parameters_are_called() -> None:
    steps: list[Any] = [lambda x: x, lambda x, y: (x, y), lambda x, anything=None: (x, anything), lambda *args: args]
    assert [step_with_index(step, "training_step")(5, 7) for step in steps] == [5, (5, 7), (5, 7), (5, 7)]


def test_step_that_takes_no_batch_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="`training_step` takes no batch"):
        step_with_index(lambda: None, "training_step")
    with pytest.raises(MisconfigurationException, match="dataloader_iter"):
        step_with_index(lambda dataloader_iter: None, "training_step")


def test_parameters_of_a_function_without_a_signature_may_be_anything() -> None:
    assert parameters_of(min)[1]
    assert parameters_of(lambda a, b=1, *, c=2: None) == (2, False, ["a", "b", "c"])
