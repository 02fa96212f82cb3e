"""A trainer can be pickled and copied, before, after and during a run, and the copy runs by itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.demos.boring_classes import RandomDataset
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loops.evaluate import EvaluationLoop
from lightning.pytorch.loops.fit import FitLoop

WAYS: dict[str, Callable[[Any], Any]] = {"pickle": lambda each: pickle.loads(pickle.dumps(each)), "deepcopy": copy.deepcopy}
ways = pytest.mark.parametrize("way", WAYS)


class Model(LightningModule):
    """Overrides much of what a run resolves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", batch.mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test", batch.mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch)  # type: ignore[no-any-return]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(LightningDataModule):
    """Two batches of everything."""

    def loader(self) -> Any:
        return torch.utils.data.DataLoader(RandomDataset(2, 2))

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "bare": dict,
    "checkpoints and CSV": lambda: {"logger": CSVLogger("logs"), "enable_checkpointing": True, "callbacks": [ModelCheckpoint("kept")]},
    "TensorBoard": lambda: {"logger": TensorBoardLogger("logs"), "callbacks": [LearningRateMonitor()]},
    "tqdm": lambda: {"enable_progress_bar": True, "callbacks": [TQDMProgressBar(), EarlyStopping("val")]},
    "rich": lambda: {"enable_progress_bar": True, "callbacks": [RichProgressBar(), Timer("00:01:00:00")]},
    "accumulation": lambda: {"callbacks": [GradientAccumulationScheduler({0: 2})]},
    "clipping, bfloat16 and a profiler": lambda: {"precision": "bf16-mixed", "gradient_clip_val": 1.0, "profiler": "simple"},
    "times": lambda: {"logger": CSVLogger("logs"), "callbacks": [ThroughputMonitor(len, torch.numel)], "profiler": "epoch"},
}


def runs(trainer: Any) -> None:
    """The trainer takes the steps that it should, and leads its own model."""
    before, model = trainer.global_step, Model()
    trainer.fit_loop.max_epochs = trainer.current_epoch + 1
    trainer.fit(model, datamodule=Data())
    assert model.trainer is trainer
    assert trainer.global_step > before
    assert trainer.test(model, datamodule=Data(), verbose=False)[0].keys() == {"test"}
    assert len(trainer.predict(model, datamodule=Data())) == 2


@ways
@pytest.mark.filterwarnings("ignore:`Model` overrides `optimizer_step`", "ignore:.*not empty")
@pytest.mark.parametrize("parts", PARTS)
def test_trainer_is_copied_before_and_after_its_runs(make_trainer: Any, way: str, parts: str) -> None:
    trainer = make_trainer(**PARTS[parts]())
    runs(WAYS[way](trainer))
    runs(trainer)
    runs(WAYS[way](trainer))
    runs(trainer)


@ways
def test_copy_keeps_what_the_trainer_has_come_to(make_trainer: Any, way: str) -> None:
    trainer = make_trainer(max_epochs=2)
    trainer.fit(Model(), datamodule=Data())
    twin = WAYS[way](trainer)
    assert (twin.current_epoch, twin.global_step, twin.state.finished) == (2, 4, True)
    assert twin.callback_metrics.keys() == trainer.callback_metrics.keys()
    assert twin.fit_loop.trainer is twin
    assert twin.validate_loop.trainer is twin
    assert twin.lightning_module is not trainer.lightning_module
    twin.save_checkpoint("twin.ckpt")
    resumed = make_trainer(max_epochs=3)
    resumed.fit(Model(), datamodule=Data(), ckpt_path="twin.ckpt")
    assert resumed.global_step == 6


@ways
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_batch_end", "on_train_end"])
def test_trainer_is_copied_in_a_run(make_trainer: Any, way: str, hook: str) -> None:
    copies: list[Any] = []

    def note(self: Any, trainer: Any, *args: Any) -> None:
        if not copies:
            copies.append(None)  # the copy's callback has one too, and must not copy again
            copies.append(WAYS[way](trainer))

    Copying = type("Copying", (Callback,), {hook: note, "__reduce__": lambda self: (Callback, ())})
    trainer = make_trainer(callbacks=Copying())
    trainer.fit(Model(), datamodule=Data())
    assert trainer.global_step == 2
    runs(copies[1])


def test_state_of_a_loop_after_a_run_is_that_of_a_loop_before_it(make_trainer: Any) -> None:
    trainer, fresh = make_trainer(), make_trainer()
    trainer.fit(Model(), datamodule=Data())
    assert trainer.fit_loop.__getstate__().keys() == vars(FitLoop(fresh)).keys()
    assert trainer.validate_loop.__getstate__().keys() == vars(EvaluationLoop(fresh, "validation", "val")).keys()
