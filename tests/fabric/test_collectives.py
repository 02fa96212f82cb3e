"""What several real processes tell each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run, run_to_end

from lightning.fabric import collectives
from lightning.fabric.utilities.exceptions import MisconfigurationException


def reduced(rank: int, size: int) -> dict[str, Any]:
    given = torch.tensor([float(rank + 1), 4.0])
    results = {op: collectives.reduce(given, op).tolist() for op in ("mean", "AVG", "sum", "min", "max", "product")}
    results["native"] = collectives.reduce(given, torch.distributed.ReduceOp.SUM).tolist()
    results["given"] = given.tolist()
    results["integers"] = collectives.reduce(torch.tensor(rank), "mean").tolist()
    results["booleans"] = collectives.reduce(torch.tensor(True), "sum").tolist()
    results["number"] = collectives.reduce(rank + 0.5, "max").tolist()
    results["half"] = collectives.reduce(torch.tensor(rank + 1.0, dtype=torch.bfloat16), "sum").dtype == torch.bfloat16
    results["transposed"] = collectives.reduce(torch.arange(4.0).view(2, 2).t(), "sum").tolist()
    return results


def test_reduce_with_each_operation() -> None:
    expected = {
        "mean": [1.5, 4.0], "AVG": [1.5, 4.0], "sum": [3.0, 8.0], "min": [1.0, 4.0], "max": [2.0, 4.0], "product": [2.0, 16.0],
        "native": [3.0, 8.0], "integers": 0.5, "booleans": 2, "number": 1.5, "half": True, "transposed": [[0.0, 4.0], [2.0, 6.0]],
    }  # fmt: skip
    assert run(reduced, 2) == [{**expected, "given": [1.0, 4.0]}, {**expected, "given": [2.0, 4.0]}]


def test_every_function_returns_what_it_got_without_other_processes() -> None:
    tensor = torch.ones(2)
    assert collectives.reduce(tensor) is tensor
    assert collectives.all_gather(tensor) is tensor
    assert collectives.broadcast("object") == "object"
    assert collectives.gather_object(1) == [1]
    assert collectives.reduce_boolean_decision(False, all=False) is False
    assert collectives.reduce_named({"a": (tensor, "sum")})["a"].tolist() == [1.0, 1.0]
    collectives.barrier()
    collectives.broadcast_tensors([tensor])


def test_unknown_reduction_raises_even_in_one_process() -> None:
    with pytest.raises(ValueError, match="reduce_op='median' is not known"):
        collectives.reduce(torch.ones(1), "median")


def gathered(rank: int, size: int) -> list[Any]:
    return [
        collectives.all_gather(torch.tensor(rank)).tolist(),
        collectives.all_gather(torch.full((1, 2), float(rank))).tolist(),
        list(collectives.all_gather(torch.empty(0, 3)).shape),
        collectives.all_gather(torch.arange(4).view(2, 2).t() + rank)[1].tolist(),
        collectives.gather_object({"rank": rank, "text": "x" * rank}),
    ]


def test_all_gather_stacks_in_the_order_of_ranks() -> None:
    objects = [{"rank": rank, "text": "x" * rank} for rank in range(3)]
    expected = [[0, 1, 2], [[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 2.0]]], [3, 0, 3], [[1, 3], [2, 4]], objects]
    assert run(gathered, 3) == [expected] * 3


def gathered_with_gradient(rank: int, size: int) -> list[Any]:
    tensor = torch.tensor([float(rank + 1)], requires_grad=True)
    everything = collectives.all_gather(tensor, sync_grads=True)
    weights = torch.tensor([[10.0], [100.0]]) * (rank + 1)
    (everything * weights).sum().backward()
    assert tensor.grad is not None
    detached = collectives.all_gather(tensor).requires_grad
    return [tensor.grad.tolist(), detached]


def test_gradients_flow_back_to_where_each_part_came_from() -> None:
    assert run(gathered_with_gradient, 2) == [[[30.0], False], [[300.0], False]]


def broadcasted(rank: int, size: int) -> list[Any]:
    thing = {"path": Path("/a"), "tensor": torch.full((2,), float(rank)), "rank": rank}
    first, last = collectives.broadcast(thing), collectives.broadcast(rank, src=size - 1)
    tensors = [torch.full((2, 2), float(rank)).t(), torch.tensor(rank), torch.nn.Parameter(torch.tensor([float(rank)]))]
    collectives.broadcast_tensors(tensors, src=1)
    return [str(first["path"]), first["tensor"].tolist(), first["rank"], last, [tensor.tolist() for tensor in tensors]]


def test_broadcast_gives_everybody_the_object_of_one() -> None:
    assert run(broadcasted, 3) == [["/a", [0.0, 0.0], 0, 2, [[[1.0, 1.0], [1.0, 1.0]], 1, [1.0]]]] * 3


def decided(rank: int, size: int) -> list[bool]:
    collectives.barrier()
    return [collectives.reduce_boolean_decision(vote, all=all) for vote in (True, rank == 1, False) for all in (True, False)]


def test_decision_of_all_and_of_any() -> None:
    assert run(decided, 2) == [[True, True, False, True, False, False]] * 2


def in_a_subgroup(rank: int, size: int) -> Any:
    group = torch.distributed.new_group([0, 2])
    if rank == 1:
        return None
    named = collectives.reduce_named({"x": (torch.tensor(float(rank)), "sum")}, group)
    return collectives.reduce(torch.tensor(float(rank)), "mean", group).item(), collectives.broadcast(rank, 2, group), named["x"].item()


def test_only_a_group_takes_part() -> None:
    assert run(in_a_subgroup, 3) == [(1.0, 2, 2.0), None, (1.0, 2, 2.0)]


# ---- by name ----------------------------------------------------------------------------------------------------------


def reduced_by_name(rank: int, size: int) -> list[Any]:
    entries = {
        "loss": (torch.tensor(float(rank)), "mean"),
        "count": (torch.tensor(rank + 1), "sum"),
        "best": (torch.tensor(float(rank)), "max"),
        "worst": (torch.tensor([float(rank), -float(rank)]), "min"),
        "weight": (torch.tensor([1.0, rank]), "sum"),
        "exact": (torch.tensor(0.1 + rank, dtype=torch.float64), "sum"),
    }
    calls = []
    all_reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (calls.append(1), all_reduce(*a, **k))[1]
    order = list(entries) if rank == 0 else list(reversed(entries))
    result = collectives.reduce_named({name: entries[name] for name in order})
    empty = collectives.reduce_named({})
    return [{name: value.tolist() for name, value in result.items()}, list(result) == order, len(calls), empty]


def test_values_are_reduced_with_those_of_the_same_name_whatever_the_order() -> None:
    expected = {"loss": 0.5, "count": 3, "best": 1.0, "worst": [0.0, -1.0], "weight": [2.0, 1.0], "exact": 0.1 + 1.1}
    # mean, max, min and sum of float32; sum of int64; sum of float64; and a comparison of names for each of the two calls
    assert run(reduced_by_name, 2) == [[expected, True, 8, {}]] * 2


def with_other_names(rank: int, size: int) -> None:
    names = {"shared", "only_first"} if rank == 0 else {"shared", "only_others"}
    collectives.reduce_named({name: (torch.tensor(1.0), "sum") for name in names})


def with_nothing_on_one_rank(rank: int, size: int) -> None:
    collectives.reduce_named({} if rank == 1 else {"loss": (torch.tensor(1.0), "mean")})


def with_another_kind(rank: int, size: int) -> None:
    collectives.reduce_named({"loss": (torch.tensor(1.0), "sum" if rank == 1 else "mean")})


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (with_other_names, ["rank 0 has no 'only_others'", "rank 1 has no 'only_first'", "rank 2 has no 'only_first'"]),
        (with_nothing_on_one_rank, ["rank 1 has no 'loss'"]),
        (with_another_kind, ["'loss' is the mean of torch.float32 () on rank 0 and the sum of torch.float32 () on rank 1"]),
    ],
)
def test_different_values_raise_on_every_rank_within_seconds(function: Any, said: list[str]) -> None:
    outcomes = run_to_end(function, 3, timeout=30)
    for outcome in outcomes:
        assert outcome.error == MisconfigurationException.__name__
        assert all(text in outcome.message for text in said), outcome.message
        assert outcome.seconds < 5
    assert len({outcome.message for outcome in outcomes}) == 1


def after_a_mismatch(rank: int, size: int) -> float:
    with pytest.raises(MisconfigurationException):
        with_other_names(rank, size)
    return collectives.reduce(torch.tensor(float(rank)), "sum").item()


def test_processes_still_work_together_after_a_mismatch() -> None:
    assert run(after_a_mismatch, 2) == [1.0, 1.0]
