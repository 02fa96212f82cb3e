"""Checkpoints that are saved in the middle of a step: the step is run anew with its batch, and no sample is left out or comes twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader

WITHIN = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


class Stream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        return iter(map(float, range(100, 105)))


class Shuffled(DataLoader[Any]):
    """Shuffles in each pass, and does not say how many batches it gives."""

    def __len__(self) -> int:
        raise TypeError("no length")


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.seen: list[tuple[int, int, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch if isinstance(batch, list) else [batch]
        self.seen.append((self.current_epoch, batch_idx, [None if part is None else part.tolist() for part in parts]))
        x = torch.cat([part.float() for part in parts if part is not None])[:, None]
        return self.layers(x).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class Save(Callback):
    """Saves at some events, with the epoch and the batch that runs then."""

    def __init__(self, folder: Path, *events: str) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, str, int, int]] = []
        for name in events:
            setattr(self, name, lambda trainer, *_, name=name: self.save(trainer, name))

    def save(self, trainer: Trainer, name: str) -> None:
        path = self.folder / f"{len(self.saved)}.ckpt"
        self.saved.append((path, name, trainer.current_epoch, trainer.fit_loop.progress.batch_idx))
        trainer.save_checkpoint(path)


def fit(model: Model, loader: Any, seed: int, ckpt_path: Path | None = None, callbacks: Any = ()) -> Model:
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return model


def make(kind: str) -> Any:
    if kind == "one batch":
        return DataLoader(range(4), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    if kind == "workers":
        return DataLoader(range(7), batch_size=2, shuffle=True, num_workers=1)  # type: ignore[arg-type]
    plain: Any = DataLoader(range(7), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    return plain if kind == "one loader" else CombinedLoader([plain, DataLoader(Stream(), batch_size=2)], kind)  # type: ignore[arg-type]


def ids(seen: list[tuple[int, int, Any]], epoch: int) -> list[int]:
    return sorted(number for at, _, parts in seen if at == epoch for number in parts[0])


@pytest.mark.filterwarnings("ignore:.*can't tell where it is.*were read again")
@pytest.mark.parametrize("kind", ["one loader", "one batch", "workers", "min_size", "max_size"])
def test_a_step_in_which_was_saved_is_run_anew_with_its_batch(tmp_path: Path, kind: str) -> None:
    saver = Save(tmp_path, *(WITHIN if kind != "workers" else WITHIN[-1:]))
    whole = fit(Model(), make(kind), 1, callbacks=[saver])
    assert len(saver.saved) == len(whole.seen) * (1 if kind == "workers" else len(WITHIN))
    for path, event, epoch, batch_idx in saver.saved:
        resumed = fit(Model(), make(kind), 50, path)
        same_epoch = [entry for entry in whole.seen if entry[0] == epoch and entry[1] >= batch_idx]
        assert [entry for entry in resumed.seen if entry[0] == epoch] == same_epoch, (event, epoch, batch_idx)
        if epoch == 0 and kind != "min_size":  # the order of the next epoch is drawn after the step that was run anew
            assert ids(resumed.seen, 1) == ids(whole.seen, 1), (event, batch_idx)


def test_an_epoch_of_unknown_length_is_over_after_its_last_batch(tmp_path: Path) -> None:
    saver = Save(tmp_path, "on_train_batch_end")
    whole = fit(Model(), Shuffled(range(7), batch_size=2, shuffle=True), 1, callbacks=[saver])  # type: ignore[arg-type]
    assert len(saver.saved) == 8
    for path, _, epoch, batches in saver.saved[:-1]:
        resumed = fit(Model(), Shuffled(range(7), batch_size=2, shuffle=True), 50, path)  # type: ignore[arg-type]
        assert resumed.seen == whole.seen[4 * epoch + batches :]
        assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
