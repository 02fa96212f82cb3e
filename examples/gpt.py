"""Train a small GPT, a character at a time, on the language reference that ships with Python, and let it write.

Run it with ``python examples/gpt.py``; ``--quick`` is a matter of seconds and teaches it little more than the common words.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning.pytorch as L
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger


class Reference(L.LightningDataModule):
    """The texts behind Python's ``help()`` as windows of ``context + 1`` characters; the last tenth is for validation."""

    def __init__(self, context: int, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        text = "\n\n".join(topics[name] for name in sorted(topics))
        self.letters = sorted(set(text))
        number = {letter: index for index, letter in enumerate(self.letters)}
        self.text = torch.tensor([number[letter] for letter in text])

    def setup(self, stage: str) -> None:
        train, val = self.text.split([len(self.text) - len(self.text) // 10, len(self.text) // 10])
        size = self.hparams.context + 1
        self.train, self.val = train.unfold(0, size, size // 4), val.unfold(0, size, size)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams.batch_size)

    def read(self, numbers: Tensor) -> str:
        return "".join(self.letters[number] for number in numbers.tolist())

    def entropies(self) -> tuple[float, float]:
        """The nats per letter of the best guess that knows how often letters come, and of the best that sees one letter before too."""
        pairs = torch.zeros(len(self.letters), len(self.letters))
        pairs.index_put_((self.text[:-1], self.text[1:]), torch.tensor(1.0), accumulate=True)
        joint = pairs / pairs.sum()
        single = torch.special.entr(joint.sum(0)).sum().item()
        return single, torch.special.entr(joint).sum().item() - single


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        query, key, value = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(y.transpose(1, 2).reshape(batch, time, width))


class GPT(L.LightningModule):
    def __init__(self, letters: int, context: int, layers: int, width: int, lr: float, heads: int = 4, warmup: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed, self.position = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters, bias=False)
        self.head.weight = self.embed.weight
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.embed(letters) + self.position.weight[: letters.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, windows: Tensor) -> Tensor:
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(windows)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, windows: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(windows), prog_bar=True)

    def configure_optimizers(self) -> dict:
        steps, warmup = self.trainer.estimated_stepping_batches, self.hparams.warmup

        def warm_up_then_cosine(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.inference_mode()
    def write(self, start: Tensor, count: int, temperature: float = 0.7) -> Tensor:
        """Appends ``count`` letters to ``start``, each drawn from what the model expects to come next."""
        letters = start[None]
        for _ in range(count):
            logits = self(letters[:, -self.hparams.context :])[:, -1] / temperature
            letters = torch.cat([letters, torch.multinomial(logits.float().softmax(1), 1)], dim=1)
        return letters[0]


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the data lie in memory
    parser = argparse.ArgumentParser(description="Train a small GPT on the texts behind Python's help().")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--output", type=Path, default=Path("demo_runs/gpt"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    L.seed_everything(args.seed)
    size = {"context": 32, "layers": 2, "width": 64} if args.quick else {"context": 64, "layers": 3, "width": 128}
    data = Reference(size["context"], batch_size=32)
    model = GPT(len(data.letters), **size, lr=1e-2 if args.quick else 3e-3)
    trainer = L.Trainer(
        max_steps=150 if args.quick else 500,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=CSVLogger(args.output),
        callbacks=[LearningRateMonitor()],
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    [result] = trainer.validate(model, datamodule=data)

    start = data.text[: data.hparams.context]
    print(data.read(model.eval().write(start.to(model.device), 400)))
    alone, with_one_before = data.entropies()
    print(f"\nNats per letter: {result['val/loss']:.3f} by the model")
    print(f"At best {alone:.3f} for who knows how often each letter comes, {with_one_before:.3f} for who also knows the letter before")


if __name__ == "__main__":
    main()
