"""``fit(ckpt_path="auto")``: the same command starts a run, and goes on with it."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning.fabric.checkpoint.seal import DamagedCheckpoint
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(1, 1)
        self.ids: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.ids += batch.tolist()
        x = batch[:, None] + torch.rand(())
        loss = (self.layer(x) - x.sin()).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Backwards(CheckpointIO):
    """A format of its own: no other program can read it."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.getvalue()[::-1])

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        return torch.load(io.BytesIO(Path(path).read_bytes()[::-1]), map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Killed(Exception):
    pass


class KillAt(Callback):
    """Ends the run after its n-th batch, as far as it counts itself."""

    def __init__(self, n: int) -> None:
        self.left = n

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def start(make_trainer: Any, kill_at: int = 0, callbacks: Any = None, ckpt_path: str = "auto", **arguments: Any) -> Any:
    """What the command does, each time that it is submitted."""
    seed_everything(7, verbose=False)
    model = Model()
    savers = [ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)] if callbacks is None else callbacks
    settings: dict[str, Any] = {"max_epochs": 2, "logger": CSVLogger(".", "logs"), "enable_checkpointing": True, **arguments}
    trainer = make_trainer(callbacks=[KillAt(kill_at), *savers], **settings)
    data = DataLoader(torch.arange(6.0), batch_size=1, shuffle=True)  # type: ignore[arg-type]
    with contextlib.suppress(Killed):
        trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer, model


def test_the_same_command_starts_a_run_and_goes_on_with_it(make_trainer: Any) -> None:
    _, whole = start(make_trainer, logger=CSVLogger(".", "whole"))
    trainer, first = start(make_trainer, kill_at=5)
    assert trainer.global_step == 5
    _, second = start(make_trainer, kill_at=4)
    trainer, third = start(make_trainer)
    assert trainer.global_step == 12
    assert torch.equal(third.layer.weight, whole.layer.weight)
    assert whole.ids == first.ids[:4] + second.ids[:2] + third.ids  # saved after 4 and 6 batches; what came later was taken again
    assert os.listdir("logs") == ["version_0"]


def test_trainer_with_auto_resume_goes_on_where_no_path_is_given(make_trainer: Any) -> None:
    def fit(kill_at: int = 0, **arguments: Any) -> Any:
        seed_everything(7, verbose=False)
        saver = ModelCheckpoint("files", every_n_train_steps=2)
        trainer = make_trainer(callbacks=[KillAt(kill_at), saver], enable_checkpointing=True, auto_resume=True, max_epochs=1)
        with contextlib.suppress(Killed):
            trainer.fit(Model(), DataLoader(torch.arange(6.0), batch_size=1), **arguments)  # type: ignore[arg-type]
        return trainer

    assert fit(kill_at=3).ckpt_path is None
    assert os.path.basename(fit(kill_at=3).ckpt_path) == "epoch=0-step=2.ckpt"
    with pytest.warns(UserWarning, match="is not empty"), pytest.raises(FileNotFoundError, match="not found"):
        fit(ckpt_path="other.ckpt")  # a path that is given is taken
    trainer = fit()
    assert os.path.basename(trainer.ckpt_path) == "epoch=0-step=4.ckpt"
    assert trainer.global_step == 6


def test_a_run_that_was_through_is_not_trained_again(make_trainer: Any) -> None:
    start(make_trainer)
    trainer, model = start(make_trainer)
    assert model.ids == []
    assert trainer.global_step == 12


def test_each_logger_goes_on_in_its_own_version(make_trainer: Any) -> None:
    os.makedirs("tb/version_4")
    loggers = lambda: [CSVLogger(".", "logs"), TensorBoardLogger(".", "tb")]  # noqa: E731
    start(make_trainer, kill_at=5, logger=loggers())
    trainer, _ = start(make_trainer, logger=loggers())
    assert [logger.version for logger in trainer.loggers] == [0, 5]


def test_another_folder_is_another_run(make_trainer: Any) -> None:
    start(make_trainer, kill_at=5)
    _, model = start(make_trainer, logger=CSVLogger(".", "other"))
    assert len(model.ids) == 12


def test_without_a_logger_checkpoints_lie_in_the_trainers_folder(make_trainer: Any) -> None:
    start(make_trainer, kill_at=5, logger=False)
    trainer, model = start(make_trainer, logger=False)
    assert len(model.ids) == 8
    assert trainer.global_step == 12


def test_the_newest_is_by_its_step_and_not_by_its_time(make_trainer: Any) -> None:
    saver = lambda: [ModelCheckpoint("files", every_n_train_steps=2, save_top_k=-1)]  # noqa: E731
    start(make_trainer, kill_at=7, callbacks=saver())
    os.utime("files/epoch=0-step=2.ckpt", (4e9, 4e9))
    assert len(start(make_trainer, callbacks=saver())[1].ids) == 6


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(make_trainer: Any) -> None:
    saver = lambda: [ModelCheckpoint("files", every_n_train_steps=2, save_top_k=-1)]  # noqa: E731
    start(make_trainer, kill_at=7, callbacks=saver())
    newest = Path("files/epoch=0-step=6.ckpt")
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"epoch=0-step=6\.ckpt.*epoch=0-step=4\.ckpt is used|can't be read"):
        _, model = start(make_trainer, callbacks=saver())
    assert len(model.ids) == 8


