"""CombinedLoader: orders, structures, limits and lengths."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.utilities import CombinedLoader

MODES = ["min_size", "max_size_cycle", "max_size", "sequential"]


class Unsized:
    """An iterable without a length."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class Recorder:
    """Says when it is started, read and exhausted."""

    def __init__(self, name: str, size: int, log: list[str]) -> None:
        self.name, self.size, self.log = name, size, log

    def __iter__(self) -> Iterator[int]:
        self.log.append(f"iter {self.name}")  # at once, as a DataLoader starts its workers
        return self.read()

    def read(self) -> Iterator[int]:
        for value in range(self.size):
            self.log.append(f"next {self.name}")
            yield value
        self.log.append(f"stop {self.name}")


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [([0, 10], 0, 0), ([1, 11], 1, 0)]),
        ("max_size_cycle", [([0, 10], 0, 0), ([1, 11], 1, 0), ([0, 12], 2, 0), ([1, 13], 3, 0), ([0, 14], 4, 0)]),
        ("max_size", [([0, 10], 0, 0), ([1, 11], 1, 0), ([None, 12], 2, 0), ([None, 13], 3, 0), ([None, 14], 4, 0)]),
        ("sequential", [(0, 0, 0), (1, 1, 0), (10, 0, 1), (11, 1, 1), (12, 2, 1), (13, 3, 1), (14, 4, 1)]),
    ],
)
def test_batches_and_length_of_each_mode(mode: Any, expected: list[Any]) -> None:
    loader = CombinedLoader([range(2), range(10, 15)], mode)
    assert list(loader) == expected
    assert len(loader) == len(expected) == loader.batch_count()
    assert list(loader) == expected


@pytest.mark.parametrize("mode", MODES)
def test_iterables_without_length_give_the_same_batches(mode: Any) -> None:
    sized = CombinedLoader([[5, 6], [7, 8, 9]], mode)
    unsized = CombinedLoader([Unsized(5, 6), Unsized(7, 8, 9)], mode)
    assert list(unsized) == list(sized)
    assert unsized.batch_count() == float("inf")
    with pytest.raises(TypeError, match=r"no length.*'Unsized', 'Unsized'"):
        len(unsized)


def test_length_of_min_size_takes_the_shortest_known_one() -> None:
    loader = CombinedLoader([Unsized(1, 2), range(4)], "min_size")
    iter(loader)
    assert len(loader) == 4


@pytest.mark.parametrize("mode", MODES)
def test_length_before_iteration_raises(mode: Any) -> None:
    loader = CombinedLoader([range(2)], mode)
    with pytest.raises(RuntimeError, match=r"iter\(combined_loader\)"):
        len(loader)
    with pytest.raises(RuntimeError, match=r"iter\(combined_loader\)"):
        next(loader)
    iter(loader)
    assert len(loader) == 2
    loader.reset()
    with pytest.raises(RuntimeError, match=r"iter\(combined_loader\)"):
        len(loader)


def test_next_on_the_loader_follows_iter() -> None:
    loader = CombinedLoader([range(2)])
    iter(loader)
    assert next(loader) == ([0], 0, 0)
    assert next(loader) == ([1], 1, 0)
    with pytest.raises(StopIteration):
        next(loader)


def test_unknown_mode_raises() -> None:
    with pytest.raises(ValueError, match=r"mode='longest'.*min_size.*sequential"):
        CombinedLoader([range(2)], "longest")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("iterables", "first"),
    [
        (range(3), 0),
        ([range(3)], [0]),
        ((range(3), range(3)), (0, 0)),
        ({"b": range(3), "a": range(5, 8)}, {"b": 0, "a": 5}),
        (OrderedDict(b=range(3), a=range(5, 8)), OrderedDict(b=0, a=5)),
        (defaultdict(list, a=range(3)), {"a": 0}),
        (deque([range(3), range(3)]), deque([0, 0])),
        (Pair(range(3), range(5, 8)), Pair(0, 5)),
        ([range(3), {"x": Unsized(7), "y": (range(3), [range(8, 9)])}], [0, {"x": 7, "y": (0, [8])}]),
        ([[4, 5], [6, 7]], [4, 6]),
        ([torch.arange(3), torch.arange(3)], [0, 0]),
    ],
)
def test_batch_has_the_structure_of_the_iterables(iterables: Any, first: Any) -> None:
    batch, _, _ = next(iter(CombinedLoader(iterables)))
    assert batch == first
    assert type(batch) is type(first) or isinstance(iterables, defaultdict)


