"""Loaders whose data come one after the other: continued by their own state, or read again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from interrupted_loaders import Augmented, Stream, StreamWithState, check_every_interruption, loader_of

from lightning.fabric.utilities.loader_state import ResumableLoader

READ_AGAIN = "ignore:The .*can't tell where it is"


class Batches:
    """No DataLoader: an iterable of batches, some of it random."""

    def __init__(self) -> None:
        self.generator = random.Random(3)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(5):
            yield torch.tensor([i, self.generator.random()], dtype=torch.float64)


class BatchesWithState(Batches):
    """The same with a place that it can tell."""

    next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.next < 5:
            self.next += 1
            yield torch.tensor([self.next - 1, self.generator.random()], dtype=torch.float64)
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "generator": list(self.generator.getstate())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]
        version, words, gauss = state["generator"]
        self.generator.setstate((version, tuple(words), gauss))


class Doubled(DataLoader[Any]):
    """A DataLoader with a way of its own to iterate."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (2 * batch for batch in super().__iter__())


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_dataset_with_a_state_goes_on_by_itself(ahead: int) -> None:
    check_every_interruption(loader_of(StreamWithState, batch_size=3), ahead=ahead)


def test_a_dataset_with_a_state_reads_nothing_again() -> None:
    loader = ResumableLoader(DataLoader(StreamWithState(), batch_size=2))
    batches = iter(loader)
    next(batches), next(batches)
    other = StreamWithState()
    resumed = ResumableLoader(DataLoader(other, batch_size=2))
    resumed.load_state_dict(loader.state_dict())
    assert [batch[:, 0].tolist() for batch in resumed] == [[4, 5], [6, 7], [8, 9]]
    assert other.loaded == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_loader_with_a_state_goes_on_by_itself(ahead: int) -> None:
    check_every_interruption(BatchesWithState, ahead=ahead)


@pytest.mark.filterwarnings(READ_AGAIN)
@pytest.mark.filterwarnings("ignore:The .*draws random numbers in the process that trains")
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("make", [loader_of(Stream, batch_size=3), Batches])
def test_others_are_read_again(make: Any, ahead: int) -> None:
    check_every_interruption(make, ahead=ahead)


@pytest.mark.filterwarnings(READ_AGAIN)
@pytest.mark.parametrize("ahead", [0, 1])
def test_workers_that_read_a_stream_draw_the_same_numbers_again(ahead: int) -> None:
    check_every_interruption(loader_of(Stream, batch_size=2, num_workers=2), ahead=ahead)


@pytest.mark.filterwarnings(READ_AGAIN)
def test_a_loader_that_iterates_in_its_own_way_is_read_again() -> None:
    check_every_interruption(lambda: Doubled(Augmented(), batch_size=3, shuffle=True, num_workers=2))


def test_reading_again_is_told_with_its_cost() -> None:
    loader = ResumableLoader(Batches())
    batches = iter(loader)
    next(batches), next(batches)
    resumed = ResumableLoader(Batches())
    resumed.load_state_dict(loader.state_dict())
    with pytest.warns(UserWarning, match=r"2 batch\(es\) were read again to come to the same place, which took \d+\.\d s"):
        assert [int(batch[0]) for batch in resumed] == [2, 3, 4]


def test_an_iterator_is_told_that_it_must_begin_anew() -> None:
    loader = ResumableLoader(iter([1, 2, 3]))
    next(iter(loader))
    resumed = ResumableLoader(iter([1, 2, 3]))
    resumed.load_state_dict(loader.state_dict())
    with pytest.warns(UserWarning, match="It is an iterator, which can't begin anew: what it gives now must be its first batches"):
        assert list(resumed) == [2, 3]


def test_fewer_batches_than_were_given_are_told() -> None:
    loader = ResumableLoader([1, 2, 3])
    batches = iter(loader)
    next(batches), next(batches), next(batches)
    resumed = ResumableLoader([1, 2])
    resumed.load_state_dict(loader.state_dict(3))
    with pytest.warns(UserWarning, match="gives 2 batches, fewer than the 3 that were given before: the epoch ends here"):
        assert list(resumed) == []
