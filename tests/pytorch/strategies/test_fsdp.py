"""The Trainer over FSDPStrategy, in processes that something else has started and joined."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from sharded import fsdp, weights
from training import batches, largest_difference, part

from lightning.fabric.checkpoint.io import load
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

TOLERANCE = 1e-6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(self.norm(x)))


class Model(LightningModule):
    """Units, weights outside of them, weights of the module itself, and a number."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(3))
        self.automatic_optimization = not manual
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden) * self.scale + self.shift.sum()  # type: ignore[no-any-return]

    def loss(self, batch: Tensor) -> Tensor:
        return (self(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            for again in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch) if again else loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():  # a part of the module, outside of a step
            self.seen.append(self.embed(torch.ones(1, 5)).sum().item())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


def loader(rank: int, size: int) -> Any:
    return DataLoader([part(batch, rank, size) for batch in batches()], batch_size=None)  # type: ignore[arg-type]


def trainer(size: int, max_epochs: int, strategy: dict[str, Any], **kwargs: Any) -> Trainer:
    options: dict[str, Any] = (
        {"strategy": fsdp(size, **{"auto_wrap_policy": {Block}, **strategy}), "devices": size} if size > 1 else {"devices": 1}
    )
    return Trainer(
        accelerator="cpu", max_epochs=max_epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **{"enable_checkpointing": False, **options, **kwargs},
    )  # fmt: skip


def whole_run(rank: int, size: int, folder: str, manual: bool, strategy: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Fit, save, test and predict; resume in new objects; and fit the old ones further."""
    data = loader(rank, size)
    module = Model(manual)
    first = trainer(size, 2, strategy, **options)
    first.fit(module, data, data)
    facts: dict[str, Any] = {"metrics": {name: value.item() for name, value in first.callback_metrics.items()}, "seen": list(module.seen)}
    path = os.path.join(folder, f"{size}.ckpt")
    first.save_checkpoint(path)
    facts["weights"] = weights(first.strategy)
    facts["test"] = first.test(module, data, verbose=False)[0]["test_loss"]
    predictions: Any = first.predict(module, data)
    facts["predicted"] = [tensor.flatten().tolist() for tensor in predictions]
    second = trainer(size, 3, strategy, **options)
    second.fit(Model(manual), data, data, ckpt_path=path)
    facts["resumed"] = weights(second.strategy)
    first.fit_loop.max_epochs = 3
    first.fit(module, data, data)
    facts["steps"] = first.global_step
    return facts


@pytest.mark.parametrize(
    ("manual", "strategy", "options"),
    [
        (False, {}, {"gradient_clip_val": 0.5}),
        (False, {"state_dict_type": "sharded", "sharding_strategy": "SHARD_GRAD_OP"}, {"accumulate_grad_batches": 2}),
        (False, {"cpu_offload": True, "activation_checkpointing_policy": {Block}}, {}),
        (True, {"state_dict_type": "sharded"}, {}),
    ],
)
def test_run_is_that_of_one_process(manual: bool, strategy: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    found = run(whole_run, 2, str(tmp_path), manual, strategy, options)
    expected = whole_run(0, 1, str(tmp_path), manual, {}, options)
    for rank, facts in enumerate(found):
        assert largest_difference(facts["weights"], expected["weights"]) < TOLERANCE
        assert largest_difference(facts["resumed"], expected["resumed"]) < TOLERANCE
        assert facts["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        assert facts["test"] == pytest.approx(expected["test"], rel=1e-5)
        assert facts["seen"] == pytest.approx(expected["seen"], rel=1e-5)
        assert facts["predicted"] == [pytest.approx(row[rank::2], rel=1e-4) for row in expected["predicted"]]
        assert facts["steps"] == expected["steps"]
    assert os.path.isdir(tmp_path / "2.ckpt") is ("state_dict_type" in strategy)
    # And the other way round: what two processes saved, one resumes from.
    one = trainer(1, 3, {}, **options)
    one.fit(Model(manual), loader(0, 1), loader(0, 1), ckpt_path=str(tmp_path / "2.ckpt"))
    assert largest_difference(weights(one.strategy), expected["resumed"]) < TOLERANCE


class Adversaries(LightningModule):
    """Two optimizers that take turns, with the other's weights frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.maker = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.judge = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        makes, judges = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(makes)
        self.manual_backward(-self.judge(self.maker(batch)).mean())
        assert all(parameter.grad is None for parameter in self.judge.parameters())
        makes.step()
        makes.zero_grad()
        self.untoggle_optimizer(makes)
        self.toggle_optimizer(judges)
        with torch.no_grad():
            made = self.maker(batch)
        self.manual_backward(self.judge(made).mean() - self.judge(batch).mean())
        judges.step()
        judges.zero_grad()
        self.untoggle_optimizer(judges)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.maker.parameters(), 0.1), torch.optim.SGD(self.judge.parameters(), 0.1)


def adversaries(rank: int, size: int, units: bool) -> dict[str, Any]:
    module = Adversaries()
    run = trainer(size, 1, {"auto_wrap_policy": {nn.Linear} if units else {nn.Tanh, nn.Sequential}})
    run.fit(module, loader(rank, size))
    return weights(run.strategy)


@pytest.mark.parametrize("units", [True, False])
def test_optimizers_take_turns(units: bool) -> None:
    expected = adversaries(0, 1, units)
    for found in run(adversaries, 2, units):
        assert largest_difference(found, expected) < TOLERANCE


class Swap(Callback):
    """Validates with other weights, as an average of weights would."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.5)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter, kept in zip(pl_module.parameters(), self.kept):
            parameter.data.copy_(kept)


def swapping(rank: int, size: int, kind: str) -> list[Any]:
    run = trainer(size, 2, {"sharding_strategy": kind}, callbacks=[Swap()])
    run.fit(Model(), loader(rank, size), loader(rank, size))
    return [weights(run.strategy), run.callback_metrics["val_loss"].item()]


@pytest.mark.parametrize("kind", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_callbacks_may_change_weights_between_steps(kind: str) -> None:
    expected = swapping(0, 1, kind)
    for found, loss in run(swapping, 2, kind):
        assert largest_difference(found, expected[0]) < TOLERANCE
        assert loss == pytest.approx(expected[1], rel=1e-5)


def build_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 1))


class OnMeta(Model):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net: Any = None
        self.seen = []

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(3)
            with torch.device("meta"):
                self.net = build_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def on_train_batch_end(self, *args: Any) -> None:
        pass


def from_meta(rank: int, size: int, folder: str) -> list[Any]:
    callback = ModelCheckpoint(folder, filename="{step}", save_top_k=2, monitor="val_loss", save_last=True)
    run = trainer(size, 2, {"state_dict_type": "sharded"}, callbacks=[callback], enable_checkpointing=True)
    run.fit(OnMeta(), loader(rank, size), loader(rank, size))
    torch.distributed.barrier()
    found = sorted(os.listdir(folder))
    best = run.validate(ckpt_path="best", dataloaders=loader(rank, size), verbose=False)[0]["val_loss"]
    warnings.simplefilter("ignore")  # of the callback that is not there any more
    resumed = trainer(size, 3, {})
    resumed.fit(OnMeta(), loader(rank, size), loader(rank, size), ckpt_path=os.path.join(folder, "last.ckpt"))
    return [found, best, callback.best_model_score.item(), weights(resumed.strategy)]  # type: ignore[union-attr]


def test_model_on_the_meta_device_is_trained_saved_in_parts_and_resumed(tmp_path: Path) -> None:
    results = run(from_meta, 2, str(tmp_path))
    for found, best, score, states in results:
        assert found == ["last.ckpt", "step=4.ckpt", "step=8.ckpt"]
        assert best == pytest.approx(score)
        assert states == results[0][3]
    assert all(os.path.isdir(tmp_path / name) for name in results[0][0])
    assert [name.removeprefix("net.") for name in load(tmp_path / "last.ckpt")["state_dict"]] == list(build_net().state_dict())


class Failing(Model):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise ZeroDivisionError
        return loss


def failing(rank: int, size: int, folder: str) -> list[Any]:
    module = Failing()
    run = trainer(size, 1, {}, callbacks=[OnExceptionCheckpoint(folder)], enable_checkpointing=True)
    # A checkpoint would need all processes, and is refused: nothing waits for those that may be gone.
    with pytest.raises(ZeroDivisionError):
        run.fit(module, loader(rank, size), loader(rank, size))
    assert os.listdir(folder) == []
    return [run.test(module, loader(rank, size), verbose=False)[0]["test_loss"]]


def test_module_goes_on_after_an_error_in_a_step(tmp_path: Path) -> None:
    first, second = run(failing, 2, str(tmp_path))
    assert first == second
