"""Who adds what to a checkpoint, in which order, and who finds it again; checkpoints in which something is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning.pytorch import Callback, LightningDataModule, LightningModule

DOCUMENTED = {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"}


class Line(LightningModule):
    """Two weights that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    test_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def noting(base: type, name: str, notes: list[str], count: int) -> Any:
    """An object that adds its name to checkpoints, and notes whose names it finds there."""

    def save(self: Any, *args: Any) -> None:
        checkpoint = args[-1]
        notes.append(f"{name} saves after {checkpoint.get('names', [])}")
        checkpoint["names"] = [*checkpoint.get("names", []), name]

    def load(self: Any, *args: Any) -> None:
        notes.append(f"{name} loads")
        assert len(args[-1]["names"]) == count

    return type(name, (base,), {"on_save_checkpoint": save, "on_load_checkpoint": load})()


def test_callbacks_then_data_then_module_add_to_a_checkpoint(make_trainer: Any, numbers: Any) -> None:
    notes: list[str] = []

    def parts() -> tuple[Any, Any, Any]:
        data, module = noting(LightningDataModule, "data", notes, 3), noting(Line, "module", notes, 3)
        data.train_dataloader = lambda: numbers(1)
        return noting(Callback, "callback", notes, 3), data, module

    callback, data, module = parts()
    trainer = make_trainer(callbacks=callback)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint("a.ckpt")
    assert notes == ["callback saves after []", "data saves after ['callback']", "module saves after ['callback', 'data']"]
    notes.clear()
    callback, data, module = parts()
    make_trainer(callbacks=callback, max_epochs=2).fit(module, datamodule=data, ckpt_path="a.ckpt")
    assert notes == ["module loads", "data loads", "callback loads"]


def test_weights_alone_ask_module_and_data_but_no_callback(make_trainer: Any, numbers: Any) -> None:
    notes: list[str] = []
    data, module = noting(LightningDataModule, "data", notes, 2), noting(Line, "module", notes, 2)
    data.train_dataloader = lambda: numbers(1)
    trainer = make_trainer(callbacks=noting(Callback, "callback", notes, 2))
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint("a.ckpt", weights_only=True)
    assert notes == ["data saves after []", "module saves after ['data']"]


def test_what_the_module_changes_is_what_is_saved(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {key: torch.zeros_like(value) for key, value in checkpoint["state_dict"].items()}

    trainer = make_trainer()
    trainer.fit(Model(), numbers(1))
    trainer.save_checkpoint("a.ckpt")
    assert set(torch.load("a.ckpt", weights_only=True)["state_dict"]["layer.weight"].flatten().tolist()) == {0.0}


def test_states_that_are_loaded_belong_to_each_callback_alone(make_trainer: Any, numbers: Any) -> None:
    class Spoiling(Callback):
        def __init__(self) -> None:
            self.values = [1]

        def state_dict(self) -> dict[str, Any]:
            return {"values": self.values}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            state_dict["values"].append(2)
            self.values = state_dict["values"]

    seen: list[Any] = []

    class Model(Line):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.extend(checkpoint["callbacks"].values())

    trainer = make_trainer(callbacks=Spoiling())
    trainer.fit(Line(), numbers(1))
    trainer.save_checkpoint("a.ckpt")
    callback = Spoiling()
    make_trainer(callbacks=callback, max_epochs=2).fit(Model(), numbers(1), ckpt_path="a.ckpt")
    assert callback.values == [1, 2]
    assert seen == [{"values": [1]}]


# ---- data of any kind ---------------------------------------------------------------------------------------------------


LOADERS = {
    "batches": lambda data: DataLoader(data, batch_size=2),
    "no batches": lambda data: DataLoader(data, batch_size=None),
    "a batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False)),
    "two loaders": lambda data: {"a": DataLoader(data), "b": DataLoader(data, batch_size=2)},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_run_goes_on_within_an_epoch_of_any_data(make_trainer: Any, Numbers: Any, kind: str) -> None:
    class Model(Line):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(str(batch))
            return self.layer(torch.ones(1)).sum()

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if args[-1] == 1:
                trainer.save_checkpoint("a.ckpt")

    whole, resumed = Model(), Model()
    make_trainer(callbacks=Save()).fit(whole, LOADERS[kind](Numbers(6)))
    make_trainer().fit(resumed, LOADERS[kind](Numbers(6)), ckpt_path="a.ckpt")
    assert len(whole.seen) >= 3
    assert resumed.seen == whole.seen[2:]


# ---- what is missing ------------------------------------------------------------------------------------------------


@pytest.fixture
def without(make_trainer: Any, numbers: Any) -> Any:
    """``without(*keys)``: the path of a checkpoint of one epoch of three batches from which keys were taken."""

    def save(*keys: str) -> Path:
        trainer = make_trainer()
        trainer.fit(Line(), numbers(3))
        trainer.save_checkpoint("whole.ckpt")
        checkpoint = torch.load("whole.ckpt", weights_only=True)
        assert checkpoint.keys() >= DOCUMENTED
        torch.save({key: value for key, value in checkpoint.items() if key not in keys}, "less.ckpt")
        return Path("less.ckpt")

    return save


def test_a_checkpoint_without_callbacks_is_resumed(make_trainer: Any, numbers: Any, without: Any) -> None:
    trainer = make_trainer(max_epochs=2)
    trainer.fit(Line(), numbers(3), ckpt_path=without("callbacks"))
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)


def test_a_checkpoint_without_progress_goes_on_with_the_next_epoch(make_trainer: Any, numbers: Any, without: Any) -> None:
    path = without("loops", "keraunos")
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "epoch": 4}, path)
    trainer = make_trainer(max_epochs=7)
    trainer.fit(Line(), numbers(3), ckpt_path=path)
    assert (trainer.current_epoch, trainer.global_step) == (7, 3 + 2 * 3)


@pytest.mark.parametrize("missing", ["optimizer_states", "lr_schedulers"])
def test_a_checkpoint_without_states_is_refused_in_fit_and_evaluated(make_trainer: Any, numbers: Any, without: Any, missing: str) -> None:
    path = without(missing)
    with pytest.raises(KeyError, match=r"holds weights only.*load_from_checkpoint"):
        make_trainer(max_epochs=2).fit(Line(), numbers(3), ckpt_path=path)
    make_trainer().test(Line(), numbers(1), ckpt_path=path, verbose=False)


@pytest.mark.parametrize(("task", "what"), [("fit", "Restored all states"), ("test", "Loaded model weights")])
def test_what_was_loaded_is_said(
    make_trainer: Any, numbers: Any, without: Any, task: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = without()
    with caplog.at_level("INFO"):
        getattr(make_trainer(max_epochs=2), task)(Line(), numbers(1), ckpt_path=path)
    said = [record.getMessage() for record in caplog.records if str(path) in record.getMessage()]
    assert said == [f"Restoring states from the checkpoint path at {path}", f"{what} from the checkpoint at {path}"]
