"""Train a small network on handwritten digits with a loop of its own, on any device, on several of them, and in any precision.

Run it from the repository::

    python examples/fabric_digits.py --devices 2 --precision bf16-mixed
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.utilities.samplers import UnrepeatedDistributedSampler


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits with a loop of its own.")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--output", type=Path, default=Path("demo_runs/fabric_digits"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # the network is so small that threads would only wait for each other
    fabric = Fabric(
        accelerator=args.accelerator, devices=args.devices, precision=args.precision, loggers=CSVLogger(args.output, name="csv")
    )
    fabric.launch()
    fabric.seed_everything(1)

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, test = random_split(data, [0.8, 0.2])
    each_once = UnrepeatedDistributedSampler(test, fabric.world_size, fabric.global_rank, shuffle=False)
    train_loader, test_loader = fabric.setup_dataloaders(
        DataLoader(train, batch_size=32 // fabric.world_size, shuffle=True), DataLoader(test, batch_size=256, sampler=each_once)
    )

    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=2e-3))
    state = {"model": model, "optimizer": optimizer, "epoch": 0, "accuracy": 0.0}
    for epoch in range(args.max_epochs):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            fabric.backward(loss)
            optimizer.step()

        model.eval()
        with torch.no_grad():
            counts = sum(torch.tensor([(model(x).argmax(1) == y).sum(), len(y)]) for x, y in test_loader)
        right, total = fabric.all_reduce(counts, reduce_op="sum").tolist()
        state.update(epoch=epoch, accuracy=right / total)
        fabric.log_dict({"train/loss": loss, "test/acc": state["accuracy"]}, step=epoch)
        fabric.save(args.output / "last.ckpt", state)

    fabric.load(args.output / "last.ckpt", state)
    fabric.logger.finalize("success")
    fabric.print(f"{right} of {total} digits are read right after epoch {state['epoch']}\nTest accuracy: {state['accuracy']:.4f}")


if __name__ == "__main__":
    main()
