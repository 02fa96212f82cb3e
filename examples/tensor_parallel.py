"""Train a network whose layers are divided over processes: tensor parallelism, and FSDP2 across the groups that do so.

python examples/tensor_parallel.py                              2 processes divide each layer
python examples/tensor_parallel.py --data 2 --tensor 2          2 groups of 2: each group has half of every batch
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Teacher(torch.utils.data.Dataset):
    """Points, and what a random network makes of them."""

    def __init__(self, count: int, width: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, width, generator=generator)
        self.y = torch.tanh(self.x @ torch.randn(width, width, generator=generator) / width**0.5)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Student(L.LightningModule):
    def __init__(self, width: int = 32, hidden: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.blocks is not None:
            return
        with torch.device("meta"):  # nobody ever holds the whole: each process gets its part below, and then first weights
            size = self.hparams
            self.blocks = nn.Sequential(*(FeedForward(size.width, size.hidden) for _ in range(size.blocks)))
        tensor, data = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        for block in self.blocks:
            # The first two are cut into columns and the third into rows, so that one sum per block brings the parts together.
            parallelize_module(block, tensor, {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=data)
        fully_shard(self.blocks, mesh=data)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.blocks(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", F.mse_loss(self.blocks(x), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=1, help="groups of processes; each has a part of every batch")
    parser.add_argument("--tensor", type=int, default=2, help="processes in a group; each has a part of every layer")
    parser.add_argument("--max-epochs", type=int, default=8)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", type=Path, default=Path("demo_runs/tensor_parallel"))
    args = parser.parse_args()

    L.seed_everything(1)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=args.data * args.tensor,
        strategy=ModelParallelStrategy(args.data, args.tensor),
        gradient_clip_val=1.0,
        logger=CSVLogger(args.output),
        enable_progress_bar=False,
        log_every_n_steps=8,
    )
    model = Student()
    data = Teacher(2048, model.hparams.width)
    trainer.fit(model, DataLoader(data, 64 // args.data, shuffle=True), DataLoader(data, 256))
    trainer.print(f"Loss: {trainer.callback_metrics['val/loss']:.4f}")  # the same for every grid
    weight = model.blocks[0].up.weight
    trainer.print(f"Of a weight of {weight.numel()} numbers each process holds {weight.to_local().numel()}")
    trainer.print(f"Checkpoint: {trainer.checkpoint_callback.best_model_path}")


if __name__ == "__main__":
    main()
