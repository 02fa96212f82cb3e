"""The page of differences names a test for each of them, and each of these tests exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "differences.md"
REFERENCE = re.compile(r"`([^`\s]+)::([^`\s]+)`")


def rows() -> list[list[str]]:
    """The cells of each row of the page's tables, without their heads."""
    lines = PAGE.read_text().splitlines()
    heads = {index - 1 for index, line in enumerate(lines) if line.startswith("|---")}
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for index, line in enumerate(lines)
        if line.startswith("|") and not line.startswith("|---") and index not in heads
    ]


def functions(file: Path) -> set[str]:
    """The tests at the top level of a file, which is not imported."""
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


REFERENCES = sorted({reference for row in rows() for reference in REFERENCE.findall(row[-1])})


@pytest.mark.parametrize(("file", "name"), REFERENCES, ids=["::".join(reference) for reference in REFERENCES])
def test_every_test_that_the_page_names_exists(file: str, name: str) -> None:
    path = ROOT / "tests" / file
    assert path.is_file(), f"docs/differences.md names {file}, which is not in tests/"
    assert name.startswith("test_")
    assert name in functions(path), f"docs/differences.md names {name}, which is not in tests/{file}"


def test_every_difference_names_a_test() -> None:
    found = rows()
    assert len(found) > 50
    assert [row for row in found if not REFERENCE.search(row[-1])] == []


def test_every_row_has_the_cells_of_its_table() -> None:
    assert {len(row) for row in rows()} == {2, 3}
    assert [row for row in rows() if not all(row)] == []


def test_what_lightning_does_wrong_comes_first() -> None:
    headings = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert headings[0] == "Right where Lightning is wrong"
