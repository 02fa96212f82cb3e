"""Kill a training run at random, twenty times, and see that it ends with the same weights as a run that nobody disturbed.

Run it from the repository::

    python examples/crash_demo.py

The run is an ordinary one: a network with dropout, a shuffled loader, gradients accumulated over two batches, validation in the middle of
an epoch, a learning rate that changes at every step, and a ModelCheckpoint. What makes it survive is ``ckpt_path="auto"`` and nothing else.
Each kill is a SIGKILL to the whole process, which gets no chance to save anything; then the same command is started again.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

SAMPLES, BATCH_SIZE, EPOCHS = 400, 8, 3
BATCHES = EPOCHS * SAMPLES // BATCH_SIZE


# ---- the run ---------------------------------------------------------------------------------------------------------


class NoisyPoints(Dataset[tuple[int, Tensor, Tensor]]):
    """Points with their numbers, and other noise whenever one is read: random numbers must go on where they were, too."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        point = torch.tensor([index / SAMPLES, (index % 20) / 20]) + 0.01 * torch.randn(2)
        return index, point, (point[0] * point[1]).sin().unsqueeze(0)


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
        self.given: Tensor  # every sample that the weights have learned from, in order: part of the checkpoints, as weights are
        self.register_buffer("given", torch.full((EPOCHS * SAMPLES,), -1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        numbers, points, targets = batch
        start = int(self.count)
        self.given[start : start + len(numbers)] = numbers
        self.count += len(numbers)
        loss = nn.functional.mse_loss(self.layers(points), targets)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        _, points, targets = batch
        self.log("val_loss", nn.functional.mse_loss(self.layers(points), targets))

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=BATCHES // 2 + EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Diary(Callback):
    """Tells who started this process how far it is."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        where = f"step {trainer.global_step}, {Path(trainer.ckpt_path).name}" if trainer.ckpt_path else "the beginning"
        print(f"from {where}", flush=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int) -> None:
        time.sleep(0.005)  # as if the network were larger
        print(f"batch {trainer.current_epoch * SAMPLES // BATCH_SIZE + batch_idx + 1}", flush=True)


def train(folder: Path) -> None:
    """The command that is started again after each kill: it goes on from the newest checkpoint, and starts anew if there is none."""
    torch.set_num_threads(1)
    seed_everything(1, verbose=False)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        val_check_interval=15,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=2), Diary()],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    points = NoisyPoints()
    network = Network()
    trainer.fit(network, DataLoader(points, BATCH_SIZE, shuffle=True), DataLoader(points, 100), ckpt_path="auto")
    states = trainer.optimizers[0].state_dict()["state"]
    torch.save({"weights": network.layers.state_dict(), "given": network.given, "optimizer": states}, folder / "result.pt")


# ---- killing it ------------------------------------------------------------------------------------------------------


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--train", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def follow(run: subprocess.Popen[str], kill_at: int | None, delay: float) -> tuple[str, int]:
    """Read what a run tells, and kill it a moment after a batch; returns where it started, and the last batch that it told of."""
    begun, batch = "", 0
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("from "):
            begun = line.removeprefix("from ").strip()
        elif line.startswith("batch "):
            batch = int(line.split()[1])
            if kill_at is not None and batch >= kill_at:
                time.sleep(delay)
                run.kill()
                kill_at = None
    run.wait()
    return begun, batch


def crash(folder: Path, kills: int, chance: random.Random) -> int:
    """Start the run, kill it, and start it again, until it has been killed so often; then let it end. Returns how often it resumed."""
    resumed = 0
    for number, kill_at in enumerate(sorted(chance.sample(range(1, BATCHES), kills)), 1):
        run = start(folder)
        begun, batch = follow(run, kill_at, chance.uniform(0, 0.01))
        if run.returncode == 0:
            raise SystemExit("The run ended before it could be killed: try again.")
        resumed += begun != "the beginning"
        print(f"  kill {number:2}: started from {begun:36} killed after batch {batch:3} of {BATCHES}", flush=True)
    run = start(folder)
    begun, _ = follow(run, None, 0)
    if run.returncode != 0:
        raise SystemExit(f"The run failed with exit code {run.returncode}: python {__file__} --train {folder} shows why.")
    print(f"  left alone: started from {begun}, and ended", flush=True)
    return resumed + (begun != "the beginning")


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a training run at random, and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="of the kills; a new one each time if it is not given")
    parser.add_argument("--output", type=Path, default=Path("demo_runs/crash"))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        train(args.train)
        return

    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    output = args.output / time.strftime("%Y-%m-%d-%H-%M-%S")
    begun = time.monotonic()
    print(f"One run of {BATCHES} batches that nobody disturbs ...", flush=True)
    whole = start(output / "whole")
    _, batch = follow(whole, None, 0)
    if whole.returncode != 0:
        raise SystemExit(f"It failed: python {__file__} --train {output / 'whole'} shows why.")
    print(f"  ended after batch {batch}\nThe same run, killed {args.kills} times (--seed {seed}) ...", flush=True)
    resumed = crash(output / "killed", args.kills, random.Random(seed))

    one, other = (torch.load(output / name / "result.pt", weights_only=True) for name in ("whole", "killed"))
    epochs = other["given"].view(EPOCHS, SAMPLES)
    once = all(set(Counter(epoch.tolist()).values()) == {1} and len(set(epoch.tolist())) == SAMPLES for epoch in epochs)
    facts = {
        f"each of the {SAMPLES} samples given exactly once in each of {EPOCHS} epochs": once,
        "samples given in the same order": same(one["given"], other["given"]),
        "final states of the optimizer equal, bit by bit": same(one["optimizer"], other["optimizer"]),
        "final weights equal, bit by bit": same(one["weights"], other["weights"]),
    }
    print(f"Killed {args.kills} times, resumed {resumed} times, in {time.monotonic() - begun:.0f} seconds.")
    for what, holds in facts.items():
        print(f"  {what}: {'yes' if holds else 'NO'}")
    sys.exit(0 if all(facts.values()) else 1)


if __name__ == "__main__":
    main()
