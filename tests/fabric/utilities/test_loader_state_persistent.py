"""Worker processes that outlive an epoch: interrupted anywhere, each goes on with its own random numbers."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from interrupted_loaders import Augmented, BatchesOfPairs, Eager, WithOwnGenerators, check_every_interruption, loader_of, times_two

CASES: dict[str, dict[str, Any]] = {
    "shuffled": {"batch_size": 2, "shuffle": True},
    "single samples": {"dataset": partial(Augmented, 4), "batch_size": None, "shuffle": True, "collate_fn": times_two},
    "drawn when started": {"batch_size": 3, "sampler": Eager},
    "own batch sampler": {"batch_sampler": BatchesOfPairs},
    "own generators": {"dataset": WithOwnGenerators, "batch_size": 2, "shuffle": True},
}


@pytest.mark.parametrize("case", CASES)
def test_workers_that_persist_keep_their_states_over_the_epochs(case: str) -> None:
    check_every_interruption(loader_of(**CASES[case], num_workers=2, persistent_workers=True), epochs=3)


@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_that_are_left_before_their_end(persistent: bool) -> None:
    check_every_interruption(loader_of(batch_size=1, num_workers=2, shuffle=True, persistent_workers=persistent), epochs=3, limit=3)
