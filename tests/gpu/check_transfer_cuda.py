"""Check on a CUDA machine that batches are copied while steps are computed: ``python tests/gpu/check_transfer_cuda.py``.

Each check asserts and prints a line. ``--quick`` takes fewer steps.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning.pytorch import LightningModule, Trainer

CUDA = torch.device("cuda")
STEPS = 20 if "--quick" in sys.argv else 60
WIDTH = 2**22  # float32: 16 MB for each sample, which a copy needs about as long for as the step below computes


class Big(Dataset[Tensor]):
    """Samples whose every element is their number, so that a torn or a mixed up one shows."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((WIDTH,), float(index))

    def __len__(self) -> int:
        return STEPS


class Pinned:
    """Batches that lie in pinned memory already, so that only the copy takes time."""

    def __init__(self) -> None:
        self.batches = [torch.full((4, WIDTH), float(index)).pin_memory() for index in range(4)]

    def __iter__(self) -> Any:
        return (self.batches[index % 4] for index in range(STEPS))

    def __len__(self) -> int:
        return STEPS


class Model(LightningModule):
    """Computes for a while, and keeps what it has seen of each batch, on the device."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4096, 4096)
        self.rounds = rounds
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        first = batch.flatten()[:4096]
        x = first.expand(4096, 4096)
        for _ in range(self.rounds):
            x = torch.tanh(self.layer(x))
        if not self.rounds:
            x = x + self.layer.bias
        self.seen.append(torch.stack([batch.min(), batch.max()]))  # after the work: memory that was given away shows here
        return x.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def fitted(model: LightningModule, loader: Any, **arguments: Any) -> float:
    """The seconds of an epoch after the first one."""
    trainer = Trainer(
        accelerator="gpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip
    times: list[float] = []

    def now(*_: Any) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    model.on_train_epoch_start = model.on_train_epoch_end = now  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader)
    return times[3] - times[2]


def check_batches_arrive_whole() -> None:
    for loader in (DataLoader(Big(), batch_size=4, pin_memory=True), DataLoader(Big(), batch_size=4)):
        model = Model(2)
        fitted(model, loader)
        for index, seen in enumerate(model.seen):
            first = index % (STEPS // 4) * 4
            assert seen.tolist() == [first, first + 3], (index, seen.tolist())


def check_copies_run_beside_steps() -> None:
    copies = fitted(Model(0), Pinned(), overlap_transfer=False)
    fitted(Model(8), Pinned(), overlap_transfer=False)  # the first one chooses kernels
    rounds = max(1, round(8 * copies / (fitted(Model(8), Pinned(), overlap_transfer=False) - copies)))  # work takes as long as copies
    apart, alone = fitted(Model(rounds), Pinned()), fitted(Model(rounds), Pinned(), overlap_transfer=False)
    print(f"    {rounds} rounds: {apart * 1e3:.0f} ms for an epoch with copies beside steps, {alone * 1e3:.0f} ms with copies between them")
    assert apart < 0.85 * alone


def check_own_transfer_that_reads_the_device_is_noticed() -> None:
    class Normalising(Model):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch.to(device, non_blocking=True) - self.layer.bias.sum() * 0

    class Copying(Model):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch.to(device, non_blocking=True) * 1.0

    for kind, expected in ((Normalising, 1), (Copying, 0)):
        model = kind(1)
        trainer = Trainer(
            accelerator="gpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, overlap_transfer=True,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, Pinned())
        assert sum("overlap_transfer" in str(each.message) for each in caught) == expected, [str(each.message) for each in caught]
        assert [each.tolist() for each in model.seen] == [[index % 4, index % 4] for index in range(STEPS)]


def check_no_sync() -> None:
    """No operation of a step or a copy makes the host wait for all that the device still has to do."""
    for arguments in ({}, {"overlap_transfer": True}):
        model = Model(1)
        model.on_train_epoch_start = lambda *_: torch.cuda.set_sync_debug_mode("error")  # type: ignore[method-assign]
        model.on_train_epoch_end = lambda *_: torch.cuda.set_sync_debug_mode("default")  # type: ignore[method-assign]
        try:
            Trainer(
                accelerator="gpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, **arguments,
            ).fit(model, Pinned())  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(model.seen) == STEPS


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(f"ok  {name[6:].replace('_', ' ')}", flush=True)
