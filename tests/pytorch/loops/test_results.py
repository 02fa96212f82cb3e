"""The table of metrics that ``validate`` and ``test`` print."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch import Tensor

from lightning.pytorch.loops.results import print_results

RESULTS = [{"b": 0.123456789, "a/dataloader_idx_0": 1.0}, {"b": 0.5, "a/dataloader_idx_1": 1e-9, "only": 2e7}]
CELLS = [
    ["Test metric", "DataLoader 0", "DataLoader 1"],
    ["a", "1", "1e-09"],
    ["b", "0.12345679", "0.5"],
    ["only", "", "20000000"],
]


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Rich were not installed."""
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)


def cells(lines: list[str], separators: str) -> list[list[str]]:
    """The cells of lines whose columns have one of these characters between them."""
    return [[cell.strip() for cell in line.strip(separators).replace(separators[0], separators[1]).split(separators[1])] for line in lines]


def test_rich_draws_a_frame(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(RESULTS, "test")
    lines = capsys.readouterr().out.splitlines()
    assert cells([line for line in lines if line[0] in "┃│"], "┃│") == CELLS
    assert {line[0] for line in lines} == set("┏┃┡│└")


def test_names_are_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{'a long name of a metric ' * 4}{i}" for i in range(2)]
    print_results([dict.fromkeys(names, 1.0)] * 3, "validate")
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip("│").split("│")[0].strip() for line in lines if line.startswith("│")] == names


@pytest.mark.usefixtures("without_rich")
def test_without_rich_the_table_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(RESULTS, "test")
    lines = capsys.readouterr().out.splitlines()
    assert set(lines[0]) == set(lines[2]) == set(lines[-1]) == {"─"}
    starts = [0, lines[1].index("DataLoader 0"), lines[1].index("DataLoader 1")]
    ends = [*starts[1:], None]
    assert [[line[slice(*span)].strip() for span in zip(starts, ends)] for line in (lines[1], *lines[3:-1])] == CELLS


def test_nothing_logged_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_results([{}, {}], "test")
    assert capsys.readouterr().out == ""


def test_trainer_prints_a_table_unless_told_not_to(
    Weight: Any, make_trainer: Any, numbers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Model(Weight):  # type: ignore[misc]
        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            self.log("mean", batch.mean())

    make_trainer().test(Model(), [numbers(1), numbers(1, start=1)])
    lines = capsys.readouterr().out.splitlines()
    assert cells([line for line in lines if line.startswith("│")], "┃│") == [["mean", "0", "1"]]
    make_trainer().test(Model(), [numbers(1), numbers(1, start=1)], verbose=False)
    assert capsys.readouterr().out == ""
