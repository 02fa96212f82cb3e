"""What is known of a loader, and loaders with another sampler."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning.fabric.utilities.data import (
    AttributeDict,
    has_iterable_dataset,
    has_len,
    is_shuffled,
    replace_batch_sampler,
    replace_sampler,
    seed_workers,
    set_sampler_epoch,
    sized_len,
    suggested_max_num_workers,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import seed_everything

DATA = range(6)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 5


class LengthOf:
    """An object whose ``len`` raises, or gives what is no length."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def __len__(self) -> int:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome  # type: ignore[no-any-return]


def batches(loader: DataLoader[Any]) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in loader]


# --- Lengths ---


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(range(4)), 4),
        (DataLoader(range(1), batch_size=2, drop_last=True), 0),
        (DataLoader(Stream()), None),
        ([], 0),
        (3, None),
        (None, None),
        (iter([1]), None),
        (LengthOf(1.5), None),
        (LengthOf(NotImplementedError()), None),
        (LengthOf(TypeError()), None),
    ],
)
def test_sized_len(loader: Any, expected: int | None) -> None:
    assert sized_len(loader) == expected


def test_sized_len_lets_other_errors_through() -> None:
    with pytest.raises(ValueError, match="broken"):
        sized_len(LengthOf(ValueError("broken")))


def test_has_len_of_sized_and_unsized_loaders() -> None:
    assert has_len(DataLoader(range(4)))
    assert has_len(DataLoader(SizedStream()))
    assert not has_len(DataLoader(Stream()))
    assert not has_len(iter([1]))


def test_has_len_warns_of_an_empty_loader() -> None:
    with pytest.warns(UserWarning, match="`DataLoader` has the length 0"):
        assert has_len(DataLoader(range(0)))


def test_has_len_warns_of_a_stream_that_several_workers_read() -> None:
    with pytest.warns(UserWarning, match="`IterableDataset` has `__len__` defined"):
        assert has_len(DataLoader(SizedStream(), num_workers=2))


def test_has_iterable_dataset() -> None:
    assert has_iterable_dataset(DataLoader(Stream()))
    assert not has_iterable_dataset(DataLoader(DATA))
    assert not has_iterable_dataset([1])


@pytest.mark.parametrize(("cpus", "expected"), [(1, [1, 1, 1]), (4, [3, 1, 1]), (8, [7, 3, 1]), (16, [15, 7, 4])])
def test_suggested_max_num_workers(cpus: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    assert [suggested_max_num_workers(processes) for processes in (1, 2, 3)] == expected


def test_suggested_max_num_workers_without_processes_raises() -> None:
    with pytest.raises(ValueError, match="local_world_size=0"):
        suggested_max_num_workers(0)


# --- Samplers ---


class EpochSampler(Sampler[int]):
    epoch: int | None = None

    def __iter__(self) -> Iterator[int]:
        return iter(DATA)

    def __len__(self) -> int:
        return len(DATA)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("wrap", [lambda s: {"sampler": s}, lambda s: {"batch_sampler": BatchSampler(s, 2, False)}])
def test_set_sampler_epoch_reaches_the_sampler(wrap: Any) -> None:
    sampler = EpochSampler()
    set_sampler_epoch(DataLoader(DATA, **wrap(sampler)), 7)
    assert sampler.epoch == 7


def test_set_sampler_epoch_leaves_others_alone() -> None:
    set_sampler_epoch(DataLoader(DATA), 7)
    set_sampler_epoch([1, 2], 7)


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (DataLoader(DATA), False),
        (DataLoader(DATA, shuffle=True), True),
        (DataLoader(DATA, shuffle=True, batch_size=None), True),
        (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)), True),
        (DataLoader(DATA, sampler=SubsetRandomSampler([1, 2])), False),
        (DataLoader(DATA, sampler=DistributedSampler(DATA, 1, 0)), False),  # type: ignore[arg-type]
        (DataLoader(Stream()), False),
        ([1, 2], False),
    ],
)
def test_is_shuffled(loader: Any, expected: bool) -> None:
    assert is_shuffled(loader) is expected


