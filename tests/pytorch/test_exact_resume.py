"""A run that is interrupted anywhere and resumed ends with the same bits, the same samples, the same hooks and the same rows."""

from __future__ import annotations

import random
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.hooks import EVENT_HOOKS

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it

BATCHES = 5  # in an epoch
EPOCHS = 2


class Noisy(Dataset[Any]):
    """Samples with their numbers, and noise from all three generators."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return index, torch.tensor([float(index), 1.0]) + 0.1 * noise.float()


class Model(LightningModule):
    """Everything that has a state: dropout, batch normalisation, moments, schedulers of all kinds, Metrics, running means."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.mean = torchmetrics.MeanMetric()
        self.both = torchmetrics.MetricCollection({"mae": torchmetrics.MeanAbsoluteError(), "mse": torchmetrics.MeanSquaredError()})
        self.register_buffer("batches_ended", torch.zeros(()))
        self.ids: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, x = batch
        self.ids += ids.tolist()
        y = self.layers(x + 0.01 * torch.randn_like(x)).squeeze(1)
        loss = nn.functional.mse_loss(y, x[:, 0].sin())
        self.both.update(y, x[:, 0])
        self.mean.update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("seldom", 2.0 * batch_idx, on_step=False, on_epoch=True) if batch_idx == 0 else None
        self.log("mean", self.mean, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches_ended += 1

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.both.compute())
        self.both.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _ids, x = batch
        self.log("val", nn.functional.mse_loss(self.layers(x).squeeze(1), x[:, 0]) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        on_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        on_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
        by_loss = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=0)
        by_val = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.8, patience=0)
        return [optimizer], [
            {"scheduler": on_step, "interval": "step"},
            on_epoch,
            {"scheduler": by_loss, "interval": "step", "monitor": "loss"},
            {"scheduler": by_val, "monitor": "val"},
        ]


class Manual(Model):
    """Two optimizers that step by hand, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.layers[0].parameters(), lr=0.05), torch.optim.SGD(self.layers[3].parameters(), lr=0.1, momentum=0.9)]


class Trace(Callback):
    """Remembers which hooks ran, from the start of training to its end."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []
        for name in EVENT_HOOKS:
            if hasattr(Callback, name):
                setattr(self, name, self._noting(name))

    def _noting(self, name: str) -> Any:
        def note(trainer: Any, *_: Any) -> None:
            p = trainer.fit_loop.progress
            self.hooks.append((name, p.epoch, p.batch_idx, p.global_step))

        return note


class Interruption(Exception):
    """Ends a run."""


class Interrupt(Checkpoint):
    """Saves at the n-th event, counted over all hooks at whose end something may be saved, and ends the run there."""

    HOOKS = ("on_train_epoch_start", "on_train_batch_end", "on_validation_end", "on_train_epoch_end")

    def __init__(self, at: int) -> None:
        self.at, self.events = at, 0
        for name in self.HOOKS:
            setattr(self, name, self._event)

    def _event(self, trainer: Any, *_: Any) -> None:
        self.events += 1
        if self.events == self.at:
            trainer.save_checkpoint("saved.ckpt")
            raise Interruption


WITHIN = (
    "on_train_start",
    "on_fit_start",
    "setup",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a loader with a state": {"kind": StatefulDataLoader},
    "manual optimization": {"model": Manual, "val_check_interval": 2},
    "validation in mid-epoch": {"val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "limits": {"limit_train_batches": 4, "limit_val_batches": 1, "log_every_n_steps": 2},
    "clipping": {"gradient_clip_val": 0.1, "val_check_interval": 4, "check_val_every_n_epoch": None},
}


def loaders(workers: int, kind: Any = DataLoader) -> tuple[Any, Any]:
    arguments: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    train = kind(Noisy(BATCHES * 2), batch_size=2, shuffle=True, drop_last=True, **arguments)
    return train, DataLoader(Noisy(4), batch_size=2, **arguments)


class Run:
    """One call of fit, and what it left behind."""

    def __init__(
        self,
        make_trainer: Any,
        Rows: Any,
        at: int = 0,
        ckpt_path: Any = None,
        workers: int = 0,
        seed: int = 1,
        kind: Any = DataLoader,
        model: Any = Model,
        **settings: Any,
    ):
        seed_everything(seed, verbose=False)
        self.rows, self.trace, self.model, interrupt = Rows(), Trace(), model(), Interrupt(at)
        callbacks = [self.trace, EarlyStopping("val", patience=100), interrupt]
        self.trainer = make_trainer(max_epochs=EPOCHS, logger=self.rows, callbacks=callbacks, enable_checkpointing=True, **settings)
        try:
            self.trainer.fit(self.model, *loaders(workers, kind), ckpt_path=ckpt_path)
            self.interrupted = False
        except Interruption:
            self.interrupted = True
        self.events = interrupt.events
        self.hooks = [call for call in self.trace.hooks if call[0] not in WITHIN]


def assert_as_if_never_interrupted(whole: Run, first: Run, second: Run, where: Any) -> None:
    assert (first.interrupted, second.interrupted) == (True, False), where
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), (where, name)
    assert first.model.ids + second.model.ids == whole.model.ids, where
    # A hook of a beginning that saves begins anew; those of an end are done.
    done = first.hooks[:-1] if first.hooks[-1][0] == "on_train_epoch_start" else first.hooks
    assert done + second.hooks == whole.hooks, where
    assert first.rows.rows + second.rows.rows == whole.rows.rows, where
    metrics, expected = second.trainer.callback_metrics, whole.trainer.callback_metrics
    assert {name: value.item() for name, value in metrics.items()} == {name: value.item() for name, value in expected.items()}, where


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_run_that_is_interrupted_between_any_two_events_goes_on_exactly(make_trainer: Any, Rows: Any, name: str) -> None:
    whole = Run(make_trainer, Rows, **SETTINGS[name])
    assert whole.events > 2 * EPOCHS
    for at in range(1, whole.events + 1):
        first = Run(make_trainer, Rows, at, **SETTINGS[name])
        second = Run(make_trainer, Rows, ckpt_path="saved.ckpt", seed=99, **SETTINGS[name])
        assert_as_if_never_interrupted(whole, first, second, (name, at, first.hooks[-1]))


