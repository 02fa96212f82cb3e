"""Hyperparameters on their way from module and datamodule to the loggers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.utilities import log_hyperparams, same, write_hparams


def owner(log: bool = True, **hparams: Any) -> Any:
    return SimpleNamespace(_log_hyperparams=log, hparams_initial=hparams)


def logged(module: Any, datamodule: Any) -> Any:
    """What ends up in hparams.yaml, or None without the file."""
    logger = CSVLogger("logs")
    log_hyperparams(SimpleNamespace(loggers=[logger], lightning_module=module, datamodule=datamodule))  # type: ignore[arg-type]
    path = Path(logger.log_dir, "hparams.yaml")
    return yaml.safe_load(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(
    ("module", "datamodule", "expected"),
    [
        (owner(lr=0.1), None, {"lr": 0.1}),
        (owner(lr=0.1, seed=1), owner(size=4, seed=1), {"lr": 0.1, "size": 4, "seed": 1}),
        (owner(), None, {}),
        (owner(log=False, lr=0.1), owner(lr=0.2), {"lr": 0.2}),
        (owner(log=False, lr=0.1), None, None),
        (owner(lr=0.1, _class_path="a.B", _instantiator="c"), None, {"lr": 0.1}),
    ],
)
def test_hyperparameters_of_both_owners_are_logged(module: Any, datamodule: Any, expected: Any) -> None:
    assert logged(module, datamodule) == expected


def test_hyperparameters_that_disagree_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"\['b', 'c'\].*different values"):
        logged(owner(a=1, b=1, c=1, d=1), owner(a=1, b=2, c="1", e=1))


def test_same_compares_arrays_by_identity() -> None:
    tensor = torch.zeros(2)
    assert same(tensor, tensor)
    assert not same(tensor, torch.zeros(2))
    assert not same(1, 1.0)
    assert same({"a": [1]}, {"a": [1]})


def test_write_hparams_holds_nothing_that_runs_code() -> None:
    write_hparams("hparams.yaml", {"path": Path("a"), "net": torch.nn.ReLU(), "layers": (1, 2), "name": "größe"})
    text = Path("hparams.yaml").read_text(encoding="utf-8")
    assert text == "layers:\n- 1\n- 2\nname: größe\nnet: ReLU()\npath: a\n"
