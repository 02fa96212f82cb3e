"""TensorBoard's event files and hparams.yaml, as a Trainer writes them."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning.fabric.loggers import TensorBoardLogger as FabricTensorBoardLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger, TensorBoardLogger


class LoggingModel(BoringModel):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/x", float(batch_idx))
        return super().training_step(batch, batch_idx)


class GraphModel(BoringModel):
    """Doubles its input on the way to the device, so that a graph traced without the hooks would have no such input."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        self.example_input_array = example
        self.calls: list[str] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        return torch.cat([batch, batch], dim=1) if isinstance(batch, torch.Tensor) else batch


def events(folder: str) -> EventAccumulator:
    accumulator = EventAccumulator(folder, size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    accumulator = events(folder)
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def hparams_of(logger: TensorBoardLogger) -> Any:
    return yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())


def fit(model: LightningModule, logger: Any, **arguments: Any) -> Trainer:
    trainer = Trainer(
        logger=logger, max_epochs=1, log_every_n_steps=1, limit_train_batches=2, limit_val_batches=0, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **arguments,
    )  # fmt: skip
    trainer.fit(model)
    return trainer


def test_folders_are_made_of_save_dir_name_version_and_sub_dir() -> None:
    logger = TensorBoardLogger(Path("root"), name="n", version=2, sub_dir="s")
    assert isinstance(logger, Logger)
    assert isinstance(logger, FabricTensorBoardLogger)
    assert (logger.save_dir, logger.root_dir, logger.log_dir, logger.sub_dir) == ("root", "root/n", "root/n/version_2/s", "s")


def test_save_writes_hyperparameters_as_plain_yaml() -> None:
    logger = TensorBoardLogger("logs")
    logger.log_hyperparams(Namespace(lr=0.1, path=Path("a"), net={"act": torch.nn.ReLU(), "sizes": (1, 2)}))
    logger.save()
    assert hparams_of(logger) == {"lr": 0.1, "path": "a", "net": {"act": "ReLU()", "sizes": [1, 2]}}
    assert logger.hparams["path"] == Path("a")
    assert scalars(logger.log_dir) == {"hp_metric": [(0, -1.0)]}
    logger.log_hyperparams({"seed": 3}, {"acc": 0.5})
    logger.save()
    assert hparams_of(logger)["seed"] == 3


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_save_writes_an_empty_file_without_hyperparameters(default_hp_metric: bool) -> None:
    logger = TensorBoardLogger("logs", default_hp_metric=default_hp_metric)
    logger.log_metrics({"a": 1.0})
    logger.save()
    assert hparams_of(logger) == {}


def test_resuming_keeps_the_hyperparameters_of_the_first_run() -> None:
    for lr in (0.1, 0.2):
        logger = TensorBoardLogger("logs", version=0)
        logger.log_hyperparams({"lr": lr})
        logger.finalize("success")
    assert hparams_of(logger) == {"lr": 0.1}


def test_finalize_of_a_failed_run_writes_the_hyperparameters() -> None:
    logger = TensorBoardLogger("logs")
    logger.log_hyperparams({"lr": torch.tensor([1, 2])})
    logger.finalize("failed")
    assert hparams_of(logger) == {"lr": "tensor([1, 2])"}


def test_finalize_of_an_unused_logger_leaves_no_folder() -> None:
    TensorBoardLogger("logs").finalize("success")
    assert os.listdir() == []


def test_remote_storage_takes_everything() -> None:
    filesystem = fsspec.filesystem("memory")
    logger = TensorBoardLogger("memory://board", name=None)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert filesystem.cat_file("memory://board/version_0/hparams.yaml") == b"lr: 0.1\n"
    assert TensorBoardLogger("memory://board", name=None).version == 1
    filesystem.rm("memory://board", recursive=True)


def test_graph_is_traced_behind_the_modules_transfer_hooks() -> None:
    logger = TensorBoardLogger("logs", log_graph=True)
    model = GraphModel(torch.zeros(1, 16))
    logger.log_graph(model)
    logger.save()
    assert model.calls == ["before", "after"]
    assert events(logger.log_dir).Tags()["graph"]
    assert "trainer" not in model._modules


def test_graph_takes_an_input_in_place_of_the_example() -> None:
    logger = TensorBoardLogger("logs", log_graph=True)
    logger.log_graph(GraphModel(None), torch.zeros(1, 16))
    logger.save()
    assert events(logger.log_dir).Tags()["graph"]


def test_graph_is_left_out_unless_asked_for() -> None:
    logger = TensorBoardLogger("logs")
    model = GraphModel(torch.zeros(1, 16))
    logger.log_graph(model)
    logger.save()
    assert model.calls == []
    assert not events(logger.log_dir).Tags()["graph"]


@pytest.mark.parametrize(("example", "message"), [(None, "no example of its input"), ("text", "of type str")])
def test_graph_without_a_usable_example_warns(example: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        TensorBoardLogger("logs", log_graph=True).log_graph(GraphModel(example))


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = TensorBoardLogger("logs", log_graph=True)
    logger.log_metrics({"a": 1.0})
    logger.log_hyperparams({"a": 1})
    logger.log_graph(GraphModel(None))
    logger.save()
    logger.finalize("success")
    assert os.listdir() == []


def test_trainer_first_logs_hyperparameters_and_their_metric() -> None:
    logger = TensorBoardLogger("logs")
    fit(LoggingModel(), logger)
    assert hparams_of(logger) == {"lr": 0.1}
    assert scalars(logger.log_dir) == {
        "hp_metric": [(0, -1.0)],
        "train/x": [(0, 0.0), (1, 1.0)],
        "epoch": [(0, 0.0), (1, 0.0)],
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_trainer_logs_the_graph_in_every_precision(precision: Any) -> None:
    logger = TensorBoardLogger("logs", log_graph=True)
    model = LoggingModel()
    model.example_input_array = torch.zeros(1, 32)
    fit(model, logger, precision=precision)
    assert events(logger.log_dir).Tags()["graph"]