def test_replace_sampler_keeps_every_argument() -> None:
    def collate(samples: list[int]) -> list[int]:
        return samples

    def init(worker: int) -> None:
        del worker

    generator = torch.Generator()
    arguments: dict[str, Any] = {
        "num_workers": 1, "collate_fn": collate, "pin_memory": False, "timeout": 3.0, "worker_init_fn": init,
        "multiprocessing_context": "fork", "generator": generator, "prefetch_factor": 4, "persistent_workers": True,
        "in_order": False,
    }  # fmt: skip
    loader = DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True, **arguments)
    replaced = replace_sampler(loader, SequentialSampler(DATA))
    assert type(replaced) is DataLoader
    assert replaced.dataset is DATA
    assert (replaced.batch_size, replaced.drop_last) == (4, True)
    for name, value in arguments.items():
        assert getattr(replaced, name) == (loader.multiprocessing_context if name == "multiprocessing_context" else value), name
    assert batches(replaced) == [[0, 1, 2, 3]]


def test_replace_sampler_leaves_the_loader_as_it_was() -> None:
    loader = DataLoader(DATA, batch_size=3, sampler=[5, 4, 3, 2, 1, 0])
    replaced = replace_sampler(loader, SequentialSampler(DATA))
    assert batches(replaced) == [[0, 1, 2], [3, 4, 5]]
    assert batches(loader) == [[5, 4, 3], [2, 1, 0]]
    assert replaced.batch_sampler.sampler is replaced.sampler  # type: ignore[union-attr]


def test_replace_sampler_of_a_loader_with_running_workers() -> None:
    loader = DataLoader(DATA, batch_size=3, num_workers=1, persistent_workers=True, shuffle=True)
    list(loader)
    replaced = replace_sampler(loader, SequentialSampler(DATA))
    assert batches(replaced) == [[0, 1, 2], [3, 4, 5]]
    assert replaced._iterator is not loader._iterator


def test_replace_sampler_without_automatic_batches() -> None:
    assert batches(replace_sampler(DataLoader(DATA, batch_size=None, shuffle=True), [3, 1])) == [3, 1]


def test_replace_sampler_of_a_batch_sampler_in_the_samplers_place() -> None:
    class Squares(torch.utils.data.Dataset[list[int]]):
        def __getitem__(self, indices: list[int]) -> list[int]:
            return [index**2 for index in indices]

    loader = DataLoader(Squares(), batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 4, False))
    assert batches(replace_sampler(loader, SequentialSampler(DATA))) == [[0, 1, 4, 9], [16, 25]]


class LoaderWithOwnArguments(DataLoader[int]):
    """None of its arguments can be found on the instance."""

    def __init__(self, size: int, *, seed: int) -> None:
        sampler = RandomSampler(range(size), generator=torch.Generator().manual_seed(seed))
        super().__init__(range(size), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
        self.second_reference = sampler


def test_replace_sampler_of_a_subclass_with_another_constructor() -> None:
    loader = LoaderWithOwnArguments(5, seed=3)
    loader.note = "set afterwards"  # type: ignore[attr-defined]
    replaced = replace_sampler(loader, SequentialSampler(range(5)))
    assert type(replaced) is LoaderWithOwnArguments
    assert replaced.note == "set afterwards"  # type: ignore[attr-defined]
    assert replaced.second_reference is replaced.sampler  # type: ignore[comparison-overlap]
    assert batches(replaced) == [[0, 1], [2, 3], [4]]


class Repeating(BatchSampler):
    """A batch sampler with an argument of its own, and batches made in the constructor."""

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, times: int) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.times = times
        self.made = list(super().__iter__())

    def __iter__(self) -> Iterator[list[int]]:
        return (batch for batch in self.made for _ in range(self.times))


class Forgetful(BatchSampler):
    """A batch sampler that does not keep its argument under the same name."""

    def __init__(self, sampler: Any, size: int) -> None:
        super().__init__(sampler, size * 2, False)
        self.inner = sampler


