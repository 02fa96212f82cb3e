"""What a loader that is continued loads, leaves alone, and says when something is not as it was."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from interrupted_loaders import AsItGoes, Augmented, Eager, WithState, assert_same, check_every_interruption, collate, loader_of, train

from lightning.fabric.utilities.loader_state import ResumableLoader


def saved_after(batches: int, make: Any = None) -> dict[str, Any]:
    loader = ResumableLoader(DataLoader(Augmented(), batch_size=2) if make is None else make())
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    return loader.state_dict()


def first_indices(loader: ResumableLoader) -> list[int]:
    return [int(batch[0, 0]) for batch in loader]


class Growing(WithState):
    """Its state takes more and more."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "more": "x" * 20_000 * self.count}


def test_samples_that_were_given_are_not_loaded_again() -> None:
    dataset = Augmented()
    resumed = ResumableLoader(DataLoader(dataset, batch_size=2))
    resumed.load_state_dict(saved_after(3))
    assert resumed.passes_over == 3
    assert first_indices(resumed) == [6, 8]
    assert dataset.loaded == [6, 7, 8, 9]
    assert resumed.passes_over == 0
    assert len(list(resumed)) == len(resumed) == 5


def test_the_users_loader_stays_as_it_is() -> None:
    loader = DataLoader(Augmented(), batch_size=2, num_workers=2, shuffle=True, persistent_workers=True)
    before = dict(vars(loader))
    list(ResumableLoader(loader))
    assert vars(loader) == before


def test_saving_changes_nothing_and_the_first_iteration_leaves_random_states_alone() -> None:
    state = saved_after(2, lambda: DataLoader(Augmented(), shuffle=True, num_workers=1))
    resumed = ResumableLoader(DataLoader(Augmented(), shuffle=True, num_workers=1))
    resumed.load_state_dict(state)
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    iterator = iter(resumed)
    resumed.state_dict()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert len(list(iterator)) == 8


def test_what_was_loaded_is_saved_again_before_the_iteration_begins() -> None:
    state = saved_after(2)
    resumed = ResumableLoader(DataLoader(Augmented(), batch_size=2))
    resumed.load_state_dict(state)
    assert resumed.state_dict() is state


def test_a_resumed_run_can_be_interrupted_again() -> None:
    make = loader_of(batch_size=1, shuffle=True, num_workers=2, persistent_workers=True)
    wanted, files = train(make, 2, [(0, 3)])
    _, files = train(make, 2, [(0, 6)], saved=files[0, 3])
    _, files = train(make, 2, [(1, 2)], saved=files[0, 6])
    rest, _ = train(make, 2, saved=files[1, 2])
    assert_same(rest, wanted[12:])


@pytest.mark.filterwarnings("ignore:The sampler AsItGoes did not draw")
def test_a_sampler_that_draws_as_it_goes_can_be_interrupted_again() -> None:
    make = loader_of(batch_size=1, sampler=AsItGoes, num_workers=2)
    wanted, files = train(make, 1, [(0, 3)])
    _, files = train(make, 1, [(0, 4)], saved=files[0, 3])
    rest, _ = train(make, 1, saved=files[0, 4])
    assert_same(rest, wanted[4:])


@pytest.mark.slow
def test_workers_that_are_spawned() -> None:
    make = loader_of(batch_size=2, shuffle=True, num_workers=1, multiprocessing_context="spawn")
    wanted, files = train(make, 1, [(0, 3)])
    rest, _ = train(make, 1, saved=files[0, 3])
    assert_same(rest, wanted[3:])


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_batches_for_pinned_memory_stay_what_they_are() -> None:
    check_every_interruption(loader_of(batch_size=4, shuffle=True, num_workers=1, pin_memory=True))


def test_more_batches_unused_than_a_loop_fetches_ahead_are_an_error() -> None:
    loader = ResumableLoader(DataLoader(Augmented()))
    iterator = iter(loader)
    for _ in range(6):
        next(iterator)
    with pytest.raises(ValueError, match=r"state_dict\(batches=1\): 6 batches were given, of which at most 4 may be unused"):
        loader.state_dict(1)
    with pytest.raises(ValueError, match=r"state_dict\(batches=7\)"):
        loader.state_dict(7)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            lambda: DataLoader(Augmented(12), batch_size=2),
            "samples: 10 then, 12 now.*the first 3 batches of the loader as it is are left",
        ),
        (lambda: DataLoader(Augmented(), batch_size=3), "batch size: 2 then, 3 now.*some samples may come twice or never"),
        (lambda: DataLoader(Augmented(), batch_size=2, sampler=Eager()), "sampler: SequentialSampler then, Eager now"),
        (lambda: DataLoader(Augmented(), batch_size=2, num_workers=1), "workers: 0 then, 1 now.*the order of the samples does not"),
        (
            lambda: [1, 2, 3],
            "another kind of training loader than this list: in the epoch in which it was saved, the batches that this one gives first",
        ),
    ],
)
def test_a_loader_that_is_another_one_is_told(loader: Any, message: str) -> None:
    resumed = ResumableLoader(loader())
    with pytest.warns(UserWarning, match=message):
        resumed.load_state_dict(saved_after(3))


def test_another_number_of_workers_keeps_the_order() -> None:
    def make(workers: int) -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=workers)

    state = saved_after(2, lambda: make(2))
    orders = []
    for workers in (2, 1, 0):
        resumed = ResumableLoader(make(workers))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            resumed.load_state_dict(state)
        assert len(told) == (workers != 2)
        orders.append(first_indices(resumed))
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 3


def test_a_sampler_that_does_not_draw_the_same_again_is_told() -> None:
    state = saved_after(2, lambda: DataLoader(Augmented(), batch_size=2, sampler=[3, 1, 4, 5, 9, 2]))
    resumed = ResumableLoader(DataLoader(Augmented(), batch_size=2, sampler=[1, 3, 4, 5, 9, 2]))
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="The sampler list did not draw the samples again that the interrupted run had used"):
        assert first_indices(resumed) == [9]


def test_batches_fetched_ahead_without_their_random_states_are_told() -> None:
    loader = ResumableLoader(DataLoader(Augmented(), batch_size=2))
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed = ResumableLoader(DataLoader(Augmented(), batch_size=2))
    resumed.load_state_dict(loader.state_dict(1))
    with pytest.warns(UserWarning, match="1 more batches were fetched than used, and the dataset draws random numbers"):
        assert first_indices(resumed) == [2, 4, 6, 8]


def test_batches_in_no_order_are_told() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=2, num_workers=1, in_order=False)

    resumed = ResumableLoader(make())
    resumed.load_state_dict(saved_after(1, make))
    with pytest.warns(UserWarning, match="in_order=False, so its batches came in the order in which the workers finished them"):
        assert len(list(resumed)) == 4


def test_a_state_of_a_dataset_that_outgrows_its_place_is_told() -> None:
    loader = ResumableLoader(DataLoader(Growing(), num_workers=1, collate_fn=collate))
    iterator = iter(loader)
    next(iterator)
    with pytest.warns(UserWarning, match="The random state of worker 0 of the loader could not be kept: its dataset's state takes more"):
        state = loader.state_dict()
    assert state["workers"] == [None]
