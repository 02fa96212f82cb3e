"""Train a convolutional network on 1,797 handwritten digits, keep the best one, test it, and draw what it learned.

Run it from the repository with ``make demo``, or by hand::

    python examples/digits.py --max-epochs 30 --accelerator auto --precision 32-true
"""

from __future__ import annotations

import argparse
import csv
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning.pytorch as L
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


class Digits(L.LightningDataModule):
    """The digits that ship with scikit-learn: 8 x 8 pixels, ten classes, split into 60 % train, 20 % val, 20 % test."""

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        dataset = TensorDataset(images, torch.tensor(digits.target))
        generator = torch.Generator().manual_seed(self.hparams.seed)
        self.train, self.val, self.test = random_split(dataset, [0.6, 0.2, 0.2], generator)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=512)

    predict_dataloader = test_dataloader


class ConvNet(L.LightningModule):
    """Three convolutions, one pooling, one linear layer: 100,000 parameters."""

    def __init__(self, width: int = 32, dropout: float = 0.3, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            *block(1, width), *block(width, 2 * width), nn.MaxPool2d(2), *block(2 * width, 4 * width), nn.AvgPool2d(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(16 * width, 10))
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(jitter(images)), labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: list[Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict({f"{stage}/loss": F.cross_entropy(logits, labels), f"{stage}/acc": accuracy}, prog_bar=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        return {"image": images, "label": labels, "probability": self(images).float().softmax(1)}

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def jitter(images: Tensor, angle: float = 0.2, scale: float = 0.1, shift: float = 0.12) -> Tensor:
    """Turns, stretches and shifts each image a little, another way every time."""
    noise = torch.rand(6, len(images), device=images.device) * 2 - 1
    turn, wide, high = noise[0] * angle, 1 + noise[1] * scale, 1 + noise[2] * scale
    rows = torch.stack([wide * turn.cos(), -turn.sin(), noise[3] * shift, turn.sin(), high * turn.cos(), noise[4] * shift])
    grid = F.affine_grid(rows.T.reshape(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def draw(metrics: Path, predictions: dict[str, Tensor], title: str, file: Path) -> None:
    """Draws the learning curves of a CSVLogger's file beside the predictions that gave the true label the least probability."""
    figure = Figure(figsize=(13, 6.5), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=14)
    left, right = figure.subfigures(1, 2, width_ratios=(5, 7), wspace=0.03)

    with metrics.open() as lines:
        rows = list(csv.DictReader(lines))
    losses, accuracies = left.subplots(2, sharex=True)
    for axes, key, colour in (losses, "train/loss", "C7"), (losses, "val/loss", "C0"), (accuracies, "val/acc", "C0"):
        points = [(int(row["epoch"]), float(row[key])) for row in rows if row[key]]
        axes.plot(*zip(*points), color=colour, label=key)
        axes.grid(alpha=0.3)
    best_epoch, best_accuracy = max(points, key=lambda point: point[1])
    accuracies.plot(best_epoch, best_accuracy, "o", color="C3", label=f"kept: {best_accuracy:.1%}")
    losses.legend(frameon=False)
    accuracies.legend(frameon=False, loc="lower right")
    losses.set(yscale="log", ylabel="cross-entropy", title="Learning curves")
    accuracies.set(ylim=(0.9, 1.005), ylabel="accuracy", xlabel="epoch")

    true = predictions["probability"].gather(1, predictions["label"][:, None]).squeeze(1)
    cells = right.subplots(3, 5).flat
    right.suptitle("The worst predictions: the true digit, what it was read as, how confidently")
    for cell, index in zip(cells, true.argsort().tolist()):
        label, (confidence, guess) = int(predictions["label"][index]), predictions["probability"][index].max(0)
        cell.imshow(predictions["image"][index, 0].numpy(), cmap="gray_r")
        cell.set_title(f"{label} read as {guess}\n{confidence:.0%}", fontsize=10, color="C0" if guess == label else "C3")
        cell.set(xticks=[], yticks=[])
    figure.savefig(file)


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the data lie in memory
    parser = argparse.ArgumentParser(description="Train, test and draw a convolutional network on handwritten digits.")
    parser.add_argument("--max-epochs", type=int, default=30)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--output", type=Path, default=Path("demo_runs/digits"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the network is so small that threads would only wait for each other
    L.seed_everything(args.seed)
    data = Digits(seed=args.seed)
    model = ConvNet()
    log = CSVLogger(args.output, name="csv")
    best = ModelCheckpoint(monitor="val/acc", mode="max", filename="epoch={epoch}-acc={val/acc:.4f}", auto_insert_metric_name=False)
    trainer = L.Trainer(
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        logger=[log, TensorBoardLogger(args.output, name="tensorboard")],
        callbacks=[best, EarlyStopping(monitor="val/loss", patience=10), LearningRateMonitor()],
        gradient_clip_val=1.0,
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    [result] = trainer.test(model, datamodule=data, ckpt_path="best")
    batches = trainer.predict(model, datamodule=data, ckpt_path="best")
    predictions = {key: torch.cat([batch[key] for batch in batches]).cpu() for key in batches[0]}

    accuracy = result["test/acc"]
    picture = args.output / "digits.png"
    title = f"{accuracy:.1%} of {len(data.test)} digits that the network had not seen are read right"
    draw(Path(log.log_dir, "metrics.csv"), predictions, title, picture)
    print(f"Best checkpoint: {best.best_model_path}\nTest accuracy: {accuracy:.4f}\nPicture: {picture.resolve()}")
    if accuracy < 0.98:
        raise SystemExit("The test accuracy should have been at least 0.98.")


if __name__ == "__main__":
    main()