@pytest.mark.parametrize(("at", "kind"), [*((at, DataLoader) for at in (1, 4, 6, 7, 11)), *((at, StatefulDataLoader) for at in (4, 7))])
def test_workers_go_on_with_their_random_numbers(make_trainer: Any, Rows: Any, at: int, kind: Any) -> None:
    settings: dict[str, Any] = {"workers": 2, "val_check_interval": 3, "kind": kind}
    whole = Run(make_trainer, Rows, **settings)
    first = Run(make_trainer, Rows, at, **settings)
    second = Run(make_trainer, Rows, ckpt_path="saved.ckpt", seed=99, **settings)
    assert_as_if_never_interrupted(whole, first, second, (at, first.hooks[-1]))


def test_a_run_that_is_interrupted_again_and_again_goes_on_exactly(make_trainer: Any, Rows: Any) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 2}
    whole = Run(make_trainer, Rows, **settings)
    parts = [Run(make_trainer, Rows, 2, **settings)]
    while parts[-1].interrupted:
        parts.append(Run(make_trainer, Rows, 2, ckpt_path="saved.ckpt", seed=90 + len(parts), **settings))
    assert len(parts) > 4
    assert list(chain.from_iterable(part.model.ids for part in parts)) == whole.model.ids
    assert list(chain.from_iterable(part.rows.rows for part in parts)) == whole.rows.rows
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts[-1].model.state_dict()[name]), name


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_a_validation_that_is_interrupted_begins_anew_with_the_same_random_numbers(make_trainer: Any, Rows: Any, hook: str) -> None:
    class SaveInValidation(Callback):
        def __init__(self) -> None:
            setattr(self, hook, self._save)

        def _save(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4 and not Path("middle.ckpt").exists():
                trainer.save_checkpoint("middle.ckpt")

    def run(ckpt_path: Any = None, seed: int = 1) -> Any:
        seed_everything(seed, verbose=False)
        model, rows = Model(), Rows()
        trainer = make_trainer(max_epochs=EPOCHS, logger=rows, callbacks=[SaveInValidation()], val_check_interval=2)
        trainer.fit(model, *loaders(0), ckpt_path=ckpt_path)
        return model, rows, trainer

    whole, rows, trainer = run()
    resumed, later, again = run("middle.ckpt", seed=99)
    assert later.of("val") == [(step, value) for step, value in rows.of("val") if step >= 3]
    assert again.validate_loop.seen == trainer.validate_loop.seen
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end"])
@pytest.mark.parametrize("steps", [7, 8, 10])
def test_a_run_that_max_steps_has_ended_within_an_epoch_ends_as_it_did(make_trainer: Any, Rows: Any, hook: str, steps: int) -> None:
    class SaveAtTheEnd(Checkpoint):
        def __init__(self) -> None:
            setattr(self, hook, self._save)

        def _save(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint("stopped.ckpt")
                if ends:
                    raise Interruption

    def run(max_steps: int, ckpt_path: Any = None, seed: int = 1) -> Any:
        seed_everything(seed, verbose=False)
        model, rows = Model(), Rows()
        callbacks = [SaveAtTheEnd()] if ckpt_path is None else []
        trainer = make_trainer(max_epochs=9, max_steps=max_steps, logger=rows, callbacks=callbacks, enable_checkpointing=True)
        with suppress(Interruption):
            trainer.fit(model, *loaders(0), ckpt_path=ckpt_path)
        return model, rows.rows, trainer

    ends = False
    whole, expected, trainer = run(steps)
    ends = True
    first, before, _ = run(7)
    resumed, after, again = run(steps, "stopped.ckpt", seed=99)
    # The hooks of the end come at the stop too, and the rows that belong to it.
    extra = [row for row in before if row not in expected] if steps > 7 else []
    assert [row for row in before if row not in extra] + after == expected
    assert again.current_epoch == trainer.current_epoch == 2
    assert first.ids + resumed.ids == whole.ids
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:The checkpoint folder .* is not empty")
def test_a_run_that_early_stopping_has_ended_is_not_trained_on(make_trainer: Any, Rows: Any) -> None:
    def run(ckpt_path: Any = None) -> Any:
        seed_everything(1, verbose=False)
        model, rows = Model(), Rows()
        stopping = EarlyStopping("val", patience=1, min_delta=100.0)
        saver = ModelCheckpoint("files", monitor=None, every_n_epochs=1, save_last=True)
        trainer = make_trainer(max_epochs=9, logger=rows, callbacks=[stopping, saver], enable_checkpointing=True)
        trainer.fit(model, *loaders(0), ckpt_path=ckpt_path)
        return model, trainer

    model, trainer = run()
    assert trainer.current_epoch == 2
    again, resumed = run("files/last.ckpt")
    assert again.ids == []
    assert resumed.current_epoch == 2
    assert torch.equal(again.layers[0].weight, model.layers[0].weight)


class Reloading(Model):
    """Each epoch's loaders have other lengths, so it matters in which epoch they are asked for."""

    def train_dataloader(self) -> Any:
        return DataLoader(Noisy(4 + 2 * self.current_epoch), batch_size=2, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Noisy(2 + self.current_epoch), batch_size=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


@pytest.mark.parametrize("early", [False, True])
def test_loaders_that_are_reloaded_are_asked_for_in_the_same_epochs(make_trainer: Any, Rows: Any, early: bool) -> None:
    class Estimating(Reloading):
        def configure_optimizers(self) -> Any:
            if early:
                assert self.trainer.estimated_stepping_batches  # which asks for the training data
            return super().configure_optimizers()

    def run(at: int = 0, ckpt_path: Any = None, seed: int = 1) -> Any:
        seed_everything(seed, verbose=False)
        model, rows, interrupt = Estimating(), Rows(), Interrupt(at)
        settings: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 2, "check_val_every_n_epoch": 2, "enable_checkpointing": True}
        trainer = make_trainer(max_epochs=4, logger=rows, callbacks=[interrupt], **settings)
        with suppress(Interruption):
            trainer.fit(model, ckpt_path=ckpt_path)
        return model, rows.rows, interrupt.events

    whole, expected, events = run()
    for at in range(1, events + 1):
        first, before, _ = run(at)
        second, after, _ = run(ckpt_path="saved.ckpt", seed=99)
        assert first.ids + second.ids == whole.ids, at
        assert before + after == expected, at
        for name, value in whole.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), (at, name)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end", "on_train_end"])
def test_a_run_that_early_stopping_ends_within_an_epoch_ends_once(make_trainer: Any, Rows: Any, hook: str) -> None:
    class SaveWhenStopped(Checkpoint):
        def __init__(self) -> None:
            setattr(self, hook, self._save)

        def _save(self, trainer: Any, *_: Any) -> None:
            if trainer.should_stop and ends:
                trainer.save_checkpoint("stopped.ckpt")
                raise Interruption

    def run(ckpt_path: Any = None, seed: int = 1) -> Any:
        seed_everything(seed, verbose=False)
        model, rows = Model(), Rows()
        callbacks = [EarlyStopping("val", patience=1, min_delta=100.0, check_on_train_epoch_end=False), SaveWhenStopped()]
        trainer = make_trainer(max_epochs=9, logger=rows, callbacks=callbacks, val_check_interval=2, enable_checkpointing=True)
        with suppress(Interruption):
            trainer.fit(model, *loaders(0), ckpt_path=ckpt_path)
        return model, rows.rows, trainer

    ends = False
    whole, expected, trainer = run()
    ends = True
    first, before, _ = run()
    ends = False
    second, after, again = run("stopped.ckpt", seed=99)
    assert first.ids == whole.ids
    assert second.ids == []
    assert before + after == expected
    assert again.current_epoch == trainer.current_epoch
    assert again.callback_metrics.keys() == trainer.callback_metrics.keys()
