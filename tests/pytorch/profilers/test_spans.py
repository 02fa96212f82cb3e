"""The spans that a run gives to a profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.profilers import SimpleProfiler


class Spans(SimpleProfiler):
    """Remembers which spans there were, in their order, and inside of which."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.within: dict[str, set[str]] = {}
        self.open: list[str] = []

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        self.names.append(action_name)
        self.within.setdefault(action_name, set()).update(self.open)
        self.open.append(action_name)
        yield action_name
        self.open.pop()


TRAINING = {
    "run_training_epoch": 2,
    "run_training_batch": 4,
    "[_TrainingEpochLoop].train_dataloader_next": 4,
    "[Strategy]SingleDeviceStrategy.batch_to_device": 4,
    "[Strategy]SingleDeviceStrategy.training_step": 4,
    "[Strategy]SingleDeviceStrategy.backward": 4,
    "[LightningModule]Model.optimizer_step": 4,
    "[LightningModule]Model.optimizer_zero_grad": 4,
    "[LightningModule]Model.configure_optimizers": 1,
    "[LightningModule]Model.setup": 1,
    "[LightningModule]Model.teardown": 1,
    "[Callback]Callback.setup": 1,
    "[Callback]Callback.teardown": 1,
}


@pytest.mark.parametrize("overrides", [False, True], ids=["plain", "overridden"])
def test_training_is_measured_part_by_part(Weight: Any, make_trainer: Any, numbers: Any, overrides: bool) -> None:
    class Model(Weight):  # type: ignore[misc]
        if overrides:

            def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                super().optimizer_step(*args, **kwargs)

            def optimizer_zero_grad(self, *args: Any) -> None:
                super().optimizer_zero_grad(*args)

            def backward(self, loss: Tensor) -> None:
                super().backward(loss)

            def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
                super().configure_gradient_clipping(*args, **kwargs)

            def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
                super().lr_scheduler_step(scheduler, metric)

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    spans = Spans()
    make_trainer(max_epochs=2, limit_train_batches=2, profiler=spans, callbacks=Callback()).fit(Model(), numbers(4))
    counts = Counter(spans.names)
    assert {name: counts[name] for name in TRAINING} == TRAINING
    hooks = {"backward": 4, "configure_gradient_clipping": 4, "lr_scheduler_step": 2}
    for name, count in hooks.items():
        assert counts[f"[LightningModule]Model.{name}"] == (count if overrides else 0)
    assert spans.within["[Strategy]SingleDeviceStrategy.backward"] >= {"run_training_epoch", "[LightningModule]Model.optimizer_step"}
    assert spans.within["[_TrainingEpochLoop].train_dataloader_next"] == {"run_training_epoch"}


@pytest.mark.parametrize(
    ("task", "waits"),
    [("validate", "[_EvaluationLoop].val_next"), ("test", "[_EvaluationLoop].test_next"), ("predict", "[_PredictionLoop].predict_next")],
)
def test_the_wait_for_each_batch_is_measured(Evaluated: Any, make_trainer: Any, numbers: Any, task: str, waits: str) -> None:
    spans = Spans()
    trainer = make_trainer(profiler=spans, limit_val_batches=3, limit_test_batches=3, limit_predict_batches=3)
    getattr(trainer, task)(Evaluated(), numbers(4))
    assert spans.names.count(waits) == 3
    assert spans.names.count("[Strategy]SingleDeviceStrategy.batch_to_device") == 3


def test_validation_within_fit_is_measured_too(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    spans = Spans()
    make_trainer(profiler=spans, num_sanity_val_steps=1, limit_val_batches=2).fit(Evaluated(), numbers(2), numbers(3))
    assert spans.names.count("[_EvaluationLoop].val_next") == 1 + 2


def test_validation_and_logging_are_spans_of_their_own(Evaluated: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    spans = Spans()
    make_trainer(profiler=spans, logger=Rows(), log_every_n_steps=2).fit(Evaluated(), numbers(4), numbers(1))
    assert spans.names.count("run_validation") == 1
    assert "run_validation" in spans.within["[_EvaluationLoop].val_next"]
    assert spans.names.count("log_metrics") == 2 + 2  # two rows, and the end of the epoch's values


def test_data_of_any_kind_is_the_same_with_a_profiler(Weight: Any, make_trainer: Any, numbers: Any, stream: Any) -> None:
    for loader in (numbers(3), stream(3), {"a": numbers(3)}):

        class Model(Weight):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

        model = Model()
        make_trainer(max_epochs=2, profiler=Spans()).fit(model, loader)
        assert model.seen == [[0.0], [1.0], [2.0]] * 2


def test_datamodules_are_measured(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return numbers(1)

        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch

    spans = Spans()
    make_trainer(profiler=spans).fit(Weight(), datamodule=Data())
    counts = Counter(name for name in spans.names if name.startswith("[LightningDataModule]"))
    names = ("setup", "teardown", "train_dataloader", "on_after_batch_transfer")
    assert counts == {f"[LightningDataModule]Data.{name}": 1 for name in names}
