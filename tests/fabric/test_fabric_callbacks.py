"""Callbacks and loggers of a hand-written loop."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger


class Callback:
    attribute = 3

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_epoch_end(self, epoch: int, loss: float = 0.0) -> None:
        self.heard.append((epoch, loss))

    def on_anything(self, *args: Any, **kwargs: Any) -> None:
        self.heard.append((args, kwargs))


class Other:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_epoch_end(self, epoch: int) -> None:
        self.heard.append(epoch)


def test_callbacks_that_have_the_method_are_called_with_what_they_take() -> None:
    first, second = Callback(), Other()
    fabric = Fabric(accelerator="cpu", callbacks=[first, second])
    fabric.call("on_epoch_end", 1)
    fabric.call("on_epoch_end", epoch=2, loss=0.5, model=None)
    fabric.call("on_anything", 3, loss=0.5)
    fabric.call("on_nothing", 4)
    assert first.heard == [(1, 0.0), (2, 0.5), ((3,), {"loss": 0.5})]
    assert second.heard == [1, 2]
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments"):
        fabric.call("on_epoch_end", 1, 2, 3)


def test_attributes_that_are_no_methods_are_passed_over_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="`Callback.attribute` is no function"):
        Fabric(accelerator="cpu", callbacks=Callback()).call("attribute")


class Hearing:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_after_setup(self, fabric: Fabric, module: Any) -> None:
        self.heard.append((fabric, module))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.heard.append((strategy, optimizer, optimizer.param_groups[0]["params"][0].item()))


def test_callbacks_hear_of_setting_up_and_of_steps() -> None:
    callback = Hearing()
    fabric = Fabric(accelerator="cpu", callbacks=callback)
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    model, optimizer = fabric.setup(module, inner)
    fabric.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()
    alone = fabric.setup_module(nn.Linear(1, 1))
    assert callback.heard == [(fabric, model), (fabric.strategy, inner, 0.0), (fabric, alone)]


class Logger:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))


def test_numbers_reach_all_loggers() -> None:
    loggers = [Logger(), Logger()]
    fabric = Fabric(accelerator="cpu", loggers=loggers)
    fabric.log("loss", torch.tensor(0.5, requires_grad=True), step=4)
    fabric.log_dict({"a": 1, "b": {"c": torch.tensor(2)}})
    assert [logger.rows for logger in loggers] == [[({"loss": 0.5}, 4), ({"a": 1, "b": {"c": 2}}, None)]] * 2
    assert fabric.logger is loggers[0]
    with pytest.raises(ValueError, match="has 2 elements"):
        fabric.log("loss", torch.ones(2))


def test_csv_logger_writes_what_is_logged() -> None:
    fabric = Fabric(accelerator="cpu", loggers=CSVLogger("logs", name="run", flush_logs_every_n_steps=1))
    for step in range(3):
        fabric.log("loss", 1.0 / (step + 1), step=step)
    fabric.logger.finalize("success")
    with Path("logs/run/version_0/metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
