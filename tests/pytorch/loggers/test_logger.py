"""The interface of the loggers that a Trainer writes to."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning.pytorch.loggers
from lightning.fabric.loggers.logger import Logger as FabricLogger
from lightning.pytorch.loggers.logger import DummyExperiment, DummyLogger, Logger, merge_dicts


class MinimalLogger(Logger):
    name = "minimal"  # type: ignore[assignment]
    version = 1  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_logger_need_not_define_the_rest() -> None:
    logger = MinimalLogger()
    assert isinstance(logger, FabricLogger)
    assert (logger.save_dir, logger.root_dir, logger.log_dir, logger.group_separator) == (None, None, None, "/")
    logger.after_save_checkpoint(None)  # type: ignore[arg-type]
    logger.save()
    logger.finalize("success")


def test_logger_must_define_the_abstract_members() -> None:
    with pytest.raises(TypeError, match=r"log_hyperparams.*log_metrics.*name.*version"):
        Logger()  # type: ignore[abstract]


def test_dummy_logger_accepts_everything() -> None:
    logger = DummyLogger()
    assert (logger.name, logger.version, logger.save_dir, logger.log_dir) == ("", "", None, None)
    assert isinstance(logger.experiment, DummyExperiment)
    assert logger.log_metrics({"a": 1}, step=1) is None  # type: ignore[func-returns-value]
    assert logger.log_hyperparams(1, b=2) is None  # type: ignore[func-returns-value]
    assert logger.log_image("digits", images=[]) is None
    assert logger[0] is logger


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda logger: pickle.loads(pickle.dumps(logger))])
def test_dummy_logger_can_be_copied(duplicate: Any) -> None:
    assert isinstance(duplicate(DummyLogger()), DummyLogger)


def test_merge_dicts_aggregates_key_by_key() -> None:
    dicts = [{"a": 1, "b": {"x": 1, "y": 2}, "c": 3}, {"a": 3, "b": {"x": 5}, "c": 1, "d": 7, "e": None}]
    assert merge_dicts(dicts, agg_key_funcs={"c": min, "b": {"x": max}}) == {"a": 2, "b": {"x": 5, "y": 2}, "c": 1, "d": 7}


def test_merge_dicts_takes_another_default() -> None:
    assert merge_dicts([{"a": 1, "v": {"w": 2}}, {"a": 3, "v": {"w": 3}}], default_func=max) == {"a": 3, "v": {"w": 3}}
    assert merge_dicts([]) == {}


def test_package_exports_are_loaded_on_demand() -> None:
    for name in lightning.pytorch.loggers.__all__:
        assert getattr(lightning.pytorch.loggers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lightning.pytorch.loggers.Nothing  # noqa: B018


def test_importing_the_loggers_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; import lightning.pytorch.loggers\n"
        "assert not [m for m in sys.modules if m.startswith('lightning.pytorch.loggers.')]\n"
        "from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger\n"
        "CSVLogger('x'), TensorBoardLogger('x')\n"
        "assert not {'tensorboard', 'fsspec', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
