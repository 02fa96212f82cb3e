"""A LightningModule that a hand-written loop over Fabric runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel


class Logger:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch).square().mean()
        self.log("loss", loss)
        self.log_dict({"index": batch_idx})
        return loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def set_up(count: int = 1) -> tuple[Fabric, Net, Any, list[Any]]:
    fabric = Fabric(accelerator="cpu", loggers=Logger())
    module = Net()
    model, *optimizers = fabric.setup(module, *(module.configure_optimizers() for _ in range(count)))
    return fabric, module, model, optimizers


def test_steps_log_and_train() -> None:
    fabric, module, model, [optimizer] = set_up()
    before = module.layer.weight.detach().clone()
    loss = model.training_step(torch.ones(4, 2), 0)
    module.manual_backward(loss)
    module.clip_gradients(optimizer, 0.01)
    assert torch.nn.utils.get_total_norm(p.grad for p in module.parameters()).item() == pytest.approx(0.01, rel=1e-3)
    module.clip_gradients(optimizer, 0.001, "value")
    assert module.layer.weight.grad is not None
    assert module.layer.weight.grad.abs().max() <= 0.001
    module.optimizers().step()
    assert not torch.equal(before, module.layer.weight)
    assert fabric.logger.rows == [{"loss": loss.item()}, {"index": 0}]


def test_module_finds_in_fabric_what_both_have(capsys: pytest.CaptureFixture[str]) -> None:
    fabric, module, model, [optimizer] = set_up()
    assert module.fabric is model.fabric is fabric
    assert module.optimizers() is optimizer
    assert (module.global_rank, module.local_rank, module.current_epoch) == (0, 0, 0)
    assert module.logger is fabric.logger
    assert module.loggers is fabric.loggers
    assert module.trainer.strategy is fabric.strategy
    assert module.trainer.world_size == 1
    assert torch.equal(module.all_gather(torch.ones(1)), torch.ones(1))
    module.print("here")
    assert capsys.readouterr().out == "here\n"
    with pytest.raises(AttributeError, match=r"`self.trainer.max_epochs` was asked for in a module that Fabric runs"):
        _ = module.trainer.max_epochs


def test_optimizers_are_a_list_where_there_is_not_one() -> None:
    _, module, _, optimizers = set_up(2)
    assert module.optimizers() == optimizers
    assert Fabric(accelerator="cpu").setup(Net()).optimizers() == []


def test_module_inside_of_another_one_knows_fabric_too() -> None:
    outer = nn.Sequential(Net())
    fabric = Fabric(accelerator="cpu")
    fabric.setup(outer)
    assert outer[0].fabric is fabric
    assert outer[0].logger is None


def test_the_last_to_take_the_module_runs_it() -> None:
    module = BoringModel()
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    fabric = Fabric(accelerator="cpu")
    fabric.setup(module)
    trainer.fit(module)
    assert module.trainer is trainer
    assert module.fabric is None
    fabric.setup(module)
    assert module.fabric is fabric
    assert module.trainer.strategy is fabric.strategy
