"""What the contract tests read: the source tree."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"


@dataclass(frozen=True)
class Module:
    """One file of the source tree."""

    name: str
    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def place(self) -> str:
        """Where to look, for messages."""
        return str(self.path.relative_to(ROOT))


def source_modules() -> list[Module]:
    """All modules of the package, by dotted name."""
    found = []
    for path in sorted((SOURCE / "lightning").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.fixture(scope="session")
def modules() -> list[Module]:
    """All modules of the package."""
    found = source_modules()
    assert len(found) > 50
    return found
