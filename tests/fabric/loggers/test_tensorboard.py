"""TensorBoard's event files, read back with its own reader."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.loggers.logger import DummyExperiment
from lightning.fabric.utilities.rank_zero import rank_zero_only


def events(folder: str) -> EventAccumulator:
    accumulator = EventAccumulator(folder, size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    accumulator = events(folder)
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def hparams(folder: str) -> tuple[dict[str, Any], list[str]]:
    """The hyperparameters and the names of the metrics that TensorBoard's dashboard shows."""
    content = events(folder).PluginTagToContent("hparams")
    session = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in session.hparams.items()}
    return values, [info.name.tag for info in experiment.metric_infos]


@pytest.mark.parametrize(
    ("arguments", "log_dir"),
    [
        ({}, "root/lightning_logs/version_0"),
        ({"name": None}, "root/version_0"),
        ({"version": 3}, "root/lightning_logs/version_3"),
        ({"version": "best", "sub_dir": "a"}, "root/lightning_logs/best/a"),
        ({"sub_dir": Path("a/b")}, "root/lightning_logs/version_0/a/b"),
    ],
)
def test_log_dir_is_made_of_root_name_version_and_sub_dir(arguments: dict[str, Any], log_dir: str) -> None:
    logger = TensorBoardLogger(Path("root"), **arguments)
    assert (logger.root_dir, logger.log_dir) == ("root", log_dir)
    sub_dir = arguments.get("sub_dir")
    assert logger.sub_dir == (None if sub_dir is None else str(sub_dir))
    logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    assert scalars(log_dir) == {"a": [(0, 1.0)]}


def test_log_dir_expands_the_home_folder_and_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PART", "part")
    assert TensorBoardLogger("~/logs", version="v", sub_dir="$PART").log_dir == f"{tmp_path}/logs/lightning_logs/v/part"


def test_version_rises_when_a_run_has_begun() -> None:
    for expected in range(3):
        logger = TensorBoardLogger("logs")
        logger.log_metrics({"a": 1.0})
        logger.finalize("success")
        assert logger.version == expected


def test_metrics_of_every_kind_of_number_are_written() -> None:
    logger = TensorBoardLogger("logs")
    logger.log_metrics({"float": 1.5, "tensor": torch.tensor([2.5]), "int": 3, "bool": True, "np": np.float32(4.5)}, step=7)
    logger.log_metrics({"val/acc": 0.5})
    logger.save()
    assert scalars(logger.log_dir) == {
        "float": [(7, 1.5)],
        "tensor": [(7, 2.5)],
        "int": [(7, 3.0)],
        "bool": [(7, 1.0)],
        "np": [(7, 4.5)],
        "val/acc": [(0, 0.5)],
    }


def test_dict_values_lie_in_folders_of_their_own() -> None:
    logger = TensorBoardLogger("logs", prefix="p")
    logger.log_metrics({"loss": {"train": 1.0, "val": torch.tensor(2.0)}, "a": 3.0}, step=5)
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"p-a": [(5, 3.0)]}
    assert scalars(f"{logger.log_dir}/p-loss_train") == {"p-loss": [(5, 1.0)]}
    assert scalars(f"{logger.log_dir}/p-loss_val") == {"p-loss": [(5, 2.0)]}


@pytest.mark.parametrize("value", ["text", None, 1j, [1.0]])
def test_metrics_that_cannot_be_drawn_are_named(value: Any) -> None:
    logger = TensorBoardLogger("logs")
    with pytest.raises(ValueError, match=r"'bad' is .* which TensorBoard cannot draw"):
        logger.log_metrics({"bad": value}, step=0)
    with pytest.raises(ValueError, match=r"'group/bad' is .* which TensorBoard cannot draw"):
        logger.log_metrics({"group": {"bad": value}}, step=0)
    with pytest.raises(ValueError, match="'bad' is a tensor of shape"):
        logger.log_metrics({"bad": torch.zeros(2)}, step=0)
    logger.finalize("failed")


def test_hyperparameters_come_with_a_default_metric() -> None:
    logger = TensorBoardLogger("logs")
    logger.log_hyperparams({"lr": 0.1, "net": {"act": torch.nn.ReLU(), "layers": (1, 2)}, "none": None, "flag": True})
    logger.save()
    assert scalars(logger.log_dir) == {"hp_metric": [(0, -1.0)]}
    values = {"lr": 0.1, "net/act": "ReLU()", "net/layers": "(1, 2)", "none": "None", "flag": True}
    assert hparams(logger.log_dir) == (values, ["hp_metric"])


@pytest.mark.parametrize(
    ("metrics", "step", "expected"),
    [
        ({"m": torch.tensor(1.5), "k": 2}, None, {"m": [(0, 1.5)], "k": [(0, 2.0)]}),
        ({"m": 1.5}, 10, {"m": [(10, 1.5)]}),
        (0.5, None, {"hp_metric": [(0, 0.5)]}),
        (torch.tensor(0.5), 3, {"hp_metric": [(3, 0.5)]}),
    ],
)
def test_hyperparameters_come_with_given_metrics(metrics: Any, step: int | None, expected: dict[str, Any]) -> None:
    logger = TensorBoardLogger("logs")
    logger.log_hyperparams({"lr": 0.1}, metrics, step)
    logger.save()
    assert scalars(logger.log_dir) == expected
    assert hparams(logger.log_dir) == ({"lr": 0.1}, list(expected))


