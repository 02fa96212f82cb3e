"""The Trainer over a grid of processes: fit, validate, clip, accumulate, save, and resume under another grid."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from training import largest_difference

import lightning.pytorch as L
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.sharding import full_tensor, is_dtensor

TOLERANCE = 1e-6
EPOCHS, BATCH = 2, 4


class Block(nn.Module):
    """Two layers, added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class Model(L.LightningModule):
    """Divided over whatever grid there is; without one it stays as it is."""

    def __init__(self, batch: int, manual: bool = False, whole: bool = False) -> None:
        super().__init__()
        self.batch, self.whole = batch, whole
        self.automatic_optimization = not manual
        self.net: Any = None
        self.last: Any = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.device("meta" if self.device_mesh is not None else "cpu"):
            self.net = nn.ModuleDict({"first": nn.Linear(5, 8), "norm": nn.LayerNorm(8), "block": Block()})
            self.last = nn.Linear(8, 1)
        if self.device_mesh is not None:
            self.divide(self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"])

    def divide(self, data: Any, tensor: Any) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if tensor.size() > 1:
            parallelize_module(self.net["block"], tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if data.size() > 1:
            fully_shard(self.net["block"], mesh=data)
            fully_shard(self if self.whole else self.net["first"], mesh=data)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net["block"](self.net["norm"](self.net["first"](x))))  # type: ignore[no-any-return]

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor | None:
        loss = (self(x) - x.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        return None

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(x).square().mean(), sync_dist=True)
        self.log("val_samples", float(len(x)), sync_dist=True, reduce_fx="sum")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self) -> Any:
        shared_out = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return DataLoader(data(24), self.batch, sampler=DistributedSampler(data(24), shuffle=False, **shared_out))

    def val_dataloader(self) -> Any:
        return DataLoader(data(7), self.batch)


def data(count: int) -> Any:
    return list(torch.randn(count, 5, generator=torch.Generator().manual_seed(5)))


class Saving(L.Callback):
    """Saves each epoch under the same name, if any."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.path is not None:
            trainer.save_checkpoint(self.path)


def fit(strategy: Any, devices: int, model: Model, epochs: int = EPOCHS, save_as: Any = None, resume: Any = None) -> Any:
    torch.manual_seed(11)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        gradient_clip_val=0.5 if model.automatic_optimization else None,
        accumulate_grad_batches=2 if model.automatic_optimization else 1,
        callbacks=[Saving(save_as)],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=resume)
    metrics = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
    [again] = trainer.validate(model, verbose=False)  # the model is divided already
    assert again["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)
    weights = {name: full_tensor(parameter.detach()).tolist() for name, parameter in model.named_parameters()}
    return weights, metrics


def on_grid(rank: int, size: int, grid: tuple[int, int], options: dict[str, Any], run: dict[str, Any], save: bool = True) -> Any:
    model = Model(BATCH // grid[0], **options)
    weights, metrics = fit(ModelParallelStrategy(*grid, save_distributed_checkpoint=save), size, model, **run)
    assert is_dtensor(model.net["block"].up.weight)
    return weights, metrics


def alone(options: dict[str, Any] | None = None, **run: Any) -> Any:
    return fit("auto", 1, Model(BATCH, **options or {}), **run)


def assert_same(results: list[Any], expected: Any) -> None:
    for weights, metrics in results:
        assert largest_difference(weights, expected[0]) < TOLERANCE
        assert metrics == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((1, 2), {}),
        ((1, 2), {"manual": True}),
        ((2, 1), {}),
        ((2, 1), {"manual": True}),
        ((2, 1), {"whole": True}),
        ((2, 1), {"whole": True, "manual": True}),
    ],
)
def test_fit_gives_the_weights_and_metrics_of_one_process(grid: tuple[int, int], options: dict[str, Any]) -> None:
    expected = alone({"manual": options.get("manual", False)})
    assert expected[1]["val_samples"] == 7
    assert_same(run(on_grid, 2, grid, options, {}), expected)


@pytest.mark.parametrize("save", [True, False])
def test_run_goes_on_under_another_grid_and_in_one_process(save: bool, tmp_path: Path) -> None:
    expected = alone()
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    run(on_grid, 2, (1, 2), {}, {"epochs": 1, "save_as": first}, save)
    assert first.is_dir() == save
    assert_same(run(on_grid, 2, (2, 1), {}, {"save_as": second, "resume": first}, save), expected)
    assert_same([alone(resume=first)], expected)
    assert_same(run(on_grid, 2, (1, 2), {}, {"epochs": EPOCHS + 1, "resume": second}), alone(epochs=EPOCHS + 1))


def test_checkpoint_of_one_process_goes_on_over_a_grid_of_two_by_two(tmp_path: Path) -> None:
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    alone(epochs=1, save_as=first)
    assert_same(run(on_grid, 4, (2, 2), {}, {"resume": first, "save_as": second}), alone())
    assert_same([alone(epochs=EPOCHS + 1, resume=second)], alone(epochs=EPOCHS + 1))


def test_wrong_sizes_are_refused_before_any_process_starts() -> None:
    with pytest.raises(RuntimeError, match=r"2 x 2 processes.*product is 2"):
        L.Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 2))