@pytest.mark.parametrize("values", [[1, 2], (1.5, 2.5), "ab", ["a", 1], {1, 2}, torch.arange(2)])
def test_collection_of_plain_values_is_one_iterable(values: Any) -> None:
    loader = CombinedLoader(values)
    assert len(loader.flattened) == 1
    assert [batch for batch, _, _ in loader] == list(values)


@pytest.mark.parametrize("leaf", [None, 3, object()])
def test_leaf_that_is_no_iterable_raises(leaf: Any) -> None:
    with pytest.raises(TypeError, match=f"number 1 of 2 is of type {type(leaf).__name__}"):
        iter(CombinedLoader([range(2), leaf]))


@pytest.mark.parametrize(
    ("mode", "expected"), [("min_size", []), ("max_size_cycle", []), ("max_size", [([None, 0], 0, 0)]), ("sequential", [(0, 0, 1)])]
)
def test_empty_iterable_beside_another(mode: Any, expected: list[Any]) -> None:
    loader = CombinedLoader([range(0), range(1)], mode)
    assert list(loader) == expected
    assert len(loader) == len(expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("iterables", [[], {}, [range(0), range(0)]])
def test_nothing_to_iterate_over(mode: Any, iterables: Any) -> None:
    loader = CombinedLoader(iterables, mode)
    assert list(loader) == []
    assert len(loader) == 0


def test_cycle_over_an_iterable_that_can_be_read_once_warns() -> None:
    loader = CombinedLoader([(value for value in range(2)), range(3)], "max_size_cycle")
    with pytest.warns(PossibleUserWarning, match=r"number 0 \(generator\) gave no batch when it was started again"):
        assert [batch for batch, _, _ in loader] == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", "iter a, iter b, next a, next b, stop a"),
        ("max_size_cycle", "iter a, iter b, next a, next b, stop a, iter a, next a, next b, stop a, iter a, next a, stop b"),
        ("max_size", "iter a, iter b, next a, next b, stop a, next b, stop b"),
        ("sequential", "iter a, next a, stop a, iter b, next b, next b, stop b"),
    ],
)
def test_order_in_which_iterables_are_started_and_read(mode: Any, expected: str) -> None:
    log: list[str] = []
    loader = CombinedLoader([Recorder("a", 1, log), Recorder("b", 2, log)], mode)
    iterator = iter(loader)
    assert log == expected.split(", next")[0].split(", ")  # started by `iter`, not by the first `next`
    list(iterator)
    assert ", ".join(log) == expected


# --- Limits ---


@pytest.mark.parametrize(
    ("mode", "limits", "expected"),
    [
        ("sequential", 1, [0, 10]),
        ("sequential", [1, 3], [0, 10, 11, 12]),
        ("sequential", [0, 2], [10, 11]),
        ("sequential", 0, []),
        ("sequential", (float("inf"), 1.0), [0, 1, 10]),
        ("sequential", 100, [0, 1, 10, 11, 12]),
        ("sequential", None, [0, 1, 10, 11, 12]),
        ("min_size", [2, 1], [[0, 10]]),
        ("max_size", [1, 3], [[0, 10], [None, 11], [None, 12]]),
        ("max_size_cycle", [1, 3], [[0, 10], [0, 11], [0, 12]]),
        ("max_size_cycle", [0, 3], []),
    ],
)
def test_limits_bound_each_iterable(mode: Any, limits: Any, expected: list[Any]) -> None:
    loader = CombinedLoader([range(2), range(10, 13)], mode)
    loader.limits = limits
    assert [batch for batch, _, _ in loader] == expected
    assert len(loader) == len(expected)


def test_limit_reads_no_batch_beyond_it() -> None:
    log: list[str] = []
    loader = CombinedLoader([Recorder("a", 3, log), Recorder("b", 3, log)], "sequential")
    loader.limits = [0, 1]
    assert list(loader) == [(0, 0, 1)]
    assert log == ["iter b", "next b"]


