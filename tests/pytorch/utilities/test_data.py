"""The size of a batch, and the length of loaders on all ranks."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, zeros
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import data as module
from lightning.pytorch.utilities.data import extract_batch_size, has_len_all_ranks


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Record:
    x: Any
    y: Any = None


@pytest.fixture(autouse=True)
def nothing_warned_of_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned_of", set())


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (zeros(3, 2), 3),
        (zeros(()), 1),
        (zeros(0, 3), 0),
        ([zeros(3), zeros(3)], 3),
        ((zeros(3, 5), zeros(3)), 3),
        ({"a": zeros(4), "b": zeros(4, 2)}, 4),
        ({"a": [zeros(2), {"b": zeros(2)}]}, 2),
        (((zeros(2), zeros(2)), (zeros(2),)), 2),
        (Pair(zeros(3), zeros(3)), 3),
        (Record(zeros(3), "name"), 3),
        (Record(1, zeros(4)), 4),
        (UserDict(x=zeros(3)), 3),
        (["abcdefg", zeros(3)], 3),
        ([["a", "b"], zeros(3)], 3),
        ([None, 1, 0.5, True, b"bytes", zeros(3)], 3),
        ({"x": "hello", "y": zeros(4)}, 4),
        ([zeros(()), zeros(())], 1),
        ([np.zeros((7, 2)), zeros(3)], 3),
        (torch.eye(3).to_sparse(), 3),
        (pack_sequence([zeros(5), zeros(2)]), 2),
        ([pack_sequence([zeros(5), zeros(2)]), zeros(2)], 2),
    ],
)
def test_batch_size_is_the_first_dimension(batch: Any, size: int) -> None:
    assert extract_batch_size(batch) == size


@pytest.mark.parametrize(
    "batch",
    ["abc", b"abc", ["ab", "cd"], [1, 2], 3, None, [], {}, {1, 2}, object(), np.zeros((4, 2)), {"a": "x"}, Record, iter([zeros(2)])],
)
def test_batch_without_a_tensor_raises(batch: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"type {type(batch).__name__}.*self.log\(..., batch_size=batch_size\)"):
        extract_batch_size(batch)


@pytest.mark.parametrize(
    ("batch", "size"), [([zeros(3), zeros(4)], 3), ({"a": zeros(()), "b": zeros(5)}, 1), ([zeros(2), [zeros(2), zeros(3)]], 2)]
)
def test_first_tensor_counts_where_they_differ_with_one_warning(batch: Any, size: int) -> None:
    with pytest.warns(UserWarning, match=rf"that of the first one, {size}\."):
        assert extract_batch_size(batch) == size
    assert extract_batch_size(batch) == size


def test_generator_is_not_used_up() -> None:
    batch = [(zeros(2) for _ in range(3)), zeros(4)]
    assert extract_batch_size(batch) == 4
    assert len(list(batch[0])) == 3


# --- Lengths ---


class TwoRanks:
    """The part of a strategy that is needed, with another rank whose loader has ``other`` batches."""

    root_device = torch.device("cpu")

    def __init__(self, other: int) -> None:
        self.other = other

    def reduce(self, tensor: Tensor, reduce_op: str = "mean") -> Tensor:
        assert reduce_op == "sum"
        return tensor + self.other


def has_length(loader: Any, other: int, allow: bool = False) -> bool:
    return has_len_all_ranks(loader, TwoRanks(other), allow)  # type: ignore[arg-type]


class SizedStream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))

    def __len__(self) -> int:
        return 5


def test_loader_with_batches_has_a_length_on_all_ranks() -> None:
    assert has_length([1, 2], other=3)


def test_loader_without_length_has_none() -> None:
    assert not has_length(iter([1]), other=3)


@pytest.mark.parametrize("allow", [True, False])
def test_no_batches_on_any_rank_warns(allow: bool) -> None:
    with pytest.warns(UserWarning, match="`list` has the length 0 on every rank"):
        assert has_length([], other=0, allow=allow)


def test_no_batches_on_this_rank_raises() -> None:
    with pytest.raises(RuntimeError, match="`list` has the length 0 on this rank and 3 on the others"):
        has_length([], other=3)


def test_no_batches_on_this_rank_warns_if_allowed() -> None:
    with pytest.warns(UserWarning, match="`list` has the length 0 on this rank and not on others"):
        assert has_length([], other=3, allow=True)


def test_stream_that_several_workers_read_warns() -> None:
    with pytest.warns(UserWarning, match="`IterableDataset` has `__len__` defined"):
        assert has_length(DataLoader(SizedStream(), num_workers=2), other=3)
