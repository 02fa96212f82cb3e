"""Every test starts in an empty directory of its own, with the same random state and one thread."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Programs that tests, or people with a GPU, start: they hold no doctests, and some look at their arguments when they are imported.
collect_ignore_glob = ["gpu/*.py", "faults/*storm.py"]


def pytest_collection_finish() -> None:
    """Let Python's garbage collector pass over what is there by now, the millions of objects that the tests themselves are made of."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    # A machine of two cores, wherever the tests run: on others a loader without workers is told to have some.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    before = dict(os.environ)
    yield
    # Seeds and addresses travel in the environment: what one test left there must not reach the next.
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
