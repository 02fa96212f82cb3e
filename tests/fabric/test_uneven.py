"""Loaders of different lengths in several real processes, and what one process computes on the same data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run, run_to_end
from training import Net, largest_difference, plain

from lightning.fabric.plugins.layer_sync import TorchSyncBatchNorm
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.uneven import Lockstep, batch_norm_held
from lightning.fabric.utilities.exceptions import MisconfigurationException


class Stream:
    """A loader that doesn't know its length."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def data(rank: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, 4, 5, generator=torch.Generator().manual_seed(rank + 10)))


def wrapped(lengths: list[int], rank: int, known: bool, **kwargs: Any) -> Lockstep:
    batches = data(rank, lengths[rank])
    return Lockstep(batches if known else Stream(batches), **kwargs)


# ---- the number of steps ----------------------------------------------------------------------------------------------


def passes(rank: int, size: int, lengths: list[int], known: bool, policy: str, divide_by_all: bool) -> list[Any]:
    loader = wrapped(lengths, rank, known, policy=policy, divide_by_all=divide_by_all)
    first, second = ([[loader.weight(index), torch.is_tensor(batch)] for index, batch in enumerate(loader)] for _ in range(2))
    assert first == second  # one epoch is like the other
    return [weight for weight, is_batch in first if is_batch]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("lengths", "policy", "divide_by_all", "weights"),
    [
        ([3, 5], "shortest", False, [[1, 1, 1], [1, 1, 1]]),
        ([3, 5], "join", False, [[1, 1, 1, 0, 0], [1, 1, 1, 2, 2]]),
        ([3, 5], "join", True, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        ([2, 1, 3], "join", False, [[1, 1.5, 0], [1, 0, 0], [1, 1.5, 3]]),
        ([0, 2], "join", False, [[0, 0], [2, 2]]),
        ([2, 0], "shortest", False, [[], []]),
        ([0, 0], "join", False, [[], []]),
        ([2, 2], "error", False, [[1, 1], [1, 1]]),
    ],
)
def test_every_process_takes_the_same_number_of_steps(lengths: Any, policy: str, divide_by_all: bool, weights: Any, known: bool) -> None:
    assert run(passes, len(lengths), lengths, known, policy, divide_by_all, timeout=20) == weights


def with_an_error(rank: int, size: int, known: bool) -> list[Any]:
    taken: list[Any] = []
    with pytest.raises(MisconfigurationException) as raised:
        taken.extend(wrapped([3, 5, 3], rank, known, policy="error"))
    return [len(taken), str(raised.value)]


@pytest.mark.parametrize(
    ("known", "taken", "said"),
    [
        (True, 0, "3 batches on rank 0, 5 batches on rank 1, 3 batches on rank 2"),
        (False, 3, "after 3 batches there are none left on rank 0, 2, and 1 of 3 processes have more"),
    ],
)
def test_error_is_raised_in_every_process(known: bool, taken: int, said: str) -> None:
    for steps, message in run(with_an_error, 3, known, timeout=20):
        assert steps == taken
        assert said in message


def with_limits(rank: int, size: int) -> list[Any]:
    loader = wrapped([3, 5], rank, True, policy="join")
    counts = [loader.agree(min(4, [3, 5][rank])), len(loader), len(list(loader)), loader.is_even]
    endless = wrapped([3, 5], rank, True, policy="shortest")
    return [*counts, endless.agree(float("inf")), len(list(endless))]


def test_number_of_batches_can_be_limited_before_it_is_agreed_on() -> None:
    assert run(with_limits, 2) == [[4, 4, 4, False, float("inf"), 3]] * 2


def with_a_wrong_length(rank: int, size: int) -> str:
    class Short(list[Any]):
        def __len__(self) -> int:
            return 4

    with pytest.raises(RuntimeError) as raised:
        list(Lockstep(Short(data(0, 2))))
    return str(raised.value)


def test_loader_that_gives_less_than_its_length_is_named() -> None:
    assert all("has the length 4 and gave 2 batches" in message for message in run(with_a_wrong_length, 2))


def stopping_early(rank: int, size: int) -> list[Any]:
    loader = wrapped([4, 5], rank, False, policy="join")
    for index, _ in enumerate(loader):
        if index == 1:
            break
    return [torch.distributed.get_world_size(), len(list(loader))]  # the unheard answer does not disturb the next pass


def test_pass_can_end_early_in_all_processes() -> None:
    assert run(stopping_early, 2) == [[2, 5]] * 2


def failing(rank: int, size: int) -> None:
    for index, _ in enumerate(wrapped([4, 5], rank, False, policy="join")):
        if index == 1:
            raise ZeroDivisionError("the user's own")


def test_error_of_a_step_waits_for_no_other_process() -> None:
    outcomes = run_to_end(failing, 2, timeout=20)
    assert [outcome.error for outcome in outcomes] == ["ZeroDivisionError"] * 2
    assert all(outcome.seconds < 5 for outcome in outcomes)


def test_one_process_takes_its_own_batches() -> None:
    for loader in (Lockstep([1, 2], "join"), Lockstep(Stream([1, 2]), "error")):
        assert [(batch, loader.weight(index)) for index, batch in enumerate(loader)] == [(1, 1.0), (2, 1.0)]
    with pytest.raises(TypeError, match="not agreed"):
        len(Lockstep([1]))


def test_unknown_policy_raises() -> None:
    with pytest.raises(ValueError, match="policy='longest' is not known"):
        Lockstep([], "longest")


# ---- the numbers ------------------------------------------------------------------------------------------------------


def joined(rank: int, size: int, lengths: list[int], known: bool, sync: bool, accumulate: int) -> dict[str, Any]:
    strategy, module = DDPStrategy(), Net(normalises=sync)
    strategy.layer_sync = TorchSyncBatchNorm() if sync else None
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    step = strategy.bind("training_step")
    loader = wrapped(lengths, rank, known, policy="join")
    for index, batch in enumerate(loader):
        updates = (index + 1) % accumulate == 0
        with torch.enable_grad() if updates else strategy.no_backward_sync(), loader.turn(index, module):
            strategy.backward(step(batch, index) * loader.weight(index) / accumulate)
        if updates:
            optimizer.step()
            optimizer.zero_grad()
    strategy.teardown()
    return plain(strategy.lightning_module_state_dict())


def alone(lengths: list[int], sync: bool, accumulate: int) -> dict[str, Any]:
    """What one process computes on all data that there are at each index."""
    module = Net(normalises=sync)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    everything = [data(rank, length) for rank, length in enumerate(lengths)]
    for index in range(max(lengths)):
        batch = torch.cat([batches[index] for batches in everything if index < len(batches)])
        (module.training_step(batch, index) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return plain(module.state_dict())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("lengths", "sync", "accumulate"),
    [([3, 5], False, 1), ([5, 3], True, 1), ([3, 5], True, 1), ([3, 6], True, 2), ([1, 6, 4], True, 3), ([0, 2], True, 1)],
)
def test_joined_processes_compute_the_mean_over_the_data_that_there_are(
    lengths: list[int], sync: bool, accumulate: int, known: bool
) -> None:
    expected = alone(lengths, sync, accumulate)
    for weights in run(joined, len(lengths), lengths, known, sync, accumulate, timeout=30):
        assert largest_difference(weights, expected) < 2e-6


def test_repeated_batches_leave_no_trace_in_batch_normalisation() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = plain(module.state_dict())
    with batch_norm_held(module):
        module(torch.randn(4, 3)).sum().backward()
    assert plain(module.state_dict()) == before
    module(torch.randn(4, 3))
    assert plain(module.state_dict()) != before
