"""Train a generative adversarial network on handwritten digits: manual optimization with two optimizers.

Run it with ``python examples/gan.py``; ``--quick`` takes a few seconds. At the end it prints how far the drawn digits are from
real ones (Fréchet distance of the pixels' mean and covariance), beside the distances of untrained noise and of real digits.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger


class GAN(L.LightningModule):
    def __init__(self, latent: int = 32, width: int = 256, lr: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            *(nn.Linear(latent, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, 64), nn.Sigmoid()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
            nn.Linear(width, 1),
        )

    def forward(self, count: int) -> Tensor:
        return self.generator(torch.randn(count, self.hparams.latent, device=self.device))

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()

        self.toggle_optimizer(discriminator)
        with torch.no_grad():
            fake = self(len(real))
        discriminator_loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()
        discriminator.zero_grad()
        self.manual_backward(discriminator_loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)

        self.toggle_optimizer(generator)
        generator_loss = F.softplus(-self.discriminator(self(len(real)))).mean()
        generator.zero_grad()
        self.manual_backward(generator_loss)
        generator.step()
        self.untoggle_optimizer(generator)

        self.log_dict({"d_loss": discriminator_loss, "g_loss": generator_loss}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), self.hparams.lr, betas=(0.5, 0.99)),
            torch.optim.Adam(self.discriminator.parameters(), self.hparams.lr, betas=(0.5, 0.99)),
        ]

    @torch.inference_mode()
    def draw(self, count: int) -> Tensor:
        self.eval()
        return self(count).float().cpu()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """How far apart two sets of points are as Gaussians: 0 for equal means and covariances."""
    covariances = first.T.double().cov(), second.T.double().cov()
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    distance = (first.mean(0) - second.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    return distance.item()


def save_picture(images: Tensor, file: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained", dpi=100)
    for axes, image in zip(figure.subplots(5, 10).flat, images):
        axes.imshow(image.view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_axis_off()
    figure.savefig(file)


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the data lie in memory
    parser = argparse.ArgumentParser(description="Train a generative adversarial network on handwritten digits.")
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--output", type=Path, default=Path("demo_runs/gan"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    L.seed_everything(args.seed)
    digits = torch.tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)] / 16
    known, kept_back = digits.split([1200, 597])
    model = GAN()
    before = model.draw(5000)
    trainer = L.Trainer(
        max_epochs=20 if args.quick else 300,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        logger=CSVLogger(args.output),
        log_every_n_steps=10,
    )
    trainer.fit(model.train(), DataLoader(known, batch_size=64, shuffle=True, drop_last=True))

    after = model.draw(5000)
    picture = args.output / "gan.png"
    save_picture(after, picture)
    print("Fréchet distance to digits that were kept back:")
    for name, images in {"untrained": before, "trained": after, "real digits": known}.items():
        print(f"  {name}: {frechet_distance(images, kept_back):.2f}")
    print(f"Picture: {picture.resolve()}")


if __name__ == "__main__":
    main()
