"""Batches are cut along their samples, and what their parts give is put together again."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning.pytorch.loops.parts import CannotBeSplitError, bounds, merged, plan

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: Tensor
    name: str


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        (torch.arange(4), torch.arange(1, 3)),
        ([torch.arange(4), torch.arange(8).view(4, 2)], [torch.arange(1, 3), torch.arange(2, 6).view(2, 2)]),
        ({"x": torch.arange(4), "scale": torch.tensor(3.0)}, {"x": torch.arange(1, 3), "scale": torch.tensor(3.0)}),
        (Pair(torch.arange(4), ["a", "b", "c", "d"]), Pair(torch.arange(1, 3), ["b", "c"])),
        (Sample(torch.arange(4), "one"), Sample(torch.arange(1, 3), "one")),
        (OrderedDict(x=torch.arange(4), y=None), OrderedDict(x=torch.arange(1, 3), y=None)),
        (UserDict(x=torch.arange(4)), UserDict(x=torch.arange(1, 3))),
        ((torch.arange(4), {"ids": (1, 2, 3, 4), "why": ["a", "b"]}), (torch.arange(1, 3), {"ids": (2, 3), "why": ["a", "b"]})),
        (([torch.zeros(1), torch.ones(2), torch.zeros(3)], ["a", "b", "c"]), ([torch.ones(2), torch.zeros(3)], ["b", "c"])),
    ],
)  # fmt: skip
def test_batch_is_cut(batch: Any, part: Any) -> None:
    size, cut = plan(batch)
    assert size in (3, 4)
    found = cut(1, 3)
    assert type(found) is type(part)
    assert repr(found) == repr(part)


def test_arrays_are_cut() -> None:
    size, cut = plan({"x": np.arange(4), "y": torch.arange(4)})
    assert size == 4
    assert cut(1, 3)["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ("text", "holds no tensors"),
        ([torch.zeros(4), torch.zeros(3)], r"different lengths: \[3, 4\]"),
        ([torch.zeros(4), object()], "holds a object"),
        (pack_sequence([torch.zeros(2), torch.zeros(1)]), "packed sequence"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_what_cannot_be_cut_says_why(batch: Any, said: str) -> None:
    with pytest.raises(CannotBeSplitError, match=said):
        plan(batch)


def test_parts_are_about_equal() -> None:
    assert bounds(10, 4) == [(0, 3), (3, 6), (6, 10)]
    assert bounds(4, float("inf")) == [(0, 4)]
    for size in range(1, 40):
        for largest in range(1, 40):
            found = bounds(size, largest)
            assert max(stop - start for start, stop in found) <= largest
            assert sum(stop - start for start, stop in found) == size


def test_outputs_are_put_together() -> None:
    first = {"loss": torch.tensor(1.0), "y": torch.zeros(1, 2), "names": ["a"], "n": torch.tensor(3), "odd": torch.zeros(5), "k": 1}
    second = {
        "loss": torch.tensor(3.0),
        "y": torch.ones(3, 2),
        "names": ["b", "c", "d"],
        "n": torch.tensor(4),
        "odd": torch.ones(5),
        "k": 2,
    }
    whole = merged([first, second], [1, 3])
    assert whole["loss"] == 2.5
    assert whole["y"].shape == (4, 2)
    assert whole["names"] == ["a", "b", "c", "d"]
    assert whole["n"].tolist() == [3, 4]
    assert [value.tolist() for value in whole["odd"]] == [[0.0] * 5, [1.0] * 5]
    assert whole["k"] == [1, 2]
    assert merged([{}, {}], [1, 1]) == {}
