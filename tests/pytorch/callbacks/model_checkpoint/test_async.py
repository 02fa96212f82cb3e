"""ModelCheckpoint with saves in the background, and what it does at the start of a run."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric.checkpoint.io import TorchCheckpointIO, load
from lightning.fabric.checkpoint.temporary import temporary_name
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Late(TorchCheckpointIO):
    """Writes each checkpoint a moment later."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        threading.Event().wait(0.05)
        super().save_checkpoint(checkpoint, path, storage_options)


class Watching(Callback):
    """At every step after the first save: there is a whole checkpoint, and the link leads to one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, 0

    def on_train_batch_start(self, *args: Any) -> None:
        files = [path for path in self.folder.glob("*.ckpt") if not path.is_symlink()]
        if files or self.seen:
            assert files
            self.seen += 1
            last = self.folder / "last.ckpt"
            assert last.exists() or not last.is_symlink()


def fit(*callbacks: Callback, steps: int = 6, **arguments: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **arguments,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(24, 2)), batch_size=4))
    return trainer


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*not empty.*")
@pytest.mark.parametrize("save_last", [None, True, "link"])
@pytest.mark.parametrize("plugin", [AsyncCheckpointIO, lambda: AsyncCheckpointIO(Late())])
def test_files_are_those_of_a_run_that_waits(plugin: Any, save_last: Any, tmp_path: Path) -> None:
    found = {}
    for how, plugins in (("background", [plugin()]), ("waiting", [])):
        folder = tmp_path / how
        callback = ModelCheckpoint(folder, every_n_train_steps=1, save_last=save_last)
        watching = Watching(folder)
        fit(callback, watching, plugins=plugins)
        found[how] = {path.name: load(path)["global_step"] for path in folder.iterdir()}
        assert callback.best_model_path == str(folder / "epoch=0-step=6.ckpt")
        assert watching.seen > 1
        assert (folder / "last.ckpt").is_symlink() == (save_last == "link")
    assert found["background"] == found["waiting"]


@pytest.mark.filterwarnings("ignore:.*num_workers.*")
def test_name_of_a_file_that_is_being_written_is_taken(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1, save_top_k=-1)
    fit(callback, steps=4, plugins=[AsyncCheckpointIO(Late())])
    assert sorted(os.listdir(tmp_path)) == ["x-v1.ckpt", "x-v2.ckpt", "x-v3.ckpt", "x.ckpt"]


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*not empty.*")
def test_start_sweeps_what_a_dead_run_has_left_and_not_what_a_live_one_writes(tmp_path: Path) -> None:
    live = temporary_name()
    dead = "~".join([*live.split("~")[:4], "4194305", "1.partial"])  # no process has such a number
    for name in (live, dead):
        (tmp_path / name).touch()
    fit(ModelCheckpoint(tmp_path), steps=1)
    assert {live} <= set(os.listdir(tmp_path))
    assert dead not in os.listdir(tmp_path)


@pytest.mark.filterwarnings("ignore:.*num_workers.*")
def test_folder_that_can_not_be_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="no folder"):
        fit(ModelCheckpoint(tmp_path / "file" / "checkpoints"))


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*not empty.*")
def test_last_is_the_highest_generation_that_is_whole(tmp_path: Path) -> None:
    first = fit(ModelCheckpoint(tmp_path, save_last=True), steps=2)
    newer = tmp_path / "last-v1.ckpt"
    first.save_checkpoint(newer)
    os.utime(newer, (1, 1))

    def resume() -> str:
        trainer = Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)],
        )  # fmt: skip
        trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(24, 2)), batch_size=4), ckpt_path="last")
        return Path(str(trainer.ckpt_path)).name

    data = bytearray(newer.read_bytes())
    assert resume() == "last-v1.ckpt"
    data[len(data) // 2] ^= 1
    newer.write_bytes(data)
    with pytest.warns(UserWarning, match=r"last\.ckpt is used instead.*last-v1\.ckpt"):
        assert resume() == "last.ckpt"
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"epoch=0-step=2\.ckpt is used instead: .*last\.ckpt.*last-v1\.ckpt"):
        assert resume() == "epoch=0-step=2.ckpt"
    (tmp_path / "epoch=0-step=2.ckpt").write_bytes(b"")
    with pytest.raises(RuntimeError, match="None of the 3 checkpoints"):
        resume()
