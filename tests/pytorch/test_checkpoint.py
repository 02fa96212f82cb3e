"""A checkpoint holds all that a run needs to go on: a run that is saved anywhere and resumed ends as if it had never been interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import Precision


class Line(LightningModule):
    """A regression with momentum and two schedulers, whose state matters; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(2, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(("train", self.current_epoch, batch_idx, int(y[0])))
        return nn.functional.mse_loss(self.layer(x), y[:, None])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("val", self.current_epoch, self.global_step, batch_idx))

    def on_train_epoch_start(self) -> None:
        self.seen.append(("start", self.current_epoch))

    def on_train_epoch_end(self) -> None:
        self.seen.append(("end", self.current_epoch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class SaveAt(Callback):
    """Saves ``saved.ckpt`` at the n-th call of a hook."""

    def __init__(self, hook: str, n: int) -> None:
        self.n, self.calls, self.seen_before = n, 0, 0
        setattr(self, hook, self._save)

    def _save(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.n:
            self.seen_before = len(pl_module.seen)
            trainer.save_checkpoint("saved.ckpt")


def data(count: int = 6) -> Any:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(count, 2, generator=generator), torch.arange(float(count))), batch_size=1)


def state_of(trainer: Any, model: Any) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "progress": (trainer.current_epoch, trainer.global_step),
    }


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Equality down to the last bit, of tensors in any structure."""
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "n"),
    [
        ("on_train_epoch_end", 1),
        ("on_train_epoch_end", 2),
        ("on_train_epoch_start", 2),
        ("on_train_batch_start", 3),
        ("on_train_batch_end", 1),
        ("on_train_batch_end", 4),
        ("on_train_batch_end", 6),
        ("on_train_batch_end", 9),
        ("on_train_batch_end", 12),
        ("on_validation_start", 1),
        ("on_validation_start", 2),
        ("on_validation_end", 1),
        ("on_validation_end", 2),
        ("on_train_end", 1),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2, "val_check_interval": 3}, {"accumulate_grad_batches": 4}],
    ids=["plain", "validation in mid-epoch", "accumulation", "smaller last window"],
)
@pytest.mark.parametrize("loader", ["sized", "stream"])
@pytest.mark.filterwarnings("ignore:The loader, a Stream, can't tell where it is, so")
def test_resumed_run_is_the_uninterrupted_one(make_trainer: Any, hook: str, n: int, arguments: Any, loader: str) -> None:
    def make() -> Any:
        sized = data()
        return sized if loader == "sized" else (type("Stream", (), {"__iter__": lambda self: iter(sized)})())

    saving, model = SaveAt(hook, n), Line()
    trainer = make_trainer(max_epochs=3, callbacks=[saving], **arguments)
    trainer.fit(model, make(), data(2))
    resumed, again = make_trainer(max_epochs=3, **arguments), Line()
    nn.init.zeros_(again.layer.weight)
    resumed.fit(again, make(), data(2), ckpt_path="saved.ckpt")
    assert_equal(state_of(trainer, model), state_of(resumed, again))
    # What a hook that saves in the middle of something had seen already is run again from its start.
    assert again.seen == model.seen[len(model.seen) - len(again.seen) :]
    expected = model.seen[saving.seen_before :]
    assert [step for step in again.seen if step[0] == "train"] == [step for step in expected if step[0] == "train"]
    # An epoch whose end is under way counts as ended: the hooks after the one that saved do not run again.
    assert len(again.seen) - len(expected) in ((-1,) if hook == "on_train_epoch_end" else (0, 1))


def test_half_a_window_is_kept_when_a_batch_in_it_fails(make_trainer: Any) -> None:
    class Failing(Line):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and self.current_epoch == 1 and batch_idx == 2:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    plain, model, again = Failing(), Failing(), Failing()
    plain.fails = again.fails = False
    arguments: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 3, "limit_val_batches": 0}
    uninterrupted, trainer, resumed = (make_trainer(**arguments) for _ in range(3))
    uninterrupted.fit(plain, data(), data(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(model, data(), data(1))
    trainer.save_checkpoint("interrupted.ckpt")
    resumed.fit(again, data(), data(1), ckpt_path="interrupted.ckpt")
    assert_equal(state_of(uninterrupted, plain), state_of(resumed, again))


def test_resuming_under_a_schedule_of_windows(make_trainer: Any) -> None:
    arguments: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0}
    model, again, schedule = Line(), Line(), {0: 1, 1: 3}
    trainer = make_trainer(callbacks=[GradientAccumulationScheduler(schedule), SaveAt("on_train_batch_end", 8)], **arguments)
    trainer.fit(model, data(), data(1))
    resumed = make_trainer(callbacks=[GradientAccumulationScheduler(schedule)], **arguments)
    resumed.fit(again, data(), data(1), ckpt_path="saved.ckpt")
    assert_equal(state_of(trainer, model), state_of(resumed, again))


def test_resumed_run_may_validate_no_more(make_trainer: Any) -> None:
    model, again = Line(), Line()
    make_trainer(callbacks=[SaveAt("on_train_batch_end", 2)], val_check_interval=2).fit(model, data(), data(1))
    resumed = make_trainer(limit_val_batches=0)
    resumed.fit(again, data(), data(1), ckpt_path="saved.ckpt")
    assert [step[2] for step in again.seen if step[0] == "train"] == [2, 3, 4, 5]
    assert resumed.global_step == 6


def test_validation_that_comes_first_in_a_resumed_run_may_end_it(make_trainer: Any) -> None:
    class Stopping(Line):
        def on_validation_end(self) -> None:
            self.trainer.should_stop = True

    make_trainer(callbacks=[SaveAt("on_train_batch_end", 2)], val_check_interval=2).fit(Line(), data(), data(1))
    again, resumed = Stopping(), make_trainer(val_check_interval=2)
    resumed.fit(again, data(), data(1), ckpt_path="saved.ckpt")
    assert again.seen == [("val", 0, 2, 0), ("end", 0)]


def test_resumed_run_may_go_on_for_longer_and_not_for_less(make_trainer: Any) -> None:
    trainer = make_trainer(max_epochs=2)
    trainer.fit(Line(), data(), data(1))
    trainer.save_checkpoint("end.ckpt")
    again = Line()
    make_trainer(max_epochs=4).fit(again, data(), data(1), ckpt_path="end.ckpt")
    assert [step[1] for step in again.seen if step[0] == "end"] == [2, 3]
    same, trainer = Line(), make_trainer(max_epochs=2)
    trainer.fit(same, data(), data(1), ckpt_path="end.ckpt")
    assert same.seen == []
    shorter, trainer = Line(), make_trainer(max_epochs=1)
    with pytest.raises(Exception, match="max_epochs=1 ends before it"):
        trainer.fit(shorter, data(), data(1), ckpt_path="end.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (0, 0)  # the trainer is where it was
    trainer.fit(shorter, data(), data(1))
    assert trainer.global_step == 6


@pytest.mark.filterwarnings("ignore:The checkpoint folder")
def test_run_bounded_by_steps_goes_on_in_its_epoch(make_trainer: Any) -> None:
    whole, model, again = Line(), Line(), Line()
    make_trainer(max_epochs=2, limit_val_batches=0).fit(whole, data(), data(1))
    arguments: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": True}
    make_trainer(max_epochs=-1, max_steps=8, callbacks=[ModelCheckpoint("files", save_last=True)], **arguments).fit(model, data(), data(1))
    resumed = make_trainer(max_epochs=2, callbacks=[ModelCheckpoint("files", save_last=True)], **arguments)
    resumed.fit(again, data(), data(1), ckpt_path="files/last.ckpt")
    assert [step[1:3] for step in again.seen if step[0] == "train"] == [(1, 2), (1, 3), (1, 4), (1, 5)]
    assert_equal(dict(whole.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize(
    ("accumulate", "hook", "n", "unsent"),
    [(1, "on_train_epoch_end", 1, 0), (2, "on_train_batch_end", 8, 1), (2, "on_train_batch_end", 9, 0)],  # rows go out after the hook
)
def test_rows_go_on_under_their_steps(make_trainer: Any, Rows: Any, accumulate: int, hook: str, n: int, unsent: int) -> None:
    class Logging(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 1.0, on_step=True)

    first, second = Rows(), Rows()
    arguments: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    make_trainer(logger=first, callbacks=[SaveAt(hook, n)], **arguments).fit(Logging(), data(), data(2))
    make_trainer(logger=second, **arguments).fit(Logging(), data(), data(2), ckpt_path="saved.ckpt")
    saved = torch.load("saved.ckpt", weights_only=True)["global_step"]
    assert second.of("loss") == [(step, value) for step, value in first.of("loss") if step >= saved - unsent]
    assert second.of("val_step") == [(2, 1.0), (3, 1.0)]


# ---- everything that is saved is restored ---------------------------------------------------------------------------


class Stateful(Callback):
    def __init__(self, name: str = "") -> None:
        self.name, self.state = name, 0

    @property
    def state_key(self) -> str:
        return f"Stateful{self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["state"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[f"callback {self.name}"] = self.state + 1

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint[f"callback {self.name}"]


class Data(LightningDataModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.state = 0

    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data(1)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["state"]


class Hooked(Line):
    def __init__(self, size: int = 7, path: Path = Path("somewhere")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.own = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = {"value": self.own, "tensor": torch.ones(2)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.own = checkpoint["own"]["value"]


class Scaling(Precision):
    """A precision with a state."""

    def __init__(self) -> None:
        self.scale = 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale = state_dict["scale"]


def test_everything_that_has_a_state_gets_it_back(make_trainer: Any) -> None:
    callbacks, module, datamodule, precision = [Stateful("a"), Stateful("b")], Hooked(), Data(), Scaling()
    trainer = make_trainer(callbacks=callbacks, plugins=[precision])
    trainer.fit(module, datamodule=datamodule)
    callbacks[0].state, callbacks[1].state, module.own, datamodule.state, precision.scale = 1, 2, 3, 4, 5.0
    trainer.save_checkpoint("all.ckpt")
    callbacks, module, datamodule, precision = [Stateful("b"), Stateful("a")], Hooked(), Data(), Scaling()
    make_trainer(callbacks=callbacks, plugins=[precision], max_epochs=2).fit(module, datamodule=datamodule, ckpt_path="all.ckpt")
    assert [callback.state for callback in callbacks] == [2, 1]
    assert [callback.found for callback in callbacks] == [3, 2]
    assert (module.own, datamodule.state, precision.scale) == (3, 4, 5.0)


def test_checkpoint_has_the_documented_keys_and_loads_with_torch_alone(make_trainer: Any) -> None:
    trainer = make_trainer(callbacks=[Stateful()])
    trainer.fit(Hooked(), datamodule=Data())
    trainer.save_checkpoint("a.ckpt")
    checkpoint = torch.load("a.ckpt", weights_only=True)
    assert {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers",
        "hparams_name", "hyper_parameters", "datamodule_hparams_name", "datamodule_hyper_parameters", "Data", "own",
    } <= set(checkpoint)  # fmt: skip
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 6)
    assert checkpoint["callbacks"] == {"Stateful": {"state": 0}}
    assert len(checkpoint["optimizer_states"]) == 1
    assert len(checkpoint["lr_schedulers"]) == 2


def test_weights_alone_are_saved_where_asked_for(make_trainer: Any) -> None:
    trainer, module = make_trainer(callbacks=[Stateful()]), Hooked()
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    checkpoint = torch.load("weights.ckpt", weights_only=True)
    assert not {"callbacks", "optimizer_states", "lr_schedulers", "callback "} & set(checkpoint)
    assert checkpoint["own"]["value"] == 0
    assert_equal(dict(Hooked.load_from_checkpoint("weights.ckpt").state_dict()), dict(module.state_dict()))
    with pytest.raises(KeyError, match="weights only"):
        make_trainer(max_epochs=2).fit(Hooked(), datamodule=Data(), ckpt_path="weights.ckpt")


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_evaluation_takes_the_weights_and_the_states_but_no_progress(make_trainer: Any, task: str) -> None:
    class Evaluated(Hooked):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch

    trainer, module, callback = make_trainer(callbacks=[Stateful()]), Evaluated(), Stateful()
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint("a.ckpt")
    other, again = make_trainer(callbacks=[callback]), Evaluated()
    nn.init.zeros_(again.layer.weight)
    getattr(other, task)(again, data(1), ckpt_path="a.ckpt")
    assert_equal(dict(again.state_dict()), dict(module.state_dict()))
    assert callback.found == 1
    assert (other.current_epoch, other.global_step) == (0, 0)
    assert str(other.ckpt_path) == "a.ckpt"
