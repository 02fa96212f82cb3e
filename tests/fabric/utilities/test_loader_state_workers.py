"""Loaders with worker processes: interrupted anywhere, each worker goes on with its own random numbers."""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler, get_worker_info

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from interrupted_loaders import (
    AsItGoes,
    Augmented,
    BatchesOfPairs,
    ByPass,
    Eager,
    InBulk,
    OnlyNormal,
    WithOwnGenerators,
    WithState,
    check_every_interruption,
    loader_of,
    times_two,
)

from lightning.fabric.utilities.seed import pl_worker_init_function

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def init(worker: int) -> None:
    """Seeds the worker in its own way, by what it is told of itself."""
    info: Any = get_worker_info()
    assert info.id == worker
    random.seed(info.seed + len(info.dataset))


CASES: dict[str, dict[str, Any]] = {
    "one": {"num_workers": 1, "shuffle": True},
    "two": {"num_workers": 2, "shuffle": True},
    "three, far ahead": {"num_workers": 3, "shuffle": True, "prefetch_factor": 3},
    "last dropped": {"num_workers": 2, "batch_size": 3, "drop_last": True, "shuffle": True},
    "own init": {"num_workers": 2, "worker_init_fn": init},
    "seeded": {"num_workers": 2, "worker_init_fn": pl_worker_init_function, "shuffle": True},
    "single samples": {"dataset": partial(Augmented, 5), "num_workers": 2, "batch_size": None, "shuffle": True, "collate_fn": times_two},
    "in bulk": {"dataset": InBulk, "num_workers": 2, "generator": generator, "shuffle": True},
    "own batch sampler": {"num_workers": 2, "batch_sampler": BatchesOfPairs},
    "drawn when started": {"num_workers": 2, "sampler": Eager},
    "drawn as it goes": {"num_workers": 2, "sampler": lambda: RandomSampler(range(10), True, 9, generator())},
    "normal only": {"dataset": partial(OnlyNormal, 4), "num_workers": 1, "batch_size": 1, "collate_fn": torch.stack},
    "counted passes": {"num_workers": 2, "sampler": ByPass},
    "own generators": {"dataset": WithOwnGenerators, "num_workers": 2, "shuffle": True},
    "own state": {"dataset": WithState, "num_workers": 2, "shuffle": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_rest_of_the_run_is_the_same_after_every_batch(case: str) -> None:
    how = {"batch_size": 2, **CASES[case]} if "batch_sampler" not in CASES[case] else CASES[case]
    check_every_interruption(loader_of(**how), ahead=len(case) % 2)


@pytest.mark.filterwarnings("ignore:The sampler AsItGoes did not draw")
def test_a_sampler_that_draws_in_turn_with_the_training() -> None:
    check_every_interruption(loader_of(batch_size=1, num_workers=1, sampler=AsItGoes), epochs=1)
