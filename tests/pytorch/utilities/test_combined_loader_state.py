"""CombinedLoader over loaders that have a state: it continues where it was."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning.pytorch.utilities.combined_loader import CombinedLoader

MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]


class UnsizedStream:
    """A loader that knows where it is; a state from after its end starts it anew."""

    def __init__(self, values: range) -> None:
        self.values, self.place, self.finished, self.loaded = values, 0, False, False

    def __iter__(self) -> Iterator[int]:
        if self.finished or not self.loaded:
            self.place = 0
        self.loaded = self.finished = False
        return self.read()

    def read(self) -> Iterator[int]:
        while self.place < len(self.values):
            self.place += 1
            yield self.values[self.place - 1]
        self.finished = True

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "finished": self.finished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.place, self.finished, self.loaded = state_dict["place"], state_dict["finished"], True


class Stream(UnsizedStream):
    def __len__(self) -> int:
        return len(self.values)


def loaders(mixed: bool, stream: type[UnsizedStream] = Stream) -> list[Any]:
    return [stream(range(2)), range(10, 13) if mixed else stream(range(10, 13)), stream(range(20, 25))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("limits", [None, 2, [2, 1, 4]])
@pytest.mark.parametrize("stream", [Stream, UnsizedStream])
def test_continues_after_every_batch(mode: Any, mixed: bool, limits: Any, stream: type[UnsizedStream]) -> None:
    def make() -> CombinedLoader:
        loader = CombinedLoader(loaders(mixed, stream), mode)
        loader.limits = limits
        return loader

    whole = list(make())
    for stop in range(len(whole)):
        first, second = make(), make()
        iterator = iter(first)
        before = [next(iterator) for _ in range(stop)]
        second.load_state_dict(first.state_dict())
        assert before + list(second) == whole
        assert list(second) == whole  # once only: the next iteration starts anew


@pytest.mark.parametrize("mode", MODES)
def test_state_at_the_end_of_an_iteration_starts_the_next_one(mode: Any) -> None:
    first = CombinedLoader([range(3), Stream(range(4))], mode)
    whole = list(first)
    second = CombinedLoader([range(3), Stream(range(4))], mode)
    second.load_state_dict(first.state_dict())
    assert list(second) == whole


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limits", [None, 2])
def test_state_after_the_last_batch_starts_the_next_iteration(mode: Any, limits: Any) -> None:
    def make() -> CombinedLoader:
        loader = CombinedLoader(loaders(mixed=False), mode)
        loader.limits = limits
        return loader

    whole = list(make())
    for asked_for_more in (True, False):
        first, second = make(), make()
        iterator = iter(first)
        for _ in whole:
            next(iterator)
        if asked_for_more:
            assert next(iterator, None) is None
        second.load_state_dict(first.state_dict())
        assert list(second) == whole


def test_state_that_was_loaded_and_not_used_is_given_back() -> None:
    first, second, third = (CombinedLoader(loaders(mixed=True), "sequential") for _ in range(3))
    iterator = iter(first)
    before = [next(iterator) for _ in range(3)]
    second.load_state_dict(first.state_dict())
    third.load_state_dict(second.state_dict())
    assert before + list(third) == list(CombinedLoader(loaders(mixed=True), "sequential"))


def test_state_of_loaders_that_were_not_started_is_not_asked_for() -> None:
    loader = CombinedLoader([Stream(range(3)), Stream(range(5))], "sequential")
    assert loader.state_dict()["loaders"] == [None, None]
    next(iter(loader))
    assert loader.state_dict()["loaders"] == [{"place": 1, "finished": False}, None]


def test_state_can_be_saved_and_loaded_with_weights_only() -> None:
    loader = CombinedLoader(loaders(mixed=True))
    next(iter(loader))
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == loader.state_dict()
    assert loader.state_dict()["loaders"] == [{"place": 1, "finished": False}] * 2


def test_state_is_empty_where_no_loader_has_one() -> None:
    loader = CombinedLoader([range(3)])
    next(iter(loader))
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    assert len(list(loader)) == 3


def test_bare_list_of_states_is_given_to_the_loaders() -> None:
    loader = CombinedLoader([Stream(range(3)), range(3), Stream(range(5))], "sequential")
    loader.load_state_dict([{"place": 2, "finished": False}, {"place": 4, "finished": False}])
    assert [batch for batch, _, _ in loader] == [2, 0, 1, 2, 4]


@pytest.mark.parametrize("states", [[{}], [{}, {}, {}]])
def test_other_number_of_states_raises(states: list[dict[str, Any]]) -> None:
    loader = CombinedLoader([Stream(range(3)), range(3), Stream(range(5))])
    with pytest.raises(RuntimeError, match=rf"states of {len(states)} loaders, and 2 of this CombinedLoader's 3"):
        loader.load_state_dict(states)


def test_other_number_of_loaders_raises() -> None:
    state = CombinedLoader([Stream(range(3)), range(3)]).state_dict()
    with pytest.raises(RuntimeError, match="written with 2 loaders, and this CombinedLoader has 1"):
        CombinedLoader([Stream(range(3))]).load_state_dict(state)
