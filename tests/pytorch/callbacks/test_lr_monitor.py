"""LearningRateMonitor: names, rows and what is read when."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.lr_monitor import LearningRateMonitor


class Rows:
    """A logger that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((dict(metrics), step))


def parameters(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(count)]


def sgd(lr: float = 0.1, **kwargs: Any) -> optim.Optimizer:
    return optim.SGD(parameters(), lr=lr, **kwargs)


def scheduled(optimizer: optim.Optimizer, name: str | None = None, interval: str = "epoch") -> SimpleNamespace:
    return SimpleNamespace(scheduler=LambdaLR(optimizer, lambda epoch: 1.0), name=name, interval=interval)


def stand_in(optimizers: list[optim.Optimizer], configs: list[SimpleNamespace] | None = None) -> SimpleNamespace:
    """What LearningRateMonitor asks of a trainer."""
    metrics: dict[str, float] = {}
    trainer = SimpleNamespace(
        add_callback_metrics=metrics.update,
        callback_metrics=metrics,
        log_due=True,
        log_step=7,
        loggers=[Rows()],
        lr_scheduler_configs=configs or [],
        optimizers=optimizers,
    )

    def send_to_loggers(row: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    trainer.send_to_loggers = send_to_loggers
    return trainer


def row_at_epoch_start(trainer: SimpleNamespace, **kwargs: Any) -> dict[str, float]:
    monitor = LearningRateMonitor(**kwargs)
    monitor.on_train_start(trainer)
    monitor.on_train_epoch_start(trainer)
    ((row, step),) = trainer.loggers[0].rows
    assert step == 7
    assert trainer.callback_metrics == row
    return row


def test_optimizer_is_named_by_its_class() -> None:
    assert row_at_epoch_start(stand_in([sgd(0.1)])) == {"lr-SGD": 0.1}


def test_optimizers_of_one_class_are_numbered() -> None:
    optimizers = [sgd(0.1), optim.Adam(parameters(), lr=0.2), sgd(0.3), sgd(0.4)]
    assert row_at_epoch_start(stand_in(optimizers)) == {"lr-SGD": 0.1, "lr-Adam": 0.2, "lr-SGD-1": 0.3, "lr-SGD-2": 0.4}


def test_scheduled_optimizers_are_named_before_the_others() -> None:
    first, second, third = sgd(0.1), sgd(0.2), optim.Adam(parameters(), lr=0.3)
    trainer = stand_in([first, second, third], [scheduled(third), scheduled(second)])
    assert row_at_epoch_start(trainer) == {"lr-Adam": 0.3, "lr-SGD": 0.2, "lr-SGD-1": 0.1}


def test_scheduler_gives_the_name() -> None:
    optimizer = sgd(0.1)
    assert row_at_epoch_start(stand_in([optimizer], [scheduled(optimizer, "rate")])) == {"rate": 0.1}


def test_schedulers_of_one_name_are_numbered() -> None:
    first, second = sgd(0.1), sgd(0.2)
    trainer = stand_in([first, second], [scheduled(first, "rate"), scheduled(second, "rate")])
    assert row_at_epoch_start(trainer) == {"rate": 0.1, "rate-1": 0.2}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([{}, {}], ["pg1", "pg2"]),
        ([{"name": "backbone"}, {}], ["backbone", "pg2"]),
        ([{"name": "backbone"}, {"name": "head"}], ["backbone", "head"]),
        ([{"name": "all"}], ["all"]),
    ],
)
def test_parameter_groups_are_told_apart(groups: list[dict[str, Any]], names: list[str]) -> None:
    optimizer = optim.Adam([{"params": parameters(), "lr": 0.1 * n, **group} for n, group in enumerate(groups, 1)])
    assert row_at_epoch_start(stand_in([optimizer])) == {f"lr-Adam/{name}": 0.1 * n for n, name in enumerate(names, 1)}


@pytest.mark.parametrize("names", [("head", "head"), ("pg2", None)])
def test_parameter_groups_of_one_name_are_refused(names: tuple[str | None, ...]) -> None:
    groups = [{"params": parameters(), **({"name": name} if name else {})} for name in names]
    with pytest.raises(MisconfigurationException, match=f"lr-SGD.*'{names[0]}'"):
        LearningRateMonitor().on_train_start(stand_in([optim.SGD(groups, lr=0.1)]))