def test_limits_are_given_back_for_each_iterable() -> None:
    loader = CombinedLoader([range(2), range(3)])
    assert loader.limits is None
    loader.limits = 2.0
    assert loader.limits == [2, 2]
    loader.limits = [1, float("inf")]
    assert loader.limits == [1, float("inf")]


def test_limits_set_during_an_iteration_hold_from_the_next_on() -> None:
    loader = CombinedLoader([range(3)], "sequential")
    iterator = iter(loader)
    loader.limits = 1
    assert len(loader) == 3
    assert len(list(iterator)) == 3
    assert len(list(loader)) == len(loader) == 1


@pytest.mark.parametrize(
    ("limits", "error", "match"),
    [
        ([1], ValueError, "2 iterables, and got 1"),
        (-1, ValueError, "got -1"),
        (1.5, ValueError, "got 1.5"),
        (float("nan"), ValueError, "got nan"),
        (["a", 1], TypeError, "'a' of type str"),
    ],
)
def test_wrong_limits_raise(limits: Any, error: type[Exception], match: str) -> None:
    loader = CombinedLoader([range(2), range(3)])
    with pytest.raises(error, match=match):
        loader.limits = limits
    assert loader.limits is None


# --- Attributes ---


def test_flattened_can_be_replaced() -> None:
    loader = CombinedLoader({"a": [range(2)], "b": (range(3), Pair(range(4), range(5)))})
    assert loader.flattened == [range(2), range(3), range(4), range(5)]
    loader.flattened = ["w", "x", "y", "z"]
    assert loader.iterables == {"a": ["w"], "b": ("x", Pair("y", "z"))}
    assert list(loader) == [({"a": ["w"], "b": ("x", Pair("y", "z"))}, 0, 0)]


def test_flattened_of_another_length_raises() -> None:
    loader = CombinedLoader([range(2), range(3)])
    with pytest.raises(ValueError, match=r"takes 2 iterables.* got 1"):
        loader.flattened = [range(2)]


def test_iterables_are_the_given_object() -> None:
    iterables = {"a": range(2)}
    assert CombinedLoader(iterables).iterables is iterables
    assert CombinedLoader(iterables, "sequential").mode == "sequential"


def test_samplers_in_the_structure_of_the_iterables() -> None:
    loader = CombinedLoader({"a": DataLoader(range(4)), "b": range(2)})
    assert isinstance(loader.sampler["a"], SequentialSampler)
    assert isinstance(loader.batch_sampler["a"], BatchSampler)
    assert loader.sampler["b"] is None
    assert loader.batch_sampler["b"] is None
    single = DataLoader(range(4))
    assert CombinedLoader(single).sampler is single.sampler


@pytest.mark.parametrize("mode", MODES)
def test_survives_copy_and_pickle_while_iterating(mode: Any) -> None:
    loader = CombinedLoader({"a": [range(2)], "b": Pair(range(3), range(3))}, mode)
    loader.limits = 2
    expected = list(loader)
    next(iter(loader))
    for twin in (copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert list(twin) == expected


def test_nested_loops_over_one_loader_are_independent() -> None:
    loader = CombinedLoader([range(2)], "sequential")
    assert [(x, y) for x, _, _ in loader for y, _, _ in loader] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_reset_ends_persistent_workers() -> None:
    inner = DataLoader(range(4), num_workers=1, persistent_workers=True)
    loader = CombinedLoader([inner, range(4)])
    batch, _, _ = next(iter(loader))
    assert batch == [torch.tensor([0]), 0]
    workers = inner._iterator._workers  # type: ignore[union-attr]
    loader.reset()
    assert not any(worker.is_alive() for worker in workers)
    assert len(list(loader)) == 4
    loader.reset()


def test_iteration_keeps_persistent_workers() -> None:
    inner = DataLoader(range(2), num_workers=1, persistent_workers=True)
    loader = CombinedLoader(inner)
    list(loader)
    (worker,) = inner._iterator._workers  # type: ignore[union-attr]
    list(loader)
    assert inner._iterator._workers == [worker]  # type: ignore[union-attr]
    loader.reset()
