"""A checkpoint in the middle of an accumulation window of several processes: they go on to the same bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.layers(batch) * 1.7 - batch.sum(1, keepdim=True)).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(36, 5, generator=torch.Generator().manual_seed(5)), batch_size=2)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class SavingWithinWindows(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(f"{batch_idx}.ckpt")


def fit(rank: int, size: int) -> Any:
    def weights_of(ckpt_path: str | None) -> list[float]:
        model = Net()
        callbacks: list[Callback] = [SavingWithinWindows()] if ckpt_path is None else []
        Trainer(
            max_epochs=1, accelerator="cpu", strategy=DDPStrategy(), devices=size, accumulate_grad_batches=4, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        ).fit(model, ckpt_path=ckpt_path)  # fmt: skip
        return [value for parameter in model.parameters() for value in parameter.flatten().tolist()]

    whole = weights_of(None)
    return [batch for batch in range(8) if weights_of(f"{batch}.ckpt") != whole]


def test_two_processes_go_on_to_the_same_bits_from_any_batch_of_a_window() -> None:
    assert run(fit, 2, timeout=200) == [[], []]