def test_prefix_is_in_the_metrics_that_the_dashboard_looks_for() -> None:
    logger = TensorBoardLogger("logs", prefix="p")
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    assert list(scalars(logger.log_dir)) == hparams(logger.log_dir)[1] == ["p-hp_metric"]


@pytest.mark.parametrize("metrics", [None, {}])
def test_hyperparameters_without_any_metric_are_not_written(metrics: Any) -> None:
    logger = TensorBoardLogger("logs", default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1}, metrics)
    logger.save()
    assert scalars(logger.log_dir) == {}


def test_graph_is_traced_from_the_input() -> None:
    logger = TensorBoardLogger("logs")
    logger.log_graph(torch.nn.Linear(2, 1), torch.zeros(1, 2))
    logger.save()
    assert events(logger.log_dir).Tags()["graph"]


def test_graph_is_traced_from_the_models_example_in_eval_mode() -> None:
    logger = TensorBoardLogger("logs")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    model.example_input_array = (torch.ones(4, 2),)  # type: ignore[assignment]
    before = torch.get_rng_state(), model[0].running_mean.clone()  # type: ignore[union-attr, operator]
    logger.log_graph(model)
    logger.save()
    assert events(logger.log_dir).Tags()["graph"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(model[0].running_mean, before[1])  # type: ignore[arg-type]
    assert model.training


@pytest.mark.parametrize(
    ("example", "message"), [(None, "there is no example of its input"), ("text", "of type str, which cannot be traced")]
)
def test_graph_without_a_usable_input_warns(example: Any, message: str) -> None:
    logger = TensorBoardLogger("logs")
    with pytest.warns(UserWarning, match=message):
        logger.log_graph(torch.nn.Linear(2, 1), example)
    logger.save()
    assert not events(logger.log_dir).Tags()["graph"]


def test_resuming_appends_events() -> None:
    for step in (0, 1):
        logger = TensorBoardLogger("logs", version=0)
        logger.log_metrics({"loss": float(step)}, step=step)
        logger.finalize("success")
    assert scalars("logs/lightning_logs/version_0") == {"loss": [(0, 0.0), (1, 1.0)]}


def test_logging_goes_on_after_finalize() -> None:
    logger = TensorBoardLogger("logs")
    logger.log_metrics({"loss": 0.0}, step=0)
    logger.finalize("success")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"loss": [(0, 0.0), (1, 1.0)]}


def test_finalize_of_an_unused_logger_leaves_no_folder() -> None:
    TensorBoardLogger("logs").finalize("success")
    assert os.listdir() == []


def test_keywords_reach_the_summary_writer() -> None:
    logger = TensorBoardLogger("logs", filename_suffix=".mine", flush_secs=3)
    logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    assert logger.experiment.flush_secs == 3
    assert os.listdir(logger.log_dir)[0].endswith(".mine")
    with pytest.raises(TypeError, match="nonsense"):
        TensorBoardLogger("logs", nonsense=1).experiment  # noqa: B018


def test_remote_storage_takes_event_files() -> None:
    filesystem = fsspec.filesystem("memory")
    logger = TensorBoardLogger("memory://boards")
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert TensorBoardLogger("memory://boards").version == 1
    assert scalars(logger.log_dir) == {"hp_metric": [(0, -1.0)]}
    filesystem.rm("memory://boards", recursive=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda logger: pickle.loads(pickle.dumps(logger))])
def test_copies_write_to_the_same_folder(duplicate: Any) -> None:
    logger = TensorBoardLogger("logs", sub_dir="s")
    logger.log_metrics({"a": 1.0}, step=0)
    other = duplicate(logger)
    assert other.log_dir == logger.log_dir
    other.log_metrics({"b": 2.0}, step=1)
    logger.finalize("success")
    other.finalize("success")
    assert scalars(logger.log_dir) == {"a": [(0, 1.0)], "b": [(1, 2.0)]}


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = TensorBoardLogger("logs")
    assert isinstance(logger.experiment, DummyExperiment)
    logger.log_metrics({"a": 1.0})
    logger.log_hyperparams({"a": 1})
    logger.log_graph(torch.nn.Linear(1, 1))
    logger.save()
    logger.finalize("success")
    assert os.listdir() == []


def test_construction_loads_no_tensorboard(tmp_path: Path) -> None:
    code = (
        "import sys; from lightning.fabric.loggers import TensorBoardLogger\n"
        "TensorBoardLogger('x'); assert 'tensorboard' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_missing_package_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name.startswith('tensorboard') else find(name, *rest)\n"
        "from lightning.fabric.loggers import TensorBoardLogger\n"
        "try:\n    TensorBoardLogger('logs')\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "pip install tensorboard" in out
    assert "CSVLogger" in out
