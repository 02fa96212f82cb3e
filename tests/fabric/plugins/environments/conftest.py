"""Each test begins outside of any cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from lightning.fabric.utilities.rank_zero import rank_zero_only

PREFIXES = ("SLURM_", "MASTER_", "RANK", "LOCAL_", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LSB_", "JSM_", "TORCHELASTIC_", "KUBERNETES_")
Set = Callable[..., None]


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for name in before:
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/nowhere")  # a machine where srun is installed
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    yield
    monkeypatch.undo()  # which may bring back what an environment has set in between
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Set several variables: ``setenv(RANK=1, WORLD_SIZE=2)``; None removes one."""

    def set_all(**variables: object) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return set_all
