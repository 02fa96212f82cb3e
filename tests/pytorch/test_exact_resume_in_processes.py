"""Runs of several processes go on exactly: each process with its own random numbers, its own data, and what it has logged itself."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, WeightedRandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

EXPECTED = "FSDPStrategy was given no auto_wrap_policy|The DataLoader of a Stream can't tell where it is"
EVENTS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")


class Model(LightningModule):
    """Dropout and noise, so that each process draws its own numbers; remembers its samples and the metrics of its epochs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.ids: list[float] = []
        self.epochs: list[dict[str, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.trainer.fit_loop.weight:  # a process that has run out repeats a batch, which counts nothing
            self.ids += batch.tolist()
        x = batch[:, None].float() + torch.rand(())
        loss = (self.layers(x) - x.sin()).square().mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        self.log("own", batch.sum(), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean() + torch.rand(()), sync_dist=True)

    def on_train_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.epochs.append({name: metrics[name].item() for name in ("loss_epoch", "own", "val")})

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class SaveEverywhere(Callback):
    def __init__(self, folder: str, model: Model) -> None:
        self.saved: list[tuple[str, int]] = []
        self.folder, self.model = folder, model
        for name in EVENTS:
            setattr(self, name, self._save)

    def _save(self, trainer: Trainer, *_: Any) -> None:
        path = f"{self.folder}/{len(self.saved)}.ckpt"
        self.saved.append((path, len(self.model.ids)))
        trainer.save_checkpoint(path)


class Noisy(Dataset[Tensor]):
    """Numbers with noise; each process draws its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(())


class Stream(IterableDataset[float]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(map(float, range(self.count)))


def loader_of(kind: str, rank: int) -> Any:
    if kind == "even":
        return DataLoader(torch.arange(10.0), batch_size=1, shuffle=True)  # type: ignore[arg-type]
    if kind == "weighted":
        numbers = torch.arange(10.0)
        return DataLoader(numbers, batch_size=1, sampler=WeightedRandomSampler(numbers.tolist(), 10))  # type: ignore[arg-type]
    if kind == "subset":
        return DataLoader(torch.arange(10.0), batch_size=1, sampler=SubsetRandomSampler(range(8)))  # type: ignore[arg-type]
    if kind == "uneven":
        return DataLoader(Noisy(3 + 2 * rank), batch_size=1, shuffle=True)
    return DataLoader(Stream(3 + 2 * rank), batch_size=1)


def fit_and_resume(rank: int, size: int, folder: str, kind: str, settings: dict[str, Any], model_class: type[Model] = Model) -> Any:
    def fit(seed: int, ckpt_path: str | None, model: Model, **more: Any) -> Trainer:
        seed_everything(seed, verbose=False)
        torch.manual_seed(seed + rank)
        trainer = Trainer(
            accelerator="cpu", devices=size, max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, enable_checkpointing=False, num_sanity_val_steps=0, uneven_inputs="join",
            use_distributed_sampler=kind in ("even", "weighted", "subset"), **settings, **more,
        )  # fmt: skip
        val = DataLoader(torch.arange(4.0), batch_size=1)  # type: ignore[arg-type]
        trainer.fit(model, loader_of(kind, rank), val, ckpt_path=ckpt_path)
        return trainer

    warnings.filterwarnings("ignore", EXPECTED)
    whole = model_class()
    saver = SaveEverywhere(folder, whole)
    fit(1, None, whole, callbacks=[saver])
    wrong = []
    for path, seen in saver.saved[:-1]:  # after the last nothing is left to do
        model = model_class()
        fit(50, path, model)
        same = all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
        if not same or model.ids != whole.ids[seen:] or model.epochs != whole.epochs:
            wrong.append((path, same, model.ids, whole.ids[seen:], model.epochs, whole.epochs))
    return wrong, len(saver.saved)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("even", {"strategy": "ddp", "val_check_interval": 2}),
        ("even", {"strategy": "fsdp"}),
        ("weighted", {"strategy": "ddp"}),
        ("subset", {"strategy": "ddp", "reload_dataloaders_every_n_epochs": 1}),
        ("uneven", {"strategy": "ddp"}),
        ("stream", {"strategy": "ddp"}),
    ],
    ids=["ddp", "fsdp", "weighted samples", "reloaded", "uneven lengths", "streams of unknown length"],
)
def test_two_processes_go_on_exactly_from_everywhere(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    for wrong, count in run(fit_and_resume, 2, str(tmp_path), kind, settings):
        assert count >= 12
        assert not wrong


class Wider(Model):
    """Of several of DDP's buckets, with a layer whose gradients are ready in another order than it was made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.last = nn.Linear(300, 1)
        self.layers = nn.Sequential(
            nn.Linear(1, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 300), nn.Dropout(0.5), self.last
        )


@pytest.mark.parametrize("settings", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_three_processes_sum_gradients_in_the_order_of_the_run_before(tmp_path: Path, settings: dict[str, Any]) -> None:
    for wrong, count in run(fit_and_resume, 3, str(tmp_path), "even", {"strategy": DDPStrategy(bucket_cap_mb=1, **settings)}, Wider):
        assert count >= 8
        assert not [path for path, *_ in wrong if not (settings.get("static_graph") and path.endswith("/0.ckpt"))]


def stop_twice(rank: int, size: int, folder: str, kind: str) -> Any:
    """In the same epoch, each time after another batch; the weights of each run, and how far those were that were resumed."""

    def fit(seed: int, steps: int, ckpt_path: str | None) -> Model:
        seed_everything(seed, verbose=False)
        torch.manual_seed(seed + rank)
        model = Model()
        trainer = Trainer(
            accelerator="cpu", devices=size, strategy="ddp", max_epochs=1, max_steps=steps, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False, limit_val_batches=0, uneven_inputs="join",
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(model, loader_of(kind, rank), ckpt_path=ckpt_path)
        trainer.save_checkpoint(f"{folder}/{steps}.ckpt")
        return model

    Model.on_train_end = lambda self: None  # type: ignore[method-assign]  # nothing was validated
    warnings.filterwarnings("ignore", f"{EXPECTED}|Model has a `validation_step`")
    whole = fit(1, 5, None)
    wrong = []
    for first, second in ((1, 3), (1, 4), (2, 3), (3, 4)):
        parts = [fit(1, first, None), fit(50, second, f"{folder}/{first}.ckpt"), fit(90, 5, f"{folder}/{second}.ckpt")]
        same = all(map(torch.equal, parts[-1].state_dict().values(), whole.state_dict().values()))
        given = [number for part in parts for number in part.ids]
        if not same or given != whole.ids:
            wrong.append((first, second, same, given, whole.ids))
    return wrong


@pytest.mark.parametrize("kind", ["uneven", "stream"])
def test_a_process_that_has_run_out_of_data_is_resumed_twice(tmp_path: Path, kind: str) -> None:
    assert run(stop_twice, 2, str(tmp_path), kind) == [[], []]