def test_momentum_and_weight_decay_are_logged_on_request() -> None:
    optimizers = [sgd(0.1, momentum=0.8, weight_decay=0.01), optim.Adam(parameters(), lr=0.2, betas=(0.7, 0.99))]
    assert row_at_epoch_start(stand_in(optimizers), log_momentum=True, log_weight_decay=True) == {
        "lr-SGD": 0.1,
        "lr-SGD-momentum": 0.8,
        "lr-SGD-weight_decay": 0.01,
        "lr-Adam": 0.2,
        "lr-Adam-momentum": 0.7,
        "lr-Adam-weight_decay": 0,
    }


def test_optimizer_without_weight_decay_logs_zero() -> None:
    trainer = stand_in([optim.LBFGS(parameters(), lr=0.5)])
    assert row_at_epoch_start(trainer, log_weight_decay=True) == {"lr-LBFGS": 0.5, "lr-LBFGS-weight_decay": 0}


def test_optimizer_without_momentum_warns_and_logs_zero() -> None:
    trainer = stand_in([sgd(), optim.Adagrad(parameters(), lr=0.1)])
    with pytest.warns(RuntimeWarning, match="neither `momentum` nor `betas`"):
        row = row_at_epoch_start(trainer, log_momentum=True)
    assert row["lr-Adagrad-momentum"] == 0


def test_last_values_can_be_asked_for() -> None:
    monitor, trainer = LearningRateMonitor(log_momentum=True, log_weight_decay=True), stand_in([sgd(0.1, momentum=0.5)])
    monitor.on_train_start(trainer)
    assert (monitor.lrs, monitor.last_momentum_values) == ({"lr-SGD": []}, {"lr-SGD-momentum": None})
    monitor.on_train_epoch_start(trainer)
    monitor.on_train_epoch_start(trainer)
    assert monitor.lrs == {"lr-SGD": [0.1, 0.1]}
    assert monitor.last_momentum_values == {"lr-SGD-momentum": 0.5}
    assert monitor.last_weight_decay_values == {"lr-SGD-weight_decay": 0}
    monitor.on_train_start(trainer)
    assert monitor.lrs == {"lr-SGD": []}


@pytest.mark.parametrize(
    ("logging_interval", "at_epoch", "at_step"),
    [
        (None, {"by_epoch", "lr-SGD"}, {"by_step", "lr-SGD"}),
        ("step", set(), {"by_epoch", "by_step", "lr-SGD"}),
        ("epoch", {"by_epoch", "by_step", "lr-SGD"}, set()),
    ],
)
def test_interval_says_when_to_log(logging_interval: Any, at_epoch: set[str], at_step: set[str]) -> None:
    by_epoch, by_step, alone = sgd(), sgd(), sgd()
    configs = [scheduled(by_epoch, "by_epoch", "epoch"), scheduled(by_step, "by_step", "step")]
    trainer = stand_in([by_epoch, by_step, alone], configs)
    rows = trainer.loggers[0].rows
    monitor = LearningRateMonitor(logging_interval=logging_interval)
    monitor.on_train_start(trainer)
    monitor.on_train_epoch_start(trainer)
    assert [set(row) for row, _ in rows] == ([at_epoch] if at_epoch else [])
    rows.clear()
    trainer.log_due = False
    monitor.on_train_batch_start(trainer, None, 0)
    assert rows == []
    trainer.log_due = True
    monitor.on_train_batch_start(trainer, None, 0)
    assert [set(row) for row, _ in rows] == ([at_step] if at_step else [])


def test_rows_go_to_every_logger() -> None:
    trainer = stand_in([sgd()])
    trainer.loggers.append(Rows())
    monitor = LearningRateMonitor()
    monitor.on_train_start(trainer)
    monitor.on_train_epoch_start(trainer)
    assert [logger.rows for logger in trainer.loggers] == [[({"lr-SGD": 0.1}, 7)]] * 2


def test_rate_that_is_a_tensor_is_read_only_when_a_row_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = torch.tensor(0.25)
    optimizer = optim.Adam(parameters(), lr=rate)
    monitor, trainer = LearningRateMonitor("step"), stand_in([optimizer])
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(tensor) or item(tensor))
    monitor.on_train_start(trainer)
    trainer.log_due = False
    monitor.on_train_batch_start(trainer, None, 0)
    monitor.on_train_epoch_start(trainer)
    assert reads == []
    trainer.log_due = True
    monitor.on_train_batch_start(trainer, None, 1)
    rate.fill_(0.125)
    assert len(reads) == 1
    assert trainer.loggers[0].rows == [({"lr-Adam": 0.25}, 7)]
    assert monitor.lrs == {"lr-Adam": [0.25]}


