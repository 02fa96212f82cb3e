"""Signals to any subset of the processes of a run: all stop after the same batch, save once, and go on to the same weights."""

from __future__ import annotations

import signal
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from stopped import ERRORS, Model, files, fit, trainer_of

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

# In which all processes are at one point, since there is no collective in between; elsewhere the fastest may be a batch further.
WHERE = ["first_batch", "in_a_step", "last_batch_of_an_epoch", "validation", "epoch_end", "saving"]


def subsets(size: int) -> list[tuple[int, ...]]:
    return [ranks for count in range(1, size + 1) for ranks in combinations(range(size), count)]


def train(rank: int, size: int, folder: str, model: Model, resume: bool) -> Any:
    """How a run ends: the error and the exit code that it asks for, the step, the weights."""
    import warnings

    warnings.filterwarnings("ignore", ".*is not empty")
    # DDP lays its buckets out anew after the first batch of a process, and three numbers have several sums; so it does not do that here.
    strategy = DDPStrategy()
    trainer = trainer_of(folder, callbacks=(ModelCheckpoint(folder),), strategy=strategy, devices=size)
    try:
        weights = fit(trainer, model, size, ckpt_path="auto" if resume else None)
    except (KeyboardInterrupt, SIGTERMException) as error:
        heard = trainer.callbacks[0].errors  # type: ignore[attr-defined]
        return heard, getattr(error, "code", None), trainer.global_step, trainer.fit_loop.progress.position()
    return weights


def runs(rank: int, size: int, cases: list[Any]) -> list[Any]:
    whole = train(rank, size, "whole", Model(), resume=False)
    results = []
    for number, place, ranks in cases:
        folder = f"{number}-{place}-{'-'.join(map(str, ranks))}"
        torch.distributed.barrier()
        stopped = train(rank, size, folder, Model(place, (number,), ranks), resume=False)
        torch.distributed.barrier()
        saved = files(folder)
        results.append([stopped, saved, train(rank, size, folder, Model(), resume=True) == whole])
    return results


def check(size: int, cases: list[Any], timeout: float) -> None:
    everybody = run(runs, size, cases, timeout=timeout)
    for case, *results in zip(cases, *everybody):
        assert all(result == results[0] for result in results), case
        stopped, saved, same = results[0]
        assert stopped[:2] == ([ERRORS[case[0]]], 143 if case[0] == signal.SIGTERM else None), case
        assert "last.ckpt" in saved, case
        assert same, case


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_any_of_two_processes_stop_both_and_both_go_on_to_the_same_weights(number: int) -> None:
    places = WHERE if number == signal.SIGTERM else WHERE[1:4]
    check(2, [(number, place, ranks) for place in places for ranks in subsets(2)], timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", WHERE)
def test_any_of_three_processes_stop_all(place: str, number: int) -> None:
    check(3, [(number, place, ranks) for ranks in subsets(3)], timeout=240)


def mixed(rank: int, size: int) -> Any:
    numbers = (signal.SIGTERM,) if rank == 0 else (signal.SIGINT,)
    return train(rank, size, "run", Model("in_a_step", numbers, (0, 1)), resume=False)


def test_different_signals_end_the_run_by_one_of_them() -> None:
    first, second = run(mixed, 2)
    assert first == second
    assert first[0][0] in ERRORS.values()


def before_training(rank: int, size: int) -> Any:
    results = []
    for place in ("setup", "fit_start", "sanity_check"):
        results.append([train(rank, size, place, Model(place, (signal.SIGTERM,), (1,)), resume=False)[:3], files(place)])
        torch.distributed.barrier()
    return results


def test_signal_before_training_ends_the_run_without_a_checkpoint() -> None:
    for results in run(before_training, 2, timeout=100):
        for (error, code, step), saved in results:
            assert (error, code) == (["SIGTERMException"], 143)
            assert (step > 0) == (saved != [])


def late_alone(rank: int, size: int, place: str) -> Any:
    trainer, model = trainer_of("run", strategy=DDPStrategy(), devices=size), Model(place, (signal.SIGTERM,), (1,))
    try:
        fit(trainer, model, size)
    except SIGTERMException:
        return trainer.state.status.value, "SIGTERMException"
    return trainer.state.status.value, ""


@pytest.mark.parametrize("place", ["last_epoch_end", "train_end", "teardown"])
def test_signal_at_the_end_lets_the_run_end_and_reaches_the_script_of_that_process(place: str) -> None:
    assert run(late_alone, 2, place) == [("finished", ""), ("finished", "SIGTERMException")]
