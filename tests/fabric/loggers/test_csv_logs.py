"""Metrics as rows of a CSV file."""

from __future__ import annotations

import copy
import csv
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lightning.fabric.loggers import CSVLogger
from lightning.fabric.loggers.logger import DummyExperiment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.rank_zero import rank_zero_only


class WriteOnceFileSystem(MemoryFileSystem):
    """Like an object store without appending."""

    protocol = "writeonce"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("writeonce://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "a" in mode:
            raise NotImplementedError("objects do not grow")
        return super()._open(path, mode, **kwargs)


fsspec.register_implementation("writeonce", WriteOnceFileSystem, clobber=True)


@pytest.fixture(params=["local", "file", "memory", "writeonce"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on each kind of storage."""
    if request.param == "local":
        yield str(tmp_path / "logs")
    elif request.param == "file":
        yield f"file://{tmp_path}/logs"
    else:
        url = f"{request.param}://logs"
        yield url
        if get_filesystem(url).exists(url):
            get_filesystem(url).rm(url, recursive=True)


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    path = logger.experiment.metrics_file_path
    with get_filesystem(path).open(path, "r", newline="") as file:
        return list(csv.DictReader(file))


def files_of(folder: str) -> list[str]:
    return sorted(os.path.basename(name) for name in get_filesystem(folder).find(folder))


@pytest.mark.parametrize(
    ("arguments", "log_dir"),
    [
        ({}, "root/lightning_logs/version_0"),
        ({"name": None}, "root/version_0"),
        ({"name": ""}, "root/version_0"),
        ({"name": "a/b", "version": 3}, "root/a/b/version_3"),
        ({"version": "best"}, "root/lightning_logs/best"),
        ({"version": ""}, "root/lightning_logs/"),
    ],
)
def test_log_dir_is_made_of_root_name_and_version(arguments: dict[str, Any], log_dir: str) -> None:
    for root in ("root", Path("root")):
        logger = CSVLogger(root, **arguments)
        assert logger.root_dir == "root"
        assert logger.log_dir == log_dir
        assert logger.name == (arguments.get("name", "lightning_logs") or "")
    assert CSVLogger("", name="n", version=1).log_dir == "n/version_1"
    assert not os.listdir()


def test_log_dir_expands_the_home_folder_and_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    (tmp_path / "home" / "logs" / "version_4").mkdir(parents=True)
    assert CSVLogger("~/logs", name="").log_dir == f"{tmp_path}/home/logs/version_5"
    assert CSVLogger("$RUNS", name="").log_dir == f"{tmp_path}/runs/version_0"


def test_version_follows_the_highest_folder(tmp_path: Path) -> None:
    for name in ("version_2", "version_10", "version_x", "version_", "other", "version_12_old"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_99").write_text("a file")
    logger = CSVLogger(tmp_path, name=None)
    assert logger.version == 13
    (tmp_path / "version_20").mkdir()
    assert logger.version == 13  # decided once


def test_version_rises_when_a_run_has_begun(root: str) -> None:
    for expected in range(3):
        logger = CSVLogger(root)
        logger.log_metrics({"a": 1})
        logger.save()
        assert logger.version == expected


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="must be a string or a path, but None"):
        CSVLogger(None)  # type: ignore[arg-type]
    for every in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="`flush_logs_every_n_steps` must be a whole number"):
            CSVLogger("logs", flush_logs_every_n_steps=every)  # type: ignore[arg-type]


def test_columns_are_sorted_whenever_they_come(root: str) -> None:
    logger = CSVLogger(root)
    logger.log_metrics({"b": 1.0, "a": torch.tensor(2.5)}, step=4)
    logger.log_metrics({"z": True, "text": "x,\ny", "none": None, "np": np.float64(0.1)}, step=7)
    logger.save()
    logger.log_metrics({"d": 1e-8, "c": 0.1 + 0.2}, step=9)
    logger.save()
    path = logger.experiment.metrics_file_path
    with get_filesystem(path).open(path, "rb") as file:
        assert file.read() == (
            b'a,b,c,d,none,np,step,text,z\r\n2.5,1.0,,,,,4,,\r\n,,,,,0.1,7,"x,\ny",True\r\n,,0.30000000000000004,1e-08,,,9,,\r\n'
        )
    assert logger.experiment.metrics_keys == ["a", "b", "c", "d", "none", "np", "step", "text", "z"]
    assert files_of(logger.log_dir) == ["metrics.csv"]


def test_dict_values_become_a_column_each() -> None:
    logger = CSVLogger("logs", prefix="p")
    logger.log_metrics({"acc": {"top1": torch.tensor(0.5), "top5": 0.9}}, step=0)
    logger.save()
    assert rows_of(logger) == [{"p-acc/top1": "0.5", "p-acc/top5": "0.9", "step": "0"}]


def test_prefix_spares_the_step() -> None:
    logger = CSVLogger("logs", prefix="student")
    logger.log_metrics({"loss": 1, "step": 99}, step=3)
    logger.save()
    assert rows_of(logger) == [{"step": "3", "student-loss": "1", "student-step": "99"}]


def test_tensor_of_several_elements_is_refused_and_leaves_no_row() -> None:
    logger = CSVLogger("logs")
    with pytest.raises(ValueError, match="'m' is a tensor of shape"):
        logger.log_metrics({"a": 1, "m": torch.zeros(2)}, step=0)
    assert logger.experiment.metrics == []


def test_step_counts_rows_when_it_is_not_given(root: str) -> None:
    for _ in range(2):
        logger = CSVLogger(root, version="same")
        for _ in range(3):
            logger.log_metrics({"a": 1})
            logger.save()
    assert [row["step"] for row in rows_of(logger)] == ["0", "1", "2", "3", "4", "5"]


def test_rows_are_held_back_until_the_flush_step() -> None:
    logger = CSVLogger("logs", flush_logs_every_n_steps=3)
    seen = []
    for step in range(6):
        logger.log_metrics({"a": step}, step=step)
        seen.append(len(rows_of(logger)) if os.path.exists(logger.experiment.metrics_file_path) else 0)
    assert seen == [0, 0, 3, 3, 3, 6]


def test_rows_are_held_back_no_longer_than_their_number_allows() -> None:
    logger = CSVLogger("logs", flush_logs_every_n_steps=4)
    for step in range(0, 80, 10):  # step + 1 is never a multiple of 4
        logger.log_metrics({"a": step}, step=step)
    assert len(rows_of(logger)) == 8


def test_resuming_appends_and_merges_the_header(root: str) -> None:
    first = CSVLogger(root, version=0)
    first.log_metrics({"loss": 3.0, "acc": 0.1}, step=0)
    first.finalize("failed")
    second = CSVLogger(root, version=0)
    second.log_metrics({"loss": 2.0}, step=1)
    second.save()
    second.log_metrics({"loss": 1.0, "val": 5.0}, step=2)
    second.finalize("success")
    assert rows_of(second) == [
        {"acc": "0.1", "loss": "3.0", "step": "0", "val": ""},
        {"acc": "", "loss": "2.0", "step": "1", "val": ""},
        {"acc": "", "loss": "1.0", "step": "2", "val": "5.0"},
    ]
    assert files_of(second.log_dir) == ["metrics.csv"]


def test_resuming_deletes_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"a": 1})
    logger.save()
    assert sorted(os.listdir(folder)) == ["metrics.csv", "notes.txt"]


def test_two_writers_of_one_file_keep_each_others_columns() -> None:
    one, two = CSVLogger("logs", version=0), CSVLogger("logs", version=0)
    for step, (logger, name) in enumerate([(one, "a"), (two, "b"), (one, "c"), (two, "a")]):
        logger.log_metrics({name: step}, step=step)
        logger.save()
    assert rows_of(one) == [
        {"a": "0", "step": "0", "b": "", "c": ""},
        {"a": "", "step": "1", "b": "1", "c": ""},
        {"a": "", "step": "2", "b": "", "c": "2"},
        {"a": "3", "step": "3", "b": "", "c": ""},
    ]


def test_resuming_after_half_a_row_starts_a_new_line() -> None:
    folder = Path("logs/lightning_logs/version_0")
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_bytes(b"a,b,step\r\n1,2,0\r\n3,4")
    logger = CSVLogger("logs", version=0)
    logger.log_metrics({"a": 5, "b": 6}, step=2)
    logger.save()
    logger.log_metrics({"c": 7}, step=3)
    logger.save()
    assert [list(row.values()) for row in rows_of(logger)] == [
        ["1", "2", "", "0"],
        ["3", "4", "", ""],
        ["5", "6", "", "2"],
        ["", "", "7", "3"],
    ]


def test_an_empty_file_gets_a_header(root: str) -> None:
    logger = CSVLogger(root, version=0)
    path = logger.experiment.metrics_file_path
    with get_filesystem(path).open(path, "wb"):
        pass
    logger.log_metrics({"a": 1}, step=0)
    logger.save()
    assert rows_of(logger) == [{"a": "1", "step": "0"}]


def test_saving_appends_to_the_file_and_does_not_replace_it() -> None:
    logger = CSVLogger("logs", version=0)
    for step in range(1000):
        logger.log_metrics({"loss": 0.123456789, "acc": 0.987654321}, step=step)
    logger.save()
    inode = os.stat(logger.experiment.metrics_file_path).st_ino
    for step in range(1000, 1010):
        logger.log_metrics({"loss": 0.5}, step=step)
        logger.save()
    assert os.stat(logger.experiment.metrics_file_path).st_ino == inode
    assert len(rows_of(logger)) == 1010


def test_saving_without_rows_writes_nothing(root: str) -> None:
    logger = CSVLogger(root)
    logger.save()
    assert files_of(logger.log_dir) == []


def test_finalize_of_an_unused_logger_leaves_no_folder(tmp_path: Path) -> None:
    CSVLogger(tmp_path).finalize("success")
    assert os.listdir(tmp_path) == []


def test_failed_rewrite_loses_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CSVLogger("logs")
    logger.log_metrics({"a": 1}, step=0)
    logger.save()
    logger.log_metrics({"b": 2}, step=1)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            logger.save()
    assert rows_of(logger) == [{"a": "1", "step": "0"}]
    assert files_of(logger.log_dir) == ["metrics.csv"]
    logger.save()
    assert rows_of(logger) == [{"a": "1", "step": "0", "b": ""}, {"a": "", "step": "1", "b": "2"}]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda logger: pickle.loads(pickle.dumps(logger))])
def test_copies_write_to_the_same_file(duplicate: Any) -> None:
    logger = CSVLogger("logs", prefix="p")
    logger.log_metrics({"a": 1}, step=0)
    other = duplicate(logger)
    assert other.log_dir == logger.log_dir
    assert other._experiment is None
    other.log_metrics({"a": 2}, step=1)
    logger.save()
    other.save()
    assert rows_of(logger) == [{"p-a": "1", "step": "0"}, {"p-a": "2", "step": "1"}]


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger("logs")
    assert isinstance(logger.experiment, DummyExperiment)
    logger.log_metrics({"a": 1})
    logger.log_graph(torch.nn.Linear(1, 1))
    logger.save()
    logger.finalize("success")
    assert logger.log_dir == "logs/lightning_logs/version_0"
    assert os.listdir() == []


def test_hyperparameters_are_not_offered() -> None:
    with pytest.raises(NotImplementedError, match=r"lightning\.pytorch\.loggers\.CSVLogger"):
        CSVLogger("logs").log_hyperparams({"a": 1})


def test_local_logging_needs_no_fsspec(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from lightning.fabric.loggers import CSVLogger\n"
        "logger = CSVLogger('logs'); logger.log_metrics({'a': 1}); logger.save()\n"
        "logger.log_metrics({'b': 1}); logger.save()\n"
        "assert not {'fsspec', 'tensorboard', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
