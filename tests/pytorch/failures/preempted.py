"""A script that the tests run as tasks of a SLURM job: a training that gets a signal in its middle, or goes on after one.

``python preempted.py [--rank R] [--signal NAME] [--at BATCH]``: that rank sends the signal to itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset


class Model(BoringModel):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(RandomDataset(32, 4000))

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(RandomDataset(32, 4000))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        time.sleep(0.005)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(0.005)


class Preempt(Callback):
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank = trainer.global_rank
        Path(f"pid-{rank}").write_text(f"{os.getpid()}\n")
        Path(f"began-{rank}").write_text(str(trainer.global_step))

    def signal(self, trainer: Trainer, batch_idx: int) -> None:
        if batch_idx == self.arguments.at and trainer.global_rank == self.arguments.rank:
            os.kill(os.getpid(), signal.Signals[self.arguments.signal])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.arguments.validating:
            self.signal(trainer, batch_idx)
        Path(f"step-{trainer.global_rank}").write_text(str(trainer.global_step))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.arguments.validating and not trainer.sanity_checking:
            self.signal(trainer, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Path(f"heard-{trainer.global_rank}").write_text(type(exception).__name__)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--signal", default="SIGUSR1")
    parser.add_argument("--at", type=int, default=3)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--validating", action="store_true")
    parser.add_argument("--resume", default=None)
    arguments = parser.parse_args()
    trainer = Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        max_steps=arguments.steps,
        val_check_interval=20 if arguments.validating else 1.0,
        num_sanity_val_steps=0,
        default_root_dir="runs",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Preempt(arguments)],
    )
    trainer.fit(Model(), ckpt_path=arguments.resume)


if __name__ == "__main__":
    main()
