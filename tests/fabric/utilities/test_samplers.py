"""Which samples each process gets from a loader."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
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
    WeightedRandomSampler,
)

from lightning.fabric.utilities.data import set_sampler_epoch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.samplers import UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper, distribute
from lightning.pytorch.overrides import distributed as documented

FIVE = list(range(5))


def given(loader: Any, size: int = 2, epoch: int = 0, **kwargs: Any) -> list[list[int]]:
    """The samples of each process in an epoch, whose random generators are in different states."""
    samples = []
    for rank in range(size):
        torch.manual_seed(100 + rank)
        random.seed(rank)
        np.random.seed(rank)
        loader_here = distribute(loader, size, rank, **kwargs)
        set_sampler_epoch(loader_here, epoch)
        samples.append([int(sample) for batch in loader_here for sample in torch.as_tensor(batch).reshape(-1)])
    return samples


# ---- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(5, 2), (4, 2), (7, 3), (1, 2), (0, 2), (2, 3)])
def test_evaluation_counts_every_sample_once_and_in_order(count: int, size: int) -> None:
    samples = given(DataLoader(range(count), batch_size=2), size, training=False)  # type: ignore[arg-type]
    assert samples == [list(range(rank, count, size)) for rank in range(size)]


def test_lengths_are_those_of_each_process() -> None:
    loaders = [distribute(DataLoader(FIVE, batch_size=2), 2, rank, training=False) for rank in range(2)]  # type: ignore[arg-type]
    assert [len(loader) for loader in loaders] == [2, 1]
    assert [len(loader.sampler) for loader in loaders] == [3, 2]
    assert all(isinstance(loader.sampler, UnrepeatedDistributedSampler) for loader in loaders)


def test_shuffled_evaluation_counts_every_sample_once() -> None:
    loader: Any = DataLoader(FIVE, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    first, second = given(loader, training=False), given(loader, training=False, epoch=1)
    assert sorted(first[0] + first[1]) == FIVE
    assert len(first[0]) == 3
    assert first != second


@pytest.mark.parametrize("sampler", [SubsetRandomSampler([1, 3, 4, 7, 8]), WeightedRandomSampler([1.0] * 9, 5)])
def test_random_samplers_of_the_user_are_drawn_alike_and_leave_no_trace(sampler: Any) -> None:
    loader: Any = DataLoader(range(9), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    first, second = given(loader, training=False), given(loader, training=False, epoch=3)
    drawn = [sample for pair in zip(first[0], [*first[1], None]) for sample in pair][:5]
    assert first != second
    torch.manual_seed(100)
    before = torch.get_rng_state()
    list(distribute(loader, 1, 0, training=False).sampler)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert drawn == list(sampler)  # the samples of one process, shared out


def test_samplers_that_draw_from_python_or_numpy_are_drawn_alike() -> None:
    class Drawn(Sampler[int]):
        def __init__(self, draw: Any) -> None:
            self.draw = draw

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Iterator[int]:
            order = list(range(6))
            self.draw(order)
            return iter(order)

    for draw in (random.shuffle, np.random.shuffle):
        loader: Any = DataLoader(range(6), sampler=Drawn(draw))  # type: ignore[arg-type]
        assert sorted(sample for part in given(loader, 3, training=False) for sample in part) == list(range(6))


# ---- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_shuffles_with_the_global_seed(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    loader: Any = DataLoader(FIVE, batch_size=2, shuffle=shuffle)  # type: ignore[arg-type]
    # What Lightning's trainer gives these two processes with seed_everything(7).
    assert given(loader, training=True) == [[0, 3, 4], [1, 2, 0]]
    assert given(loader, training=True, epoch=1) == [[3, 2, 0], [1, 4, 3]]
    assert isinstance(distribute(loader, 2, 0, training=True).sampler, DistributedSampler)


def test_order_is_kept_where_the_caller_says_so() -> None:
    loader: Any = DataLoader(FIVE, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    assert given(loader, training=True, shuffle=False) == [[0, 2, 4], [1, 3, 0]]


def test_samplers_of_the_user_keep_their_order() -> None:
    class Descending(Sampler[int]):
        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Iterator[int]:
            return iter([5, 4, 3, 2, 1, 0])

    loader: Any = DataLoader(range(6), batch_size=2, sampler=Descending())  # type: ignore[arg-type]
    assert given(loader, training=True) == [[5, 3, 1], [4, 2, 0]]
    assert isinstance(distribute(loader, 2, 0, training=True).sampler, DistributedSamplerWrapper)


def test_drawing_with_replacement_and_number_of_samples_are_kept() -> None:
    sampler = RandomSampler(FIVE, replacement=True, num_samples=20)
    loader: Any = DataLoader(FIVE, batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    first, second = given(loader, training=True)
    assert len(first) == len(second) == 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert [sample for pair in zip(first, second) for sample in pair] == list(sampler)


def test_wrapped_sampler_hears_of_epochs() -> None:
    class Epochs(Sampler[int]):
        epoch = 0

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch] * 4)

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    loader: Any = DataLoader(range(9), sampler=Epochs())  # type: ignore[arg-type]
    for training in (True, False):
        assert given(loader, epoch=3, training=training) == [[3, 3], [3, 3]]


# ---- batch samplers, and what is left alone ---------------------------------------------------------------------------


class Buckets(BatchSampler):
    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, name: str = "default") -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.name = name


@pytest.mark.parametrize("training", [True, False])
def test_custom_batch_samplers_are_made_anew_with_their_arguments(training: bool) -> None:
    loader: Any = DataLoader(FIVE, batch_sampler=Buckets(SequentialSampler(FIVE), 2, True, name="mine"))  # type: ignore[arg-type]
    made = distribute(loader, 2, 1, training=training, shuffle=False).batch_sampler
    assert type(made) is Buckets
    assert (made.batch_size, made.drop_last, made.name) == (2, True, "mine")
    assert list(made) == [[1, 3]]
    assert loader.batch_sampler.sampler.data_source is FIVE


def test_loader_without_batches_is_shared_out() -> None:
    loader: Any = DataLoader(FIVE, batch_size=None, shuffle=False)  # type: ignore[arg-type]
    assert given(loader, training=False) == [[0, 2, 4], [1, 3]]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(FIVE)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream()),
        DataLoader(FIVE, sampler=DistributedSampler(FIVE, num_replicas=2, rank=0)),  # type: ignore[arg-type]
        DataLoader(FIVE, batch_sampler=Buckets(DistributedSampler(FIVE, num_replicas=2, rank=0), 2, False)),  # type: ignore[arg-type]
        [1, 2, 3],
        iter([1]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_loaders_that_share_out_themselves_are_left_alone(loader: Any, training: bool) -> None:
    assert distribute(loader, 2, 0, training=training) is loader


@pytest.mark.parametrize("training", [True, False])
def test_sampler_without_length_raises(training: bool) -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        distribute(DataLoader(FIVE, sampler=Endless()), 2, 0, training=training)  # type: ignore[arg-type]


def test_batch_sampler_that_holds_no_sampler_raises() -> None:
    loader: Any = DataLoader(FIVE, batch_sampler=[[0, 1], [2]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        distribute(loader, 2, 0, training=True)


def test_documented_names_are_ours() -> None:
    assert documented.UnrepeatedDistributedSampler is UnrepeatedDistributedSampler
    assert documented.UnrepeatedDistributedSamplerWrapper is UnrepeatedDistributedSamplerWrapper
    assert callable(documented.prepare_for_backward)
