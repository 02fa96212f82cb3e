"""The code in the README runs as it stands there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def test_code_of_the_readme_learns(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    Path("example.py").write_text(code, encoding="utf-8")

    trainer = runpy.run_path("example.py")["trainer"]

    assert trainer.current_epoch == 5
    guess_of_the_mean = torch.var(torch.sin(6 * torch.rand(1000)) * torch.rand(1000))
    assert trainer.callback_metrics["train/loss"] < guess_of_the_mean / 4
    assert "train/loss" in capsys.readouterr().out


def test_links_of_the_documents_at_the_root_lead_to_files() -> None:
    pages = [README, README.with_name("CONTRIBUTING.md"), README.with_name("CHANGELOG.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))]
    assert len(links) > 5
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []
