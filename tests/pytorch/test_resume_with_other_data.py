"""Runs that are resumed with other data than they were saved with, and samplers that keep their own place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback


class Noting(LightningModule):
    """Notes the samples of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[float]] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch.tolist())
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.001)


class Forwards(Sampler[int]):
    """A user's sampler, whose length is only what it says."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


class Keeping(Forwards):
    """Keeps its place, and makes ready for the next epoch once it is asked for more than it has."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.epoch = self.place = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.place < self.count:
            self.place += 1
            yield order[self.place - 1]
        self.place, self.epoch = 0, self.epoch + 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


def numbers(count: int, sampler: Any = None) -> Any:
    return DataLoader(torch.arange(float(count)), batch_size=2, sampler=sampler)  # type: ignore[arg-type]


def fit(folder: Path, loader: Any, ckpt_path: Any = None, epochs: int = 2, **arguments: Any) -> Noting:
    model = Noting()

    def save(trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [] if ckpt_path else [LambdaCallback(on_train_batch_end=save)]
    Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **quiet, **arguments).fit(model, loader, ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("ignore:The training loader is not the one", "ignore:The sampler .* did not draw the samples again")
@pytest.mark.parametrize("sampler", [None, Forwards], ids=["torch's sampler", "a sampler of one's own"])
@pytest.mark.parametrize("step", [5, 6])
def test_epoch_that_has_become_shorter_than_the_place_in_it_is_an_error(tmp_path: Path, sampler: Any, step: int) -> None:
    fit(tmp_path, numbers(14, sampler and sampler(14)))
    with pytest.raises(MisconfigurationException, match=f"saved after {step} batches of an epoch, and an epoch has 5 now"):
        fit(tmp_path, numbers(10, sampler and sampler(10)), tmp_path / f"{step}.ckpt")
    with pytest.raises(MisconfigurationException, match=f"saved after {step} batches of an epoch, and an epoch has 4 now"):
        fit(tmp_path, numbers(14, sampler and sampler(14)), tmp_path / f"{step}.ckpt", limit_train_batches=4)
    resumed = fit(tmp_path, numbers(10, sampler and sampler(10)), tmp_path / "7.ckpt")  # between two epochs
    assert resumed.seen == {1: list(range(10))}


def test_sampler_that_keeps_its_place_is_asked_for_the_end_of_each_epoch(tmp_path: Path) -> None:
    whole = fit(tmp_path, numbers(6, Keeping(6)), epochs=3)
    assert [sorted(seen) for seen in whole.seen.values()] == [list(range(6))] * 3
    assert whole.seen[0] != whole.seen[1]
    for step in range(1, 9):
        resumed = fit(tmp_path, numbers(6, Keeping(6)), tmp_path / f"{step}.ckpt", epochs=3)
        taken = [sample for seen in whole.seen.values() for sample in seen]
        assert [sample for seen in resumed.seen.values() for sample in seen] == taken[2 * step :], step
