"""Metrics as rows of a CSV file, hyperparameters as YAML beside it."""

from __future__ import annotations

import copy
import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from lightning.fabric.loggers import CSVLogger as FabricCSVLogger
from lightning.fabric.loggers.logger import DummyExperiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class LoggingModel(BoringModel):
    def __init__(self, lr: float = 0.1, root: Path = Path("data")) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train", float(batch_idx))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", 2.0)


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def hparams_of(logger: CSVLogger) -> Any:
    return yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())


def fit(model: LightningModule, logger: Any, max_epochs: int = 1, **arguments: Any) -> Trainer:
    trainer = Trainer(
        logger=logger, max_epochs=max_epochs, log_every_n_steps=1, limit_train_batches=2, limit_val_batches=1, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **arguments,
    )  # fmt: skip
    trainer.fit(model)
    return trainer


@pytest.mark.parametrize(
    ("arguments", "root_dir", "log_dir"),
    [
        ({}, "root/lightning_logs", "root/lightning_logs/version_0"),
        ({"name": None}, "root/", "root/version_0"),
        ({"name": "a/b", "version": 3}, "root/a/b", "root/a/b/version_3"),
        ({"version": "best"}, "root/lightning_logs", "root/lightning_logs/best"),
    ],
)
def test_folders_are_made_of_save_dir_name_and_version(arguments: dict[str, Any], root_dir: str, log_dir: str) -> None:
    logger = CSVLogger(Path("root"), **arguments)
    assert isinstance(logger, Logger)
    assert isinstance(logger, FabricCSVLogger)
    assert (logger.save_dir, logger.root_dir, logger.log_dir) == ("root", root_dir, log_dir)


def test_hyperparameters_are_written_as_plain_yaml() -> None:
    logger = CSVLogger("logs")
    logger.log_hyperparams(Namespace(lr=0.1, net={"act": torch.nn.ReLU(), "layers": (1, 2)}, path=Path("a"), names={"b", "a"}, none=None))
    assert hparams_of(logger) == {
        "lr": 0.1, "net": {"act": "ReLU()", "layers": [1, 2]}, "path": "a", "names": ["a", "b"], "none": None,
    }  # fmt: skip
    logger.log_hyperparams({"lr": 0.2, "seed": 3})
    assert (hparams_of(logger)["lr"], hparams_of(logger)["seed"], hparams_of(logger)["path"]) == (0.2, 3, "a")
    assert logger.experiment.hparams["path"] == Path("a")
    assert os.listdir(logger.log_dir) == ["hparams.yaml"]


def test_hyperparameters_may_be_absent() -> None:
    logger = CSVLogger("logs")
    logger.log_hyperparams()
    assert hparams_of(logger) == {}
    with pytest.raises(TypeError, match="`params` must be a dict"):
        logger.log_hyperparams([1])  # type: ignore[arg-type]


def test_remote_storage_takes_metrics_and_hyperparameters() -> None:
    filesystem = fsspec.filesystem("memory")
    for step in range(2):
        logger = CSVLogger("memory://runs", name="n", version="v")
        logger.log_metrics({f"m{step}": 1}, step=step)
        logger.log_hyperparams({"step": step})
        logger.finalize("success")
    assert isinstance(logger.experiment, ExperimentWriter)
    assert filesystem.cat_file("memory://runs/n/v/metrics.csv") == b"m0,m1,step\r\n1,,0\r\n,1,1\r\n"
    assert filesystem.cat_file("memory://runs/n/v/hparams.yaml") == b"step: 1\n"
    assert len(filesystem.find("memory://runs")) == 2
    filesystem.rm("memory://runs", recursive=True)


def test_copy_writes_to_the_same_folder() -> None:
    logger = CSVLogger("logs")
    logger.log_metrics({"a": 1}, step=0)
    other = copy.deepcopy(logger)
    other.log_hyperparams({"a": 1})
    assert hparams_of(logger) == {"a": 1}


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger("logs")
    assert isinstance(logger.experiment, DummyExperiment)
    logger.log_metrics({"a": 1})
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert os.listdir() == []


def test_trainer_logs_steps_epochs_and_hyperparameters() -> None:
    logger = CSVLogger("logs")
    trainer = fit(LoggingModel(), logger, max_epochs=2)
    assert trainer.log_dir == logger.log_dir
    assert rows_of(logger) == [
        {"epoch": "0", "step": "0", "train": "0.0", "val": ""},
        {"epoch": "0", "step": "1", "train": "1.0", "val": ""},
        {"epoch": "0", "step": "1", "train": "", "val": "2.0"},
        {"epoch": "1", "step": "2", "train": "0.0", "val": ""},
        {"epoch": "1", "step": "3", "train": "1.0", "val": ""},
        {"epoch": "1", "step": "3", "train": "", "val": "2.0"},
    ]
    assert hparams_of(logger) == {"lr": 0.1, "root": "data"}
    assert os.listdir(f"{logger.log_dir}/checkpoints") == ["epoch=1-step=4.ckpt"]


def test_trainer_resuming_into_the_same_version_keeps_the_rows() -> None:
    trainer = fit(LoggingModel(), CSVLogger("logs", version=0))
    checkpoint = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    again = Trainer(
        logger=CSVLogger("logs", version=0), max_epochs=2, log_every_n_steps=1, limit_train_batches=2, limit_val_batches=1,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="callbacks that this trainer does not have"):
        again.fit(LoggingModel(), ckpt_path=checkpoint)
    assert [row["step"] for row in rows_of(CSVLogger("logs", version=0))] == ["0", "1", "1", "2", "3", "3"]


def test_trainer_with_a_module_that_logs_nothing_writes_no_metrics() -> None:
    logger = CSVLogger("logs")
    fit(BoringModel(), logger, enable_checkpointing=False)
    assert os.listdir(logger.log_dir) == []


def test_trainer_with_two_loggers_gives_each_a_version() -> None:
    loggers = [CSVLogger("logs"), TensorBoardLogger("logs")]
    fit(LoggingModel(), loggers, enable_checkpointing=False)
    assert [logger.version for logger in loggers] == [0, 1]
    assert sorted(os.listdir("logs/lightning_logs/version_0")) == ["hparams.yaml", "metrics.csv"]
    assert "hparams.yaml" in os.listdir("logs/lightning_logs/version_1")


def test_trainer_writes_what_a_failing_run_has_logged() -> None:
    class Failing(LoggingModel):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("out of luck")

    logger = CSVLogger("logs")
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Failing(), logger)
    assert [row["train"] for row in rows_of(logger)][:2] == ["0.0", "1.0"]


class ConfiguredData(BoringDataModule):
    def __init__(self, lr: float = 0.1, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_trainer_logs_hyperparameters_of_module_and_data_together() -> None:
    logger = CSVLogger("logs")
    trainer = Trainer(
        logger=logger, fast_dev_run=False, max_steps=1, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(LoggingModel(), datamodule=ConfiguredData())
    assert hparams_of(logger) == {"lr": 0.1, "root": "data", "batch_size": 4}


def test_trainer_refuses_hyperparameters_that_disagree() -> None:
    trainer = Trainer(logger=CSVLogger("logs"), max_steps=1, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match=r"\['lr'\].*different values"):
        trainer.fit(LoggingModel(), datamodule=ConfiguredData(lr=0.2))
