"""A script that the tests run on two machines: a training that tells where each of its processes is.

``python program.py [--devices N] [--deed DEED]``: the last rank does the deed, in its third batch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import RandomDataset
from lightning.pytorch.strategies import DDPStrategy


def fail() -> None:
    raise ValueError("bad batch")


DEEDS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "raise": fail,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class Data(LightningDataModule):
    def __init__(self, per_node: bool) -> None:
        super().__init__()
        self.prepare_data_per_node = per_node

    def prepare_data(self) -> None:
        assert self.trainer is not None
        Path(f"prepared-by-{self.trainer.global_rank}").touch()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(RandomDataset(8, 32), batch_size=2)


class Model(LightningModule):
    def __init__(self, deed: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 2)
        self.deed = deed
        self.seen = 0.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2 and self.trainer.global_rank == self.trainer.world_size - 1:
            DEEDS[self.deed]()
        self.seen += float(batch.sum())
        loss: Tensor = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--deed", default="nothing")
    parser.add_argument("--per-node", action="store_true")
    arguments = parser.parse_args()
    seed_everything(7)
    trainer = Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        num_nodes=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model(arguments.deed)
    trainer.fit(model, datamodule=Data(arguments.per_node))
    report = {
        "ranks": [trainer.global_rank, trainer.node_rank, trainer.local_rank],
        "world_size": trainer.world_size,
        "steps": trainer.global_step,
        "weights": [parameter.tolist() for parameter in model.parameters()],
        "seen": model.seen,
    }
    sys.stdout.write(f"@{json.dumps(report)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
