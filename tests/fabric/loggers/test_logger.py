"""The interface of loggers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import lightning.fabric.loggers
from lightning.fabric.loggers.logger import DummyExperiment, Logger, rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only


class MinimalLogger(Logger):
    name = "minimal"  # type: ignore[assignment]
    version = 1  # type: ignore[assignment]
    saved = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None:
        self.saved += 1

    @property
    @rank_zero_experiment
    def experiment(self) -> str:
        """The docstring."""
        return "real"


@pytest.mark.parametrize("missing", ["name", "version", "log_metrics", "log_hyperparams"])
def test_logger_must_define(missing: str) -> None:
    members = {key: getattr(MinimalLogger, key) for key in ("name", "version", "log_metrics", "log_hyperparams") if key != missing}
    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (Logger,), members)()


def test_logger_need_not_define_the_rest() -> None:
    logger = MinimalLogger()
    assert (logger.root_dir, logger.log_dir, logger.group_separator) == (None, None, "/")
    logger.log_graph(None)  # type: ignore[arg-type]
    logger.finalize("success")
    assert logger.saved == 1


def test_experiment_is_real_on_rank_zero_only(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MinimalLogger()
    assert logger.experiment == "real"
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert isinstance(logger.experiment, DummyExperiment)
    assert MinimalLogger.experiment.fget.__doc__ == "The docstring."


def test_dummy_experiment_accepts_everything() -> None:
    experiment = DummyExperiment()
    assert experiment.add_scalar("a", 1, step=2) is None
    assert experiment[3] is experiment
    assert experiment["key"].log("x") is None
    experiment[0] = 1
    for duplicate in (copy.deepcopy(experiment), pickle.loads(pickle.dumps(experiment))):
        assert isinstance(duplicate, DummyExperiment)


def test_package_exports_are_loaded_on_demand() -> None:
    for name in lightning.fabric.loggers.__all__:
        assert getattr(lightning.fabric.loggers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lightning.fabric.loggers.Nothing  # noqa: B018