@pytest.mark.parametrize("newest", ["zeros", "link"])
def test_a_checkpoint_whose_contents_are_lost_is_named_too(make_trainer: Any, newest: str) -> None:
    saver = lambda: [ModelCheckpoint("files", every_n_train_steps=2, save_top_k=-1)]  # noqa: E731
    start(make_trainer, kill_at=7, callbacks=saver())
    path = Path("files/epoch=0-step=6.ckpt")
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(bytes(size)) if newest == "zeros" else path.symlink_to("gone.ckpt")
    wrong = "it begins with zeros" if newest == "zeros" else "No such file"
    with pytest.warns(UserWarning, match=rf"epoch=0-step=4\.ckpt is used instead: .*epoch=0-step=6\.ckpt: .*{wrong}"):
        _, model = start(make_trainer, callbacks=saver())
    assert len(model.ids) == 8


def test_nothing_but_broken_checkpoints_is_an_error_and_no_start_from_nothing(make_trainer: Any) -> None:
    saver = lambda: [ModelCheckpoint("files", every_n_train_steps=2, save_top_k=-1)]  # noqa: E731
    start(make_trainer, kill_at=5, callbacks=saver())
    for path in Path("files").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedCheckpoint, match=r"None of the 2 checkpoints"):
        start(make_trainer, callbacks=saver())


def test_weights_alone_are_passed_over(make_trainer: Any) -> None:
    savers = lambda: [  # noqa: E731
        ModelCheckpoint("files", every_n_train_steps=2),
        ModelCheckpoint("files", filename="weights-{step}", every_n_train_steps=3, save_weights_only=True),
    ]
    start(make_trainer, kill_at=4, callbacks=savers())
    os.remove("files/epoch=0-step=2.ckpt") if os.path.exists("files/epoch=0-step=2.ckpt") else None
    assert sorted(os.listdir("files")) == ["weights-step=3.ckpt"]
    with (
        pytest.warns(UserWarning, match="is not empty"),
        pytest.warns(UserWarning, match=r"starts anew.*weights-step=3\.ckpt.*hold weights, or"),
    ):
        _, model = start(make_trainer, callbacks=savers())
    assert len(model.ids) == 12


def test_foreign_files_in_the_trainers_folder_are_nobodys_checkpoints(make_trainer: Any) -> None:
    _, trained = start(make_trainer, logger=CSVLogger(".", "other"))
    trained.trainer.save_checkpoint("pretrained.ckpt")
    _, model = start(make_trainer)
    assert len(model.ids) == 12


def saved_backwards(make_trainer: Any, wrapped: bool = False, **arguments: Any) -> Any:
    files = AsyncCheckpointIO(Backwards()) if wrapped else Backwards()
    saver = ModelCheckpoint("files", every_n_train_steps=2, save_top_k=-1, save_last=True)
    return start(make_trainer, callbacks=[saver], plugins=[files], **arguments)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("ckpt_path", ["auto", "last"])
@pytest.mark.filterwarnings("ignore:The checkpoint folder .* is not empty")
def test_files_of_another_format_are_read_by_the_class_that_wrote_them(make_trainer: Any, ckpt_path: str, wrapped: bool) -> None:
    _, whole = start(make_trainer, logger=CSVLogger(".", "whole"))
    saved_backwards(make_trainer, wrapped, kill_at=7)
    trainer, model = saved_backwards(make_trainer, wrapped, ckpt_path=ckpt_path)
    assert os.path.basename(trainer.ckpt_path) == "last.ckpt"
    assert torch.equal(model.layer.weight, whole.layer.weight)
    assert len(model.ids) == 6


def test_torn_files_of_another_format_are_named_too(make_trainer: Any) -> None:
    saved_backwards(make_trainer, kill_at=7)
    path = Path("files/epoch=0-step=6.ckpt")
    path.write_bytes(path.read_bytes()[100:])
    Path("files/last.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"epoch=0-step=4\.ckpt is used instead: .*epoch=0-step=6\.ckpt: negative seek value"):
        _, model = saved_backwards(make_trainer)
    assert len(model.ids) == 8


def test_evaluation_takes_no_auto(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="'auto' goes on with an interrupted fit"):
        make_trainer().validate(_Validated(), DataLoader(torch.arange(2.0)), ckpt_path="auto")  # type: ignore[arg-type]


class _Validated(Model):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass


def test_other_code_is_told(make_trainer: Any) -> None:
    start(make_trainer, kill_at=5, callbacks=[ModelCheckpoint("files", every_n_train_steps=2)])
    path = "files/epoch=0-step=4.ckpt"
    content = torch.load(path, weights_only=True)
    content["keraunos"]["torch"] = "1.0"
    torch.save(content, path)
    with pytest.warns(UserWarning, match=r"saved by other code \(torch 1\.0 then, .* now\)"):
        start(make_trainer, callbacks=[ModelCheckpoint("files", every_n_train_steps=2)])
