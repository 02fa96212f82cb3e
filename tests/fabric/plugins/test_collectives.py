"""The documented collective classes, in one process and in several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import free_port, run

from lightning.fabric.plugins.collectives import Collective, SingleDeviceCollective, TorchCollective


def life_of_a_group(rank: int, size: int, port: int) -> list[Any]:
    collective = TorchCollective()
    before = (collective.is_available(), collective.is_initialized())
    with pytest.raises(RuntimeError, match="does not own a group"):
        _ = collective.group
    with pytest.raises(RuntimeError, match="does not own a group"):
        collective.teardown()
    made = collective.setup(main_address="127.0.0.1", main_port=str(port), backend="gloo", rank=rank, world_size=size)
    assert made is collective
    assert collective.manages_default_group
    with pytest.raises(RuntimeError, match="already owns a group"):
        collective.create_group()
    during = (collective.rank, collective.world_size, collective.is_initialized(), "MASTER_PORT" in os.environ)
    guest = TorchCollective().setup()
    assert guest.group is collective.group
    guest.teardown()
    assert collective.is_initialized()  # the guest left what it had not made
    part = TorchCollective().create_group(ranks=[0])
    if rank == 0:
        assert (part.rank, part.world_size) == (0, 1)
    part.teardown()
    collective.teardown()
    return [before, during, collective.is_initialized()]


def test_group_is_made_used_and_left() -> None:
    results = run(life_of_a_group, 2, free_port(), group=False)
    assert results == [[(True, False), (rank, 2, True, False), False] for rank in range(2)]


def every_operation(rank: int, size: int) -> dict[str, Any]:
    c = TorchCollective().setup()
    here = torch.tensor([float(rank)])

    def empty(count: int = size) -> list[torch.Tensor]:
        return [torch.zeros(1) for _ in range(count)]

    parts = [torch.tensor([10.0 * rank]), torch.tensor([10.0 * rank + 1])]
    objects: list[Any] = [None] * size
    result = {
        "broadcast": c.broadcast(here.clone(), 1),
        "sum": c.all_reduce(here.clone()),
        "max": c.all_reduce(here.clone(), "MAX"),
        "native": c.all_reduce(here.clone(), torch.distributed.ReduceOp.SUM),
        "reduce": c.reduce(here.clone(), 0) if rank == 0 else (c.reduce(here.clone(), 0), torch.ones(1))[1],
        "all_gather": c.all_gather(empty(), here),
        "gather": c.gather(here, empty(size if rank == 0 else 0)),
        "scatter": c.scatter(torch.zeros(1), parts if rank == 0 else []),
        "reduce_scatter": c.reduce_scatter(torch.zeros(1), parts),
        "all_to_all": c.all_to_all(empty(), parts),
        "objects": c.all_gather_object(objects, rank),
        "object_list": c.broadcast_object_list([rank, "x"], 1),
        "gathered_objects": c.gather_object(rank, [None] * size if rank == 0 else None),  # type: ignore[arg-type]
        "scattered_objects": c.scatter_object_list([None], ["a", "b"] if rank == 0 else [None, None]),
    }
    if rank == 0:
        c.send(torch.tensor([5.0]), 1)
    else:
        result["received"] = c.recv(torch.zeros(1), 0)
    c.barrier()
    c.monitored_barrier()
    with pytest.raises(ValueError, match="op='bogus' is not a member of `ReduceOp`"):
        c.all_reduce(here, "bogus")

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) else [plain(v) for v in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in result.items()}


def test_every_operation_between_two_processes() -> None:
    both = {
        "broadcast": [1.0], "sum": [1.0], "max": [1.0], "native": [1.0], "reduce": [1.0], "all_gather": [[0.0], [1.0]],
        "objects": [0, 1], "object_list": [1, "x"],
    }  # fmt: skip
    first = {
        "gather": [[0.0], [1.0]], "scatter": [0.0], "reduce_scatter": [10.0], "all_to_all": [[0.0], [10.0]],
        "gathered_objects": [0, 1], "scattered_objects": ["a"],
    }  # fmt: skip
    second = {
        "gather": [], "scatter": [1.0], "reduce_scatter": [12.0], "all_to_all": [[1.0], [11.0]],
        "gathered_objects": None, "scattered_objects": ["b"], "received": [5.0],
    }  # fmt: skip
    assert run(every_operation, 2) == [{**both, **first}, {**both, **second}]


def test_single_process_gives_back_what_it_got() -> None:
    c = SingleDeviceCollective()
    assert (c.rank, c.world_size, c.is_available(), c.is_initialized()) == (0, 1, True, True)
    assert c.setup() is c
    with pytest.raises(RuntimeError, match="does not own a group"):
        _ = c.group
    assert c.create_group().group.size() == 1
    with pytest.raises(RuntimeError, match="already owns a group"):
        c.create_group()
    tensor, other = torch.ones(2), torch.zeros(2)
    assert c.broadcast(tensor, 0) is tensor
    assert c.all_reduce(tensor, op="sum") is tensor
    assert c.reduce(tensor, dst=0) is tensor
    assert c.recv(tensor) is tensor
    assert c.all_gather([other], tensor)[0] is tensor
    assert c.gather(tensor, [other])[0] is tensor
    assert c.scatter(other, [tensor]) is tensor
    assert c.reduce_scatter(other, [tensor]) is tensor
    assert c.all_to_all([other], [tensor])[0] is tensor
    c.send(tensor, 0)
    c.barrier()
    c.teardown()
    with pytest.raises(RuntimeError, match="does not own a group"):
        c.teardown()


def test_interface_alone_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Collective()  # type: ignore[abstract]
