"""A run that is resumed by other code than that which saved its checkpoint: what has changed is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.pytorch import LightningModule


class Net(LightningModule):
    def __init__(self, configure: Any = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.configure = configure or (lambda net: torch.optim.Adam(net.parameters(), lr=0.1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch.new_ones(1, 2)).square().mean()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def test_another_window_of_accumulation_is_told_within_one(make_trainer: Any, numbers: Any) -> None:
    def fit(accumulate: int, ckpt_path: Any = None) -> None:
        trainer = make_trainer(max_steps=-1, max_epochs=1, limit_train_batches=3, accumulate_grad_batches=accumulate)
        trainer.fit(Saving(), numbers(4), ckpt_path=ckpt_path)

    class Saving(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.save_checkpoint(f"{self.trainer.accumulate_grad_batches}-{batch_idx}.ckpt")

    fit(2)
    fit(2, "2-0.ckpt")
    fit(3, "2-1.ckpt")  # the window is over
    with pytest.warns(UserWarning, match=r"after 1 batches of a window of accumulate_grad_batches=2, and it is 3 now"):
        fit(3, "2-0.ckpt")
