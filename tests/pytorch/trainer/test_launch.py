"""Runs in forks of this process and in fresh interpreters, and what comes back from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import Evaluated, Numbers, Regression, Vectors, Weight, loader, quiet
from training import largest_difference, plain

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerStatus


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "KERAUNOS_")):
            monkeypatch.delenv(name)


def numbers(count: int, batch_size: int = 1) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count), batch_size=batch_size)


class Tally(Callback):
    """Keeps plain data, and something that is none."""

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self.parts: dict[str, Any] = {}
        self.function: Callable[[], int] = lambda: 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ranks.append(trainer.global_rank)
        self.parts["loss"] = outputs["loss"].detach()
        self.parts["pids"] = os.getpid()
        self.function = lambda: 2


class Validated(Evaluated):
    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("val", batch.mean() + self.weight, sync_dist=True)


# ---- forks ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is not empty.*")
def test_forked_run_comes_back_into_this_process(tmp_path: Path) -> None:
    alone = Validated()
    quiet(max_epochs=2).fit(alone, loader(Numbers(4), 2, 1), numbers(5))
    model, tally = Validated(), Tally()
    checkpoint = ModelCheckpoint(tmp_path / "saved", monitor="val", save_last=True)
    trainer = quiet(
        strategy="ddp_fork", devices=2, max_epochs=2, callbacks=[tally, EarlyStopping("val"), checkpoint], enable_checkpointing=True,
        logger=CSVLogger(tmp_path, name="logs"), default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, numbers(4), numbers(5))
    assert model.weight.item() == pytest.approx(alone.weight.item())
    assert tally.ranks == [0, 0, 0, 0]
    assert tally.parts["pids"] != os.getpid()
    assert tally.function() == 1
    assert isinstance(tally.parts["loss"], Tensor)
    assert trainer.callback_metrics["val"] == pytest.approx(2 + model.weight.item())
    assert [trainer.global_step, trainer.current_epoch, trainer.state.status] == [4, 2, TrainerStatus.FINISHED]
    assert (trainer.num_training_batches, trainer.num_val_batches) == (2, [3])
    assert trainer.lightning_module is model
    assert model.trainer is trainer
    # What the next runs build upon.
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=1-step=4.ckpt", "last.ckpt"]
    assert checkpoint.best_model_path == str(tmp_path / "saved" / "epoch=1-step=4.ckpt")
    assert checkpoint.best_model_score == trainer.callback_metrics["val"]
    assert trainer.early_stopping_callback.best_score == checkpoint.best_model_score  # type: ignore[union-attr]
    assert trainer.log_dir == str(tmp_path / "logs" / "version_0")
    rows = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,step,val"
    assert len(rows) == 3
    assert trainer.test(model, numbers(3), ckpt_path="best", verbose=False) == [{"test": 1.0}]
    assert len(trainer.predict(model, numbers(3))) == 2  # of rank 0
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, numbers(4), numbers(5), ckpt_path="last")
    assert [trainer.global_step, trainer.current_epoch] == [6, 3]
    assert torch.distributed.is_initialized() is False


def test_forked_evaluation_returns_the_results_of_all_data() -> None:
    model, trainer = Evaluated(), quiet(strategy="ddp_fork", devices=2)
    assert trainer.validate(model, numbers(5), verbose=False) == [{"val": 2.0}]
    assert trainer.callback_metrics == {"val": torch.tensor(2.0)}
    assert trainer.test(model, numbers(1), verbose=False) == [{"test": 0.0}]


class Configured(Regression):
    """Makes its layers when a run starts."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(3)
            self.net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))


def test_layers_that_were_made_in_the_forks_come_back_too() -> None:
    model = Configured()
    assert list(model.state_dict()) == []
    quiet(strategy="ddp_fork", devices=2).fit(model, loader(Vectors(30), 6, 2))
    alone = Configured()
    quiet().fit(alone, loader(Vectors(30), 6, 1))
    assert largest_difference(plain(model.state_dict()), plain(alone.state_dict())) < 1e-6


def test_forked_weights_are_those_of_one_process() -> None:
    models = [Regression(), Regression()]
    quiet(strategy="ddp_fork", devices=2).fit(models[0], loader(Vectors(30), 6, 2))
    quiet().fit(models[1], loader(Vectors(30), 6, 1))
    assert largest_difference(plain(models[0].state_dict()), plain(models[1].state_dict())) < 1e-6


def test_notebook_forks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    trainer = quiet(devices=2)
    assert trainer.strategy.start_method == "fork"  # type: ignore[attr-defined]
    model, tally = Weight(), Tally()
    trainer.callbacks.append(tally)
    trainer.fit(model, numbers(4))
    assert tally.ranks == [0, 0]
    for strategy in ("ddp", "ddp_spawn"):
        with pytest.raises(MisconfigurationException, match="ddp_notebook"):
            quiet(devices=2, strategy=strategy).fit(model, numbers(4))


class Fails(Weight):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.trainer.global_rank == 1 and batch_idx == 1:
            raise ZeroDivisionError("the user's own")
        return super().training_step(batch, batch_idx)


def test_error_in_a_fork_names_the_rank_and_leaves_a_trainer_that_can_be_used() -> None:
    trainer = quiet(strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=r"(?s)[Rr]ank 1.*ZeroDivisionError: the user's own"):
        trainer.fit(Fails(), numbers(4))
    assert trainer.validate(Evaluated(), numbers(2), verbose=False) == [{"val": 0.5}]


# ---- fresh interpreters ---------------------------------------------------------------------------------------------


def test_model_that_can_not_be_sent_is_told_what_to_do() -> None:
    model: Any = Evaluated()
    model.function = lambda: 1
    trainer = quiet(strategy="ddp_spawn", devices=2)
    with pytest.raises(Exception, match=r"(?s)pickle can't.*top level of a module.*'ddp' or 'ddp_fork'") as raised:
        trainer.fit(model, numbers(4))
    assert type(raised.value).__name__ == "PicklingError"


def test_spawned_run_comes_back_into_this_process(tmp_path: Path) -> None:
    model, checkpoint = Regression(), ModelCheckpoint(tmp_path)
    trainer = quiet(strategy="ddp_spawn", devices=2, callbacks=checkpoint, enable_checkpointing=True)
    trainer.fit(model, loader(Vectors(30), 6, 2))
    alone = Regression()
    quiet().fit(alone, loader(Vectors(30), 6, 1))
    assert largest_difference(plain(model.state_dict()), plain(alone.state_dict())) < 1e-6
    assert checkpoint.best_model_path == str(tmp_path / "epoch=0-step=5.ckpt")
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert largest_difference(plain(saved["state_dict"]), plain(model.state_dict())) == 0