def test_replace_sampler_makes_a_custom_batch_sampler_anew_with_its_arguments() -> None:
    loader = DataLoader(DATA, batch_sampler=Repeating([5, 4, 3], 2, False, times=2))
    replaced = replace_sampler(loader, [0, 1, 2])
    assert type(replaced.batch_sampler) is Repeating
    assert batches(replaced) == [[0, 1], [0, 1], [2], [2]]


def test_replace_sampler_copies_a_batch_sampler_whose_arguments_are_unknown() -> None:
    loader = DataLoader(DATA, batch_sampler=Forgetful([5, 4, 3], 1))
    replaced = replace_sampler(loader, [0, 1, 2])
    assert batches(replaced) == [[0, 1], [2]]
    assert replaced.batch_sampler.inner == [0, 1, 2]  # type: ignore[union-attr]
    assert batches(loader) == [[5, 4], [3]]


def test_replace_sampler_in_a_batch_sampler_without_sampler_raises() -> None:
    loader = DataLoader(DATA, batch_sampler=[[0, 1], [2]])
    with pytest.raises(TypeError, match=r"batch sampler list has no attributes `sampler`.*use_distributed_sampler=False"):
        replace_sampler(loader, [0])


def test_replace_sampler_of_an_iterable_dataset_raises() -> None:
    with pytest.raises(MisconfigurationException, match=r"IterableDataset \(Stream\)"):
        replace_sampler(DataLoader(Stream()), [0])


def test_replace_batch_sampler() -> None:
    loader = DataLoader(DATA, batch_size=4, shuffle=True)
    replaced = replace_batch_sampler(loader, BatchSampler(SequentialSampler(DATA), 5, False))
    assert batches(replaced) == [[0, 1, 2, 3, 4], [5]]
    assert isinstance(replaced.sampler, SequentialSampler)


def test_seed_workers_sets_a_worker_init_function_if_asked_for() -> None:
    seed_everything(1, workers=True)
    loader = DataLoader(DATA)
    seed_workers(loader, rank=3)
    assert loader.worker_init_fn is not None
    assert loader.worker_init_fn.keywords == {"rank": 3}  # type: ignore[attr-defined]


def test_seed_workers_keeps_what_the_user_set() -> None:
    seed_everything(1, workers=True)
    loader = DataLoader(DATA, worker_init_fn=print)
    seed_workers(loader, rank=0)
    assert loader.worker_init_fn is print
    seed_everything(1, workers=False)
    unasked = DataLoader(DATA)
    seed_workers(unasked, rank=0)
    assert unasked.worker_init_fn is None


# --- AttributeDict ---


def test_attribute_dict_items_are_attributes() -> None:
    settings = AttributeDict(lr=0.1)
    settings.layers = 2
    assert settings == {"lr": 0.1, "layers": 2}
    assert settings.lr == 0.1
    del settings.lr
    assert settings == {"layers": 2}
    with pytest.raises(AttributeError, match="'AttributeDict' object has no attribute 'lr'"):
        settings.lr  # noqa: B018
    with pytest.raises(KeyError, match="lr"):
        del settings.lr


def test_attribute_dict_representation_lists_sorted_items() -> None:
    assert repr(AttributeDict(x=1, yy="s", long=[1, 2])) == '"long": [1, 2]\n"x":    1\n"yy":   s'
    assert str(AttributeDict(a=AttributeDict(b=1), d={"e": 2})) == '"a": "b": 1\n"d": {\'e\': 2}'
    assert repr(AttributeDict()) == ""
    assert repr(AttributeDict({1: 2, "one": 3})) == '"1":   2\n"one": 3'  # type: ignore[dict-item]


def test_attribute_dict_survives_copy_and_pickle() -> None:
    settings = AttributeDict(lr=0.1)
    for twin in (copy.copy(settings), copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert twin == settings
        assert type(twin) is AttributeDict
