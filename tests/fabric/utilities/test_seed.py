"""One seed for every random generator, and their states."""

from __future__ import annotations

import io
import logging
import os
import random
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning.fabric.utilities.seed import (
    collect_rng_states,
    pl_worker_init_function,
    reset_seed,
    seed_everything,
    set_rng_states,
)


@pytest.fixture(autouse=True)
def no_seed_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.pop("PL_SEED_WORKERS", None)


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seed_everything_seeds_each_generator_with_the_seed() -> None:
    assert seed_everything(7) == 7
    drawn = draw()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert drawn == draw()


@pytest.mark.parametrize("workers", [True, False])
def test_seed_everything_tells_child_processes(workers: bool) -> None:
    seed_everything(5, workers=workers)
    assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert os.environ["PL_SEED_WORKERS"] == str(int(workers))


def test_seed_everything_without_seed_takes_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "2020")
    assert seed_everything() == 2020


def test_seed_everything_without_any_seed_takes_0_and_warns() -> None:
    with pytest.warns(UserWarning, match="the seed is 0"):
        assert seed_everything() == 0


@pytest.mark.parametrize("seed", [0, 2**32 - 1, "7", 3.0, np.int64(4)])
def test_seed_everything_accepts_whole_numbers(seed: Any) -> None:
    assert seed_everything(seed) == int(seed)
    assert type(seed_everything(seed)) is int


@pytest.mark.parametrize("seed", [-1, 2**32, "x", "", "1.0", 1.5, float("nan"), float("inf"), [1], "-1"])
def test_seed_everything_with_a_wrong_seed_raises_and_changes_nothing(seed: Any) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="from 0 to 4294967295"):
        seed_everything(seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.parametrize("function", [seed_everything, reset_seed])
@pytest.mark.parametrize("seed", ["x", "", "-1", "1.0", str(2**33)])
def test_wrong_seed_in_the_environment_raises(function: Any, seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    with pytest.raises(ValueError, match="environment variable PL_GLOBAL_SEED"):
        function()


@pytest.mark.parametrize("verbose", [True, False])
def test_seed_everything_logs_the_seed_if_verbose(verbose: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.fabric"):
        seed_everything(123, verbose=verbose)
    assert ("Seed set to 123" in caplog.text) is verbose


def test_reset_seed_repeats_the_last_seed() -> None:
    seed_everything(11, workers=True)
    drawn = draw()
    reset_seed()
    assert draw() == drawn
    assert os.environ["PL_SEED_WORKERS"] == "1"


def test_reset_seed_without_a_seed_does_nothing() -> None:
    before = torch.get_rng_state()
    reset_seed()
    assert torch.equal(torch.get_rng_state(), before)
    assert "PL_GLOBAL_SEED" not in os.environ


def test_rng_states_bring_every_generator_back() -> None:
    draw()
    np.random.randn()  # leaves a second normal value behind for the next call
    random.gauss(0, 1)
    states = collect_rng_states()
    drawn = draw(), np.random.randn(), random.gauss(0, 1)
    set_rng_states(states)
    assert (draw(), np.random.randn(), random.gauss(0, 1)) == drawn


def test_rng_states_can_be_saved_and_loaded_with_weights_only() -> None:
    np.random.randn()
    file = io.BytesIO()
    torch.save(collect_rng_states(), file)
    drawn = draw(), np.random.randn()
    file.seek(0)
    set_rng_states(torch.load(file, weights_only=True))
    assert (draw(), np.random.randn()) == drawn


@pytest.mark.parametrize("name", ["PCG64", "Philox", "SFC64"])
def test_rng_states_of_another_bit_generator_of_numpy(name: str) -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        np.random.set_bit_generator(getattr(np.random, name)(3))  # type: ignore[attr-defined]
        np.random.rand()
        states = collect_rng_states()
        drawn = np.random.rand(5).tolist()
        set_rng_states(states)
        assert np.random.rand(5).tolist() == drawn
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]


def test_rng_states_hold_cuda_only_if_asked_for() -> None:
    assert "torch.cuda" in collect_rng_states()
    assert "torch.cuda" not in collect_rng_states(include_cuda=False)


def test_collecting_states_wakes_neither_numpy_nor_cuda() -> None:
    script = (
        "import sys, torch; from lightning.fabric.utilities.seed import collect_rng_states, set_rng_states;"
        "states = collect_rng_states(); set_rng_states(states);"
        "assert 'numpy' not in states and 'numpy.random' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_worker_seeds_differ_by_worker_rank_and_generator() -> None:
    seen = set()
    for worker in range(3):
        for rank in range(3):
            torch.manual_seed(100 + worker)  # as a loader's worker process does
            pl_worker_init_function(worker, rank)
            seen.update(draw())
    assert len(seen) == 27


def test_worker_seeds_are_the_same_again() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        pl_worker_init_function(1, rank=0)
        drawn.append(draw())
    assert drawn[0] == drawn[1]


class Drawn(Dataset[Any]):
    """Random numbers of three generators, drawn in the worker."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(draw())

    def __len__(self) -> int:
        return 4


def test_workers_of_a_loader_draw_different_numbers() -> None:
    seed_everything(1)
    loader = DataLoader(Drawn(), num_workers=2, worker_init_fn=pl_worker_init_function)
    assert len({value for batch in loader for value in batch.flatten().tolist()}) == 12
