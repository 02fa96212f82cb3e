"""A script that the tests run: a training whose last rank does what the command line says.

``python program.py [--strategy NAME] [--devices N] DEED...``: each deed is the name of one below, and one ``fit`` of a new
Trainer. Where processes are copies of this one, it goes on after a failure, and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.demos.boring_classes import RandomDataset
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.strategies import DDPStrategy

START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork"}


def fail() -> None:
    raise ValueError("bad batch")


def spin() -> None:
    while True:
        pass


# What happens, and in which hook.
DEEDS: dict[str, tuple[str, Callable[[], object]]] = {
    "nothing": ("nowhere", lambda: None),
    "raise_in_training_step": ("training_step", fail),
    "raise_in_validation_step": ("validation_step", fail),
    "raise_in_hook": ("on_train_batch_end", fail),
    "raise_in_prepare_data": ("prepare_data", fail),
    "raise_in_setup": ("setup", fail),
    "raise_in_configure_optimizers": ("configure_optimizers", fail),
    "kill": ("training_step", lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "exit": ("training_step", lambda: sys.exit(3)),
    "hang": ("training_step", lambda: time.sleep(300)),
    "hang_in_validation_step": ("validation_step", lambda: time.sleep(300)),
    "hang_in_hook": ("on_train_batch_end", lambda: time.sleep(300)),
    "hang_in_setup": ("setup", lambda: time.sleep(300)),
    "spin": ("training_step", spin),
    "hold": ("training_step", lambda: re.match("(a+)+$", "a" * 60 + "b")),
    "collect_alone": ("on_train_batch_end", lambda: torch.distributed.barrier()),
}


class Model(LightningModule):
    def __init__(self, deed: str, culprit: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)
        self.prepare_data_per_node = False
        self.place, self.culprit, self.deed = DEEDS[deed][0], culprit, deed

    def at(self, place: str, index: int = 2) -> None:
        if place == self.place and index == 2 and (self.trainer.global_rank == self.culprit or place == "prepare_data"):
            DEEDS[self.deed][1]()

    def prepare_data(self) -> None:
        self.at("prepare_data")

    def setup(self, stage: str) -> None:
        self.at("setup")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.at("training_step", batch_idx)
        loss: Tensor = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.at("on_train_batch_end", batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.at("validation_step", batch_idx)
        self.log("val_loss", self.layer(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        self.at("configure_optimizers")
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(RandomDataset(32, 16), batch_size=1)

    val_dataloader = train_dataloader


class Record(Logger):
    """Writes down how it ended."""

    @property
    def name(self) -> str:
        return "record"

    @property
    def version(self) -> int:
        return 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        Path(f"finalized-{os.environ.get('RANK') or os.environ.get('LOCAL_RANK')}").write_text(status)


class Hear(Callback):
    """Writes down that the run has failed."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Path(f"heard-{trainer.global_rank}").write_text(type(exception).__name__)


def fit(deed: str, arguments: argparse.Namespace) -> int:
    trainer = Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        num_nodes=arguments.nodes,
        strategy=DDPStrategy(
            start_method=START_METHODS[arguments.strategy],  # type: ignore[arg-type]
            timeout=timedelta(seconds=120),
            watchdog_timeout=timedelta(seconds=arguments.limit),
        ),
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=4,
        logger=Record(),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Hear(),
            OnExceptionCheckpoint(Path("exception"), filename="failed"),
            ModelCheckpoint(Path("best"), every_n_train_steps=1, save_on_exception=True),
        ],
    )
    culprit = arguments.culprit if arguments.culprit >= 0 else arguments.devices * arguments.nodes - 1
    trainer.fit(Model(deed, culprit))
    return int(trainer.global_step)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("deeds", nargs="+")
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--culprit", type=int, default=-1)
    parser.add_argument("--limit", type=float, default=60.0)
    arguments = parser.parse_args()
    for deed in arguments.deeds:
        began = time.monotonic()
        try:
            result: Any = fit(deed, arguments)
        except Exception as error:
            if arguments.strategy == "ddp":
                raise
            result = f"{type(error).__name__}: {error}"
        sys.stdout.write(f"@{json.dumps([deed, result, time.monotonic() - began])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
