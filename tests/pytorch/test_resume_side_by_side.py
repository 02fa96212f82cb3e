"""Several training loaders at once: a run that is interrupted anywhere gives each sample of each of them once, to the last bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader

EVENTS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_epoch_start")
MODES = ("min_size", "max_size", "max_size_cycle")


class Noisy(Dataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, float(torch.rand(())) + random.random()])


class Unsized(IterableDataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (torch.tensor([float(index), 0.0]) for index in range(first, self.count, step))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.3), nn.Linear(3, 1))
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Tensor | None], batch_idx: int) -> Tensor:
        given = {name: None if part is None else part.tolist() for name, part in batch.items()}
        self.seen.append((self.current_epoch, batch_idx, given))
        return self.layers(torch.cat([part for part in batch.values() if part is not None])).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class SaveEverywhere(Callback):
    def __init__(self, folder: Path, events: tuple[str, ...] = EVENTS) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, str, int]] = []
        for name in events:
            setattr(self, name, lambda trainer, *_, name=name: self.save(trainer, name))

    def save(self, trainer: Trainer, name: str) -> None:
        path = self.folder / f"{len(self.saved)}.ckpt"
        self.saved.append((path, name, len(trainer.lightning_module.seen)))  # type: ignore[arg-type]
        trainer.save_checkpoint(path)


def fit(make: Callable[[], Any], seed: int, ckpt_path: Path | None = None, callbacks: Any = (), **settings: Any) -> Model:
    seed_everything(seed, verbose=False)
    model = Model()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*can't tell where it is.*were read again|.*does not have many workers")
        trainer.fit(model, make(), DataLoader(torch.arange(2.0)), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return model


def goes_on_from_everywhere(make: Callable[[], Any], folder: Path, **settings: Any) -> int:
    plain = fit(make, 1, **settings)
    saver = SaveEverywhere(folder)
    whole = fit(make, 1, callbacks=[saver], **settings)
    assert whole.seen == plain.seen
    for path, event, count in saver.saved[:-1]:  # after the last nothing is left to do
        resumed = fit(make, 50, path, **settings)
        assert resumed.seen == whole.seen[count:], (event, count)
        assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values())), (event, count)
    return len(saver.saved)


def loaders(mode: Any, *kinds_and_lengths: tuple[str, int], **kwargs: Any) -> Callable[[], CombinedLoader]:
    def make() -> CombinedLoader:
        made = {
            f"{kind} {i}": DataLoader(Noisy(length), batch_size=2, shuffle=True, **kwargs)
            if kind == "indexed"
            else DataLoader(Unsized(length), batch_size=2, **kwargs)
            for i, (kind, length) in enumerate(kinds_and_lengths)
        }
        return CombinedLoader(made, mode)

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(7, 2), (4, 4)], ids=str)
def test_loaders_of_known_length_go_on_exactly(tmp_path: Path, mode: str, lengths: tuple[int, int]) -> None:
    assert goes_on_from_everywhere(loaders(mode, *(("indexed", length) for length in lengths)), tmp_path) >= 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", [("indexed", "unsized"), ("unsized", "indexed"), ("unsized", "unsized")], ids=str)
@pytest.mark.parametrize("lengths", [(7, 3), (3, 7)], ids=str)
def test_loaders_of_which_one_has_no_length_go_on_exactly(tmp_path: Path, mode: str, kinds: Any, lengths: Any) -> None:
    assert goes_on_from_everywhere(loaders(mode, *zip(kinds, lengths)), tmp_path) >= 8


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["indexed", "unsized"])
def test_loaders_with_workers_go_on_exactly(tmp_path: Path, kind: str, persistent: bool) -> None:
    make = loaders("max_size", ("indexed", 7), (kind, 3), num_workers=1, persistent_workers=persistent)
    assert goes_on_from_everywhere(make, tmp_path) >= 12


def test_a_checkpoint_of_the_middle_of_a_step_counts_the_batches_before_it(tmp_path: Path) -> None:
    make = loaders("max_size", ("indexed", 8), ("unsized", 5))
    saver = SaveEverywhere(tmp_path, ("on_train_batch_start",))
    whole = fit(make, 1, callbacks=[saver])
    for path, _, count in saver.saved:
        if count % 4 not in (1, 2):
            continue  # nothing of the epoch was used, or the batch of the moment is its last one
        ids = [[[row[0] for row in part or ()] for part in given.values()] for _, _, given in fit(make, 50, path).seen]
        wanted = [[[row[0] for row in part or ()] for part in given.values()] for _, _, given in whole.seen[count:]]
        assert ids[: 4 - count % 4] == wanted[: 4 - count % 4]
