"""What reaches loggers and the progress bar of logged values: when, in which order, under which step; and that nothing piles up."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning.pytorch import Callback, LightningModule


@pytest.fixture
def Logging(Evaluated: Any) -> Any:
    """A model that logs the number of each training batch as ``x``, and the samples of validation as ``v``, by steps and epochs."""

    class Logging(Evaluated):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", float(batch_idx), on_step=True, on_epoch=True)
            return self.weight * 1.0

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("v", batch.mean(), on_step=True, on_epoch=True)

    return Logging


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "accumulate", "expected"),
    [
        (1, 1, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 0), (6, 1), (7, 2), (8, 3), (9, 4)]),
        (2, 1, [(1, 1), (3, 3), (5, 0), (7, 2), (9, 4)]),
        (3, 1, [(2, 2), (5, 0), (8, 3)]),
        (1, 2, [(0, 1), (1, 3), (2, 4), (3, 1), (4, 3), (5, 4)]),
        (2, 2, [(1, 3), (3, 1), (5, 4)]),
        (7, 1, [(6, 1)]),
        (0, 1, []),
    ],
)
def test_step_rows_come_every_n_optimizer_steps(
    Logging: Any, make_trainer: Any, numbers: Any, Rows: Any, every: int, accumulate: int, expected: list[Any]
) -> None:
    rows = Rows()
    trainer = make_trainer(max_epochs=2, logger=rows, log_every_n_steps=every, accumulate_grad_batches=accumulate, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fewer than log_every_n_steps.*")
        trainer.fit(Logging(), numbers(5), numbers(1))
    assert rows.of("x_step") == expected
    steps = 3 if accumulate == 2 else 5
    assert rows.of("x_epoch") == [(steps - 1, 2.0), (2 * steps - 1, 2.0)]


def test_rows_come_in_the_order_of_what_they_tell(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    rows = Rows()
    trainer = make_trainer(max_epochs=2, logger=rows, val_check_interval=2)
    trainer.fit(Logging(), numbers(4), numbers(2, start=5))
    told = [(next(name for name in row if name != "epoch"), step, row.get("epoch")) for step, row in rows.rows]
    validation = [("v_step", 0, None), ("v_step", 1, None)]
    assert told == [
        ("x_step", 0, 0), ("x_step", 1, 0), *validation, ("v_epoch", 1, 0),
        ("x_step", 2, 0), ("x_step", 3, 0), ("v_step", 2, None), ("v_step", 3, None), ("v_epoch", 3, 0), ("x_epoch", 3, 0),
        ("x_step", 4, 1), ("x_step", 5, 1), ("v_step", 4, None), ("v_step", 5, None), ("v_epoch", 5, 1),
        ("x_step", 6, 1), ("x_step", 7, 1), ("v_step", 6, None), ("v_step", 7, None), ("v_epoch", 7, 1), ("x_epoch", 7, 1),
    ]  # fmt: skip


def test_values_of_one_step_stand_in_one_row(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Logging):  # type: ignore[misc]
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log_dict({"a": 1, "b": torch.tensor(2.0)})
            self.log("hidden", 3.0, logger=False)

    rows = Rows()
    make_trainer(logger=rows, limit_val_batches=0).fit(Model(), numbers(2), numbers(1))
    assert rows.rows[:2] == [(0, {"x_step": 0.0, "a": 1.0, "b": 2.0, "epoch": 0}), (1, {"x_step": 1.0, "a": 1.0, "b": 2.0, "epoch": 0})]
    assert all(type(value) in (int, float) for _, row in rows.rows for value in row.values())


def test_each_logger_gets_rows_of_its_own(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Greedy(Rows):  # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            super().log_metrics(dict(metrics), step)
            metrics.clear()

    first, second = Greedy(), Rows()
    make_trainer(logger=[first, second]).fit(Logging(), numbers(2), numbers(1))
    assert first.rows == second.rows
    assert len(first.rows) == 5
    assert all(row for _, row in second.rows)


def test_metric_named_step_moves_the_row(make_trainer: Any, numbers: Any, Rows: Any, Weight: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log_dict({"x": 1.0, "step": 100.0 + batch_idx})
            return self.weight * 1.0

    rows = Rows()
    make_trainer(logger=rows).fit(Model(), numbers(2))
    assert rows.of("x") == [(100, 1.0), (101, 1.0)]


def test_sanity_check_sends_nothing(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Logging):  # type: ignore[misc]
        def on_train_start(self) -> None:
            trainer = self.trainer
            self.metrics_before = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)

    rows, model = Rows(), Model()
    make_trainer(logger=rows, num_sanity_val_steps=2).fit(model, numbers(1), numbers(2))
    assert model.metrics_before == ({}, {}, {})
    assert rows.of("v_step") == [(0, 0.0), (1, 1.0)]
    assert rows.of("v_epoch") == [(0, 0.5)]


def test_logger_that_is_set_by_a_hook_gets_the_rows(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    given, mine = Rows(), Rows()

    class Swap(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.logger = mine

    make_trainer(logger=given, callbacks=[Swap()]).fit(Logging(), numbers(2), numbers(1))
    assert rows_of(mine) == ["x_step", "x_step", "v_step", "v_epoch", "x_epoch"]
    assert given.rows == []


def rows_of(logger: Any) -> list[str]:
    return [next(name for name in row if name != "epoch") for _, row in logger.rows]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_train_epoch_end"])
def test_rows_up_to_an_exception_arrive_before_the_logger_is_closed(
    Logging: Any, make_trainer: Any, numbers: Any, Rows: Any, error: type[BaseException], where: str
) -> None:
    class Model(Logging):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if where == "training_step" and batch_idx == 2:
                raise error("boom")
            return loss  # type: ignore[no-any-return]

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if where == "validation_step" and batch_idx == 1:
                raise error("boom")

        def on_train_epoch_end(self) -> None:
            if where == "on_train_epoch_end":
                raise error("boom")

    class Closing(Rows):  # type: ignore[misc]
        def finalize(self, status: str) -> None:
            self.finalized.append((status, rows_of(self)))

    logger = Closing()
    with pytest.raises(error):
        make_trainer(logger=logger).fit(Model(), numbers(4), numbers(2))
    steps = ["x_step"] * (2 if where == "training_step" else 4)
    validation = {"training_step": [], "validation_step": ["v_step"], "on_train_epoch_end": ["v_step", "v_step", "v_epoch"]}[where]
    assert logger.finalized == [("failed", steps + validation)]


def test_values_of_the_failed_step_can_be_seen_in_on_exception(Logging: Any, make_trainer: Any, numbers: Any) -> None:
    seen: dict[str, float] = {}

    class Model(Logging):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise RuntimeError("boom")
            return loss  # type: ignore[no-any-return]

    class Look(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.update({name: value.item() for name, value in trainer.callback_metrics.items()})

    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(callbacks=[Look()]).fit(Model(), numbers(4), numbers(1))
    assert seen == {"x": 2.0, "x_step": 2.0}


def test_rows_that_a_logger_never_took_do_not_reach_it_in_the_next_run(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Failing(Rows):  # type: ignore[misc]
        fails = True

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if self.fails:
                raise OSError("disk full")
            super().log_metrics(metrics, step)

    logger = Failing()
    trainer = make_trainer(logger=logger)
    with pytest.warns(UserWarning, match="disk full"):
        trainer.fit(Logging(), numbers(2), numbers(1))
    logger.fails = False
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Logging(), numbers(2), numbers(1))
    assert [step for step, _ in logger.of("x_step")] == [2, 3]


def test_validation_steps_of_a_second_fit_go_on_whatever_was_run_between(Logging: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    rows = Rows()
    trainer, model = make_trainer(logger=rows, num_sanity_val_steps=1), Logging()
    trainer.fit(model, numbers(1), numbers(2))
    trainer.validate(model, numbers(2), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, numbers(1), numbers(2))
    assert [step for step, _ in rows.of("v_step")] == [0, 1, 0, 1, 2, 3]


# ---- what callbacks read --------------------------------------------------------------------------------------------


def test_metric_steps_tell_when_each_value_was_measured(Logging: Any, make_trainer: Any, numbers: Any) -> None:
    found: list[dict[str, int]] = []

    class Model(Logging):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                self.log("rare", 1.0)
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            found.append(trainer.metric_steps)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            found.append(trainer.metric_steps)

    trainer = make_trainer(callbacks=[Look()], val_check_interval=2)
    trainer.fit(Model(), numbers(4), numbers(1))
    assert found[0] == {"x": 1, "x_step": 1}
    assert found[1] == {"x": 2, "x_step": 2, "rare": 2}
    assert found[2] == {"x": 3, "x_step": 3, "rare": 2, "v": 2, "v_epoch": 2}
    assert found[4] == trainer.metric_steps == {"x": 4, "x_step": 4, "x_epoch": 4, "rare": 2, "v": 4, "v_epoch": 4}


def test_bar_sees_step_values_at_once_and_epoch_values_at_the_end(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[dict[str, float]] = []

    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", batch.mean(), prog_bar=True, on_step=True, on_epoch=True)
            self.log("not shown", 1.0)
            return self.weight * 1.0

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(trainer.progress_bar_metrics)

    trainer = make_trainer(max_epochs=2, callbacks=[Look()])
    trainer.fit(Model(), numbers(2, start=3))
    assert seen == [{"x_step": 3.0}, {"x_step": 4.0}, {"x_step": 3.0, "x_epoch": 3.5}, {"x_step": 4.0, "x_epoch": 3.5}]
    assert trainer.progress_bar_metrics == {"x_step": 4.0, "x_epoch": 3.5}


def test_metrics_are_emptied_before_each_task(Logging: Any, make_trainer: Any, numbers: Any) -> None:
    trainer, model = make_trainer(), Logging()
    trainer.fit(model, numbers(2), numbers(1))
    assert {"x", "v"} < set(trainer.callback_metrics)
    trainer.test(model, numbers(2), verbose=False)
    assert set(trainer.callback_metrics) == set(trainer.logged_metrics) == set(trainer.metric_steps) == {"test"}
    assert trainer.progress_bar_metrics == {}


def test_values_that_a_callback_adds_stand_beside_the_logged_ones(Logging: Any, make_trainer: Any, numbers: Any) -> None:
    class Add(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.add_callback_metrics({"added": torch.tensor(3.0)})

    trainer = make_trainer(callbacks=[Add()])
    trainer.fit(Logging(), numbers(2), numbers(1))
    assert trainer.callback_metrics["added"].item() == 3.0
    assert trainer.metric_steps["added"] == 2


# ---- over many steps ------------------------------------------------------------------------------------------------


def test_nothing_piles_up_over_ten_thousand_steps(make_trainer: Any, Rows: Any) -> None:
    class Forgetful(Rows):  # type: ignore[misc]
        count = 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.count += 1

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.objects: list[int] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", self.weight, on_epoch=True, prog_bar=True)
            self.log("y", 1.0, on_epoch=True)
            if batch_idx in (1_000, 9_999):
                self.trainer.flush_loggers()
                gc.collect()
                self.objects.append(len(gc.get_objects()))
            return self.weight * 1.0

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    model, logger = Model(), Forgetful()
    make_trainer(logger=logger, log_every_n_steps=10).fit(model, DataLoader(range(10_000)))  # type: ignore[arg-type]
    assert logger.count == 1_001
    before, after = model.objects
    assert after - before < 50
