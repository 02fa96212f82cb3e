"""Flags beside a process group that the user's own code has made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run, run_to_end

from lightning.fabric.runtime import resolve


def ranks(rank: int, size: int, flags: dict[str, Any]) -> list[int]:
    strategy = resolve(accelerator="cpu", **flags).strategy
    return [strategy.world_size, strategy.global_rank, strategy.local_rank, strategy.node_rank]


def test_group_of_as_many_processes_as_the_flags_say_is_used() -> None:
    assert run(ranks, 2, {"strategy": "ddp", "devices": 2}) == [[2, 0, 0, 0], [2, 1, 1, 0]]
    assert run(ranks, 2, {"strategy": "ddp", "devices": 1, "num_nodes": 2}) == [[2, 0, 0, 0], [2, 1, 0, 1]]


@pytest.mark.parametrize("flags", [{"devices": 3}, {"devices": 1}, {"devices": 2, "num_nodes": 2}])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_group_of_another_size_is_refused_in_every_process(flags: dict[str, Any], strategy: str) -> None:
    outcomes = run_to_end(ranks, 2, {"strategy": strategy, **flags})
    assert [outcome.error for outcome in outcomes] == ["MisconfigurationException"] * 2
    assert "already in a process group of 2, which your program has made" in outcomes[0].message