def test_group_that_is_added_during_training_gets_its_own_name() -> None:
    optimizer = sgd(0.1)
    monitor, trainer = LearningRateMonitor(log_momentum=True), stand_in([optimizer])
    monitor.on_train_start(trainer)
    monitor.on_train_epoch_start(trainer)
    optimizer.add_param_group({"params": parameters(), "lr": 0.5})
    monitor.on_train_epoch_start(trainer)
    assert monitor.lrs == {"lr-SGD/pg1": [0.1, 0.1], "lr-SGD/pg2": [0.5]}
    assert monitor.last_momentum_values["lr-SGD/pg2-momentum"] == 0


def test_trainer_without_logger_is_refused() -> None:
    trainer = stand_in([sgd()])
    trainer.loggers = []
    with pytest.raises(MisconfigurationException, match="no logger"):
        LearningRateMonitor().on_train_start(trainer)


def test_nothing_is_logged_without_optimizers() -> None:
    trainer = stand_in([])
    monitor = LearningRateMonitor(log_momentum=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.on_train_start(trainer)
        monitor.on_train_epoch_start(trainer)
    assert trainer.loggers[0].rows == []


@pytest.mark.parametrize("interval", ["steps", 3, "Epoch"])
def test_unknown_interval_is_refused(interval: Any) -> None:
    with pytest.raises(MisconfigurationException, match="'step', 'epoch' or None"):
        LearningRateMonitor(logging_interval=interval)


def fit(monitor: LearningRateMonitor, interval: str | None = "epoch", **settings: Any) -> tuple[list[tuple[dict[str, float], int]], Any]:
    """Train two epochs of four batches with a rate that is divided by ten after every ``interval``; the rows, and the trainer."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.loggers import Logger

    class Model(BoringModel):
        def configure_optimizers(self) -> Any:
            optimizer = optim.SGD(self.parameters(), lr=0.1)
            if interval is None:
                return optimizer
            return [optimizer], [{"scheduler": optim.lr_scheduler.StepLR(optimizer, 1), "interval": interval}]

    class RowLogger(Logger):
        name = "rows"
        version = 0

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[dict[str, float], int]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append(({key: value for key, value in metrics.items() if key.startswith("lr-")}, step))

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            pass

    logger = RowLogger()
    quiet = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    limits = {"max_epochs": 2, "limit_train_batches": 4, "limit_val_batches": 0, "log_every_n_steps": 2}
    trainer = Trainer(callbacks=monitor, **{"logger": logger, **quiet, **limits, **settings})
    trainer.fit(Model())
    return [row for row in logger.rows if row[0]], trainer


@pytest.mark.parametrize(
    ("logging_interval", "interval", "rows"),
    [
        (None, "epoch", [(1e-1, 0), (1e-2, 4)]),
        ("step", "epoch", [(1e-1, 1), (1e-1, 3), (1e-2, 5), (1e-2, 7)]),
        ("epoch", "epoch", [(1e-1, 0), (1e-2, 4)]),
        (None, "step", [(1e-2, 1), (1e-4, 3), (1e-6, 5), (1e-8, 7)]),
        ("epoch", "step", [(1e-1, 0), (1e-5, 4)]),
        (None, None, [(1e-1, 0), (1e-1, 1), (1e-1, 3), (1e-1, 4), (1e-1, 5), (1e-1, 7)]),
    ],
)
def test_rows_of_a_run(logging_interval: Any, interval: str | None, rows: list[tuple[float, int]]) -> None:
    monitor = LearningRateMonitor(logging_interval)
    logged, trainer = fit(monitor, interval)
    assert logged == [({"lr-SGD": pytest.approx(rate)}, step) for rate, step in rows]
    assert monitor.lrs == {"lr-SGD": pytest.approx([rate for rate, _ in rows])}
    assert trainer.callback_metrics["lr-SGD"].item() == pytest.approx(rows[-1][0])


def test_run_without_logger_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="no logger"):
        fit(LearningRateMonitor(), logger=False)
