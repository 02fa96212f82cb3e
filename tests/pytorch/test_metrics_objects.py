"""``self.log`` with Metric objects: they accumulate by themselves, are computed at the epoch's end, and reset once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryPrecision, BinaryRecall

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule


class Counted(SumMetric):
    """A sum that counts how often it was reset and computed."""

    resets = computed = 0

    def reset(self) -> None:
        self.resets += 1
        super().reset()

    def compute(self) -> Tensor:
        self.computed += 1
        return super().compute()


def values(trainer: Any) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_metric_is_computed_and_reset_once_in_each_epoch(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.total = Counted()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.total.update(batch)
            self.log("total", self.total, on_epoch=True, on_step=False)
            return self.weight * 1.0

    rows, model = Rows(), Model()
    model.total.resets = 0
    trainer = make_trainer(max_epochs=3, logger=rows)
    trainer.fit(model, numbers(4))
    assert rows.of("total") == [(3, 6.0), (7, 6.0), (11, 6.0)]
    assert (model.total.resets, model.total.computed) == (3, 3)


@pytest.mark.parametrize("second", ["training_step", "on_train_batch_end", "on_train_epoch_end"])
def test_metric_logged_twice_is_reset_once(Weight: Any, make_trainer: Any, numbers: Any, second: str) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.total = Counted()

        def log_again(self, where: str) -> None:
            if where == second:
                self.log("again", self.total, on_epoch=True)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.total(batch)
            self.log("total", self.total, on_epoch=True, on_step=True)
            self.log_again("training_step")
            return self.weight * 1.0

        def on_train_batch_end(self, *args: Any) -> None:
            self.log_again("on_train_batch_end")

        def on_train_epoch_end(self) -> None:
            self.log_again("on_train_epoch_end")

    model, trainer = Model(), make_trainer(max_epochs=2)
    model.total.resets = 0
    trainer.fit(model, numbers(4))
    found = values(trainer)
    assert found["total"] == found["total_epoch"] == found["again"] == 6.0
    assert found["total_step"] == 3.0  # of the last batch alone
    # Besides our two, forward() of a metric with sums resets for each batch's own value.
    assert model.total._update_count == 0
    assert model.total.resets == 2 + 8


def test_metric_in_training_and_validation_is_reset_by_each(Evaluated: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.train_total, self.val_total = SumMetric(), SumMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.train_total.update(batch)
            self.log("train total", self.train_total, on_epoch=True, on_step=False)
            return self.weight * 1.0

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.val_total.update(batch)
            self.log("val total", self.val_total)

    rows, model = Rows(), Model()
    trainer = make_trainer(max_epochs=2, logger=rows, val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(model, numbers(4), numbers(3, start=10))
    assert [value for _, value in rows.of("val total")] == [33.0] * 4
    assert [value for _, value in rows.of("train total")] == [6.0] * 2


def test_step_value_of_a_metric_is_that_of_the_batch(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.mean(batch)
            self.log("mean", self.mean, on_step=True, on_epoch=True, prog_bar=True)
            return self.weight * 1.0

    rows = Rows()
    trainer = make_trainer(logger=rows)
    trainer.fit(Model(), numbers(4))
    assert rows.of("mean_step") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert rows.of("mean_epoch") == [(3, 1.5)]
    assert trainer.progress_bar_metrics == {"mean_step": 3.0, "mean_epoch": 1.5}


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "update"])
def test_collection_is_logged_item_by_item(Weight: Any, make_trainer: Any, forward: bool) -> None:
    torch.manual_seed(3)
    batches = [(torch.rand(16), torch.randint(2, (16,))) for _ in range(5)]

    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            # Precision and recall share their state inside the collection.
            self.metrics = MetricCollection([BinaryAccuracy(), BinaryPrecision(), BinaryRecall()], prefix="train/")
            self.epochs: list[dict[str, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (self.metrics if forward else self.metrics.update)(*batch)
            self.log_dict(self.metrics, on_step=False, on_epoch=True)
            return self.weight * 1.0

    class Epochs(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.epochs.append(values(trainer))

    model = Model()
    trainer = make_trainer(max_epochs=2, callbacks=[Epochs()])
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    expected = MetricCollection([BinaryAccuracy(), BinaryPrecision(), BinaryRecall()], prefix="train/")
    scores = expected(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    assert len(model.epochs) == 2
    for epoch in model.epochs:
        assert epoch == pytest.approx({name: value.item() for name, value in scores.items()})
    assert all(metric._update_count == 0 for metric in model.metrics.values())


def test_two_loaders_may_have_a_metric_each(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.totals = nn.ModuleList([SumMetric(), SumMetric()])

        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            self.totals[dataloader_idx].update(batch)
            self.log("total", self.totals[dataloader_idx])

    model, trainer = Model(), make_trainer()
    for _ in range(2):
        results = trainer.test(model, [numbers(3), numbers(2, start=10)], verbose=False)
        assert results == [{"total/dataloader_idx_0": 3.0}, {"total/dataloader_idx_1": 21.0}]


def test_metric_used_under_inference_mode_goes_on_in_training(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.total, self.largest = SumMetric(), MaxMetric()

        def log_all(self, batch: Tensor) -> None:
            self.total.update(batch)
            self.largest.update(batch)
            self.log_dict({"total": self.total, "largest": self.largest}, on_epoch=True, on_step=False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log_all(batch)
            return self.weight * 1.0

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if not self.trainer.training and self.trainer.state.fn == "validate":
                self.log_all(batch)

    model, trainer = Model(), make_trainer()
    trainer.validate(model, numbers(3), verbose=False)
    assert not any(state.is_inference() for metric in (model.total, model.largest) for state in metric.metric_state.values())
    trainer.fit(model, numbers(4), numbers(1))
    assert values(trainer) == {"total": 6.0, "largest": 3.0}


def test_metric_of_a_failed_epoch_starts_anew_in_the_next_run(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.total, self.fails = SumMetric(), True

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.total.update(batch)
            self.log("total", self.total, on_epoch=True, on_step=False)
            if self.fails and batch_idx == 2:
                raise RuntimeError("boom")
            return self.weight * 1.0

    model, trainer = Model(), make_trainer()
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(model, numbers(4))
    assert model.total.compute() == 3.0  # still there to be looked at
    model.fails = False
    trainer.fit(model, numbers(4))
    assert values(trainer) == {"total": 6.0}


def test_metric_is_saved_with_the_module_in_mid_epoch(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.total = SumMetric()
            self.total.persistent(True)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.total.update(batch)
            self.log("total", self.total, on_epoch=True, on_step=False)
            if batch_idx == 2:
                self.trainer.save_checkpoint("mid.ckpt")
            return self.weight * 1.0

    make_trainer().fit(Model(), numbers(4))
    assert torch.load("mid.ckpt", weights_only=True)["state_dict"]["total.sum_value"] == 3.0


# ---- what is refused ------------------------------------------------------------------------------------------------


class Logging(LightningModule):
    """Logs what it is given."""

    def __init__(self, *logged: Any, **flags: Any) -> None:
        super().__init__()
        self.__dict__["logged"], self.flags = logged, flags
        self.known = SumMetric()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        value = self.logged[batch_idx % len(self.logged)]
        if isinstance(value, Metric):
            value(1.0)
        self.log("x", value, **self.flags)
        return self.weight * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_metric_that_is_no_attribute_is_refused(make_trainer: Any, numbers: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"'x'.*no attribute of Logging.*'known'"):
        make_trainer().fit(Logging(SumMetric()), numbers())
    with pytest.raises(MisconfigurationException, match=r"metric_attribute='other'.*'known'"):
        make_trainer().fit(Logging(SumMetric(), metric_attribute="other"), numbers())


def test_metric_attribute_names_a_metric_that_is_not_found_by_identity(make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer()
    trainer.fit(Logging(SumMetric(), metric_attribute="known", on_epoch=True, on_step=False), numbers(4))
    assert values(trainer) == {"x": 4.0}


@pytest.mark.parametrize("metric_first", [True, False])
def test_metric_and_number_under_one_name_in_one_hook_are_refused(make_trainer: Any, numbers: Any, metric_first: bool) -> None:
    model = Logging(on_epoch=True)
    model.__dict__["logged"] = [model.known, 1.0] if metric_first else [1.0, model.known]
    with pytest.raises(MisconfigurationException, match=r"'x'.*a Metric and a plain value"):
        make_trainer().fit(model, numbers())


def test_metric_that_computes_several_values_is_refused_by_name(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Several(SumMetric):
        def compute(self) -> Any:
            return {"a": super().compute()}

    model = Logging(on_step=False, on_epoch=True)
    model.known = Several()
    model.__dict__["logged"] = [model.known]
    with pytest.raises(ValueError, match=r"'x'.*nested dictionaries"):
        make_trainer().fit(model, numbers())
