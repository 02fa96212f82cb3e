"""A script that the tests run: a training that goes on for ever unless a signal ends it.

``python program.py [--strategy NAME] [--devices N] [--workers N] [--steps N] [--resume] [--stands WHERE]``. It writes ``pid-RANK``, and
``ready-RANK`` once three batches are through; how ``fit`` ended is printed where that is not left to Python.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork"}


class Model(BoringModel):
    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments

    def loader(self) -> Any:
        spawned = {"multiprocessing_context": self.arguments.context} if self.arguments.workers else {}
        return torch.utils.data.DataLoader(RandomDataset(32, 100_000), num_workers=self.arguments.workers, **spawned)

    train_dataloader = loader

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 3:
            Path(f"ready-{self.global_rank}").touch()
            if self.arguments.stands == "in_python":
                while True:
                    time.sleep(0.1)
            if self.arguments.stands == "in_a_library":
                stand_in_a_library()
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


def stand_in_a_library() -> None:
    """Wait in C, where Python hears no signals, as in a collective: for a mutex that this thread holds already."""
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


class Notes(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(f"began-{trainer.global_rank}").write_text(str(trainer.global_step))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Path(f"heard-{trainer.global_rank}").write_text(f"{type(exception).__name__} {trainer.global_step}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", default="")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--context", default="fork")
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--catch", action="store_true")
    parser.add_argument("--stands", default="")
    arguments = parser.parse_args()
    Path(f"pid-{os.environ.get('LOCAL_RANK', '0')}").write_text(str(os.getpid()))
    strategy: Any = DDPStrategy(start_method=START_METHODS[arguments.strategy]) if arguments.strategy else "auto"  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        strategy=strategy,
        max_steps=arguments.steps,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Notes(), ModelCheckpoint("run")],
    )
    try:
        trainer.fit(Model(arguments), ckpt_path="auto" if arguments.resume else None)
    except (SIGTERMException, KeyboardInterrupt) as error:
        if not arguments.catch:
            raise
        sys.stdout.write(f"@{json.dumps([type(error).__name__, getattr(error, 'code', None), trainer.interrupted])}\n")


if __name__ == "__main__":
    main()
