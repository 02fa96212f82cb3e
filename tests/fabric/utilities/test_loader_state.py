"""Loaders that load in the process that trains: interrupted anywhere, they go on bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, SubsetRandomSampler, WeightedRandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from interrupted_loaders import (
    Augmented,
    BatchesOfPairs,
    ByPass,
    DrawsAtItsEnd,
    Eager,
    InBulk,
    WithOwnGenerators,
    WithState,
    check_every_interruption,
    loader_of,
    times_two,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


CASES: dict[str, dict[str, Any]] = {
    "in order": {"batch_size": 3},
    "shuffled": {"batch_size": 3, "shuffle": True},
    "shuffled, last dropped": {"batch_size": 3, "shuffle": True, "drop_last": True},
    "shuffled by a generator": {"batch_size": 2, "shuffle": True, "generator": generator},
    "weighted": {"batch_size": 4, "sampler": lambda: WeightedRandomSampler([1.0 + i for i in range(10)], 10)},
    "a subset": {"batch_size": 3, "sampler": lambda: SubsetRandomSampler(range(2, 9))},
    "a list": {"batch_size": 3, "sampler": lambda: [3, 1, 4, 1, 5, 9, 2, 6]},
    "distributed": {"batch_size": 2, "sampler": lambda: DistributedSampler(Augmented(), 2, 1)},
    "drawn when started": {"batch_size": 3, "sampler": Eager},
    "drawn at its end": {"batch_size": 3, "sampler": DrawsAtItsEnd},
    "counted passes": {"batch_size": 3, "sampler": ByPass},
    "own batch sampler": {"batch_sampler": BatchesOfPairs},
    "single samples": {"batch_size": None, "shuffle": True, "collate_fn": times_two},
    "in bulk": {"dataset": InBulk, "batch_size": 3, "shuffle": True},
    "own generators": {"dataset": WithOwnGenerators, "batch_size": 3, "shuffle": True},
    "own state": {"dataset": WithState, "batch_size": 3, "shuffle": True},
}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_the_rest_of_the_run_is_the_same_after_every_batch(case: str, ahead: int) -> None:
    check_every_interruption(loader_of(**CASES[case]), ahead=ahead)
