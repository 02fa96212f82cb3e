"""A training that sends signals to its own process at given places, and tells with which weights it ends."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

# A hook, and at which of its calls. Of 3 epochs of 4 batches each, with validation at the end.
PLACES: dict[str, tuple[str, int]] = {
    "prepare_data": ("prepare_data", 1),
    "setup": ("setup", 1),
    "fit_start": ("on_fit_start", 1),
    "sanity_check": ("on_validation_batch_end", 1),
    "train_start": ("on_train_start", 1),
    "first_batch": ("training_step", 1),
    "in_a_step": ("training_step", 6),
    "before_the_step": ("on_train_batch_start", 6),
    "after_a_step": ("on_train_batch_end", 6),
    "last_batch_of_an_epoch": ("training_step", 8),
    "validation_start": ("on_validation_start", 3),
    "validation": ("on_validation_batch_end", 5),
    "validation_end": ("on_validation_end", 3),
    "epoch_end": ("on_train_epoch_end", 2),
    "epoch_start": ("on_train_epoch_start", 2),
    "saving": ("on_save_checkpoint", 2),
}
BEFORE = ["prepare_data", "setup", "fit_start", "sanity_check"]  # nothing is trained by then
LATE: dict[str, tuple[str, int]] = {
    "last_epoch_end": ("on_train_epoch_end", 3),
    "train_end": ("on_train_end", 1),
    "fit_end": ("on_fit_end", 1),
    "teardown": ("teardown", 1),
}
COUNTED = sorted({hook for hook, _ in {**PLACES, **LATE}.values()})


class Pairs(torch.utils.data.Dataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.samples = torch.randn(count, 6, generator=torch.Generator().manual_seed(2))

    def __getitem__(self, index: int) -> Tensor:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


class Model(LightningModule):
    """Drops at random, shuffles, and has momentum: any draw or step too many or too few shows in the weights."""

    def __init__(self, place: str | None = None, numbers: tuple[int, ...] = (), ranks: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 1))
        self.hook, self.index = {**PLACES, **LATE}[place] if place is not None else ("", 0)
        self.numbers, self.ranks = numbers, ranks
        self.calls = dict.fromkeys(COUNTED, 0)
        self.sent = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.net(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def reach(self, hook: str) -> None:
        self.calls[hook] += 1
        if hook == self.hook and self.calls[hook] == self.index and not self.sent and self._trainer.global_rank in self.ranks:
            self.sent = True
            for number in self.numbers:
                os.kill(os.getpid(), number)
            signals = self._trainer._signals
            while self._trainer.world_size > 1 and not (
                signals.pending or signals._over
            ):  # the run would be over before the processes have heard of it
                time.sleep(0.01)


def counted(hook: str) -> Any:
    before = getattr(Model, hook, None)

    def call(self: Model, *args: Any, **kwargs: Any) -> Any:
        self.reach(hook)
        return before(self, *args, **kwargs) if before is not None else None

    return call


for _hook in COUNTED:
    setattr(Model, _hook, counted(_hook))


class Heard(Callback):
    """Notes how the run has ended."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.errors.append(type(exception).__name__)


def trainer_of(folder: str, callbacks: tuple[Any, ...] | None = None, **arguments: Any) -> Trainer:
    silent: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 3, "logger": False, "num_sanity_val_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    if callbacks is None:
        callbacks = (ModelCheckpoint(folder),)
    return Trainer(callbacks=[Heard(), *callbacks], **{**silent, **arguments})


def fit(trainer: Trainer, model: Model, size: int = 1, workers: int = 0, ckpt_path: str | None = None) -> list[float]:
    """Train from a fixed seed; returns the weights. 4 batches in each process, whatever their number."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    data = DataLoader(Pairs(8 * size), batch_size=2, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(4))
    trainer.fit(model, data, DataLoader(Pairs(4 * size), batch_size=2), ckpt_path=ckpt_path, weights_only=True)
    return [value for parameter in model.parameters() for value in parameter.detach().flatten().tolist()]


@contextmanager
def unwarned() -> Iterator[None]:
    """Whatever is said of a folder that is not empty, or of a last checkpoint that is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def files(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*") if path.suffix == ".ckpt")


ERRORS = {signal.SIGTERM: "SIGTERMException", signal.SIGINT: "KeyboardInterrupt"}
