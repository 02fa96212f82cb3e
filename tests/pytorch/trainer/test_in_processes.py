"""Arguments and properties of the Trainer in several processes."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from trainers import Evaluated, Numbers, Regression, Rows, Stream, Vectors, joined, loader, quiet
from training import largest_difference, plain

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler


def numbers(count: int, batch_size: int = 1, **arguments: Any) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count), batch_size=batch_size, **arguments)


class Cycled(Regression):
    """Its learning rate goes through one cycle in the steps that the run will take."""

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(self.estimated))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def cycled(rank: int, size: int) -> list[Any]:
    module = Cycled()
    trainer = (joined if size > 1 else quiet)(max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, loader(Vectors(30), 6, size))
    return [module.estimated, trainer.global_step, trainer.num_training_batches, plain(module.state_dict())]


def test_estimated_steps_are_those_of_each_process() -> None:
    first, second = run(cycled, 2)
    (alone,) = run(cycled, 1)
    assert first == second
    assert first[:3] == alone[:3] == [6, 6, 5]
    assert largest_difference(first[3], alone[3]) < 1e-6


COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "barrier", "broadcast", "gather", "reduce")


def counted(rank: int, size: int, folder: str) -> list[int]:
    """How many collectives Python starts in runs of 10 and of 60 steps; DDP's own are started by its engine."""
    calls: list[str] = []

    def counting(name: str) -> Any:
        function = getattr(torch.distributed, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    class Logging(Evaluated):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("loss", batch.mean(), sync_dist=True, on_step=True, on_epoch=True, prog_bar=True)
            return super().training_step(batch, batch_idx)

    for name in COLLECTIVES:
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, counting(name))
    counts = []
    warnings.filterwarnings("ignore", ".*log_every_n_steps.*|.*is not empty.*")
    for steps in (10, 60):
        calls.clear()
        trainer = joined(
            logger=Rows(), log_every_n_steps=1000, enable_checkpointing=True, callbacks=[ModelCheckpoint(folder), EarlyStopping("val")],
            gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(Logging(), numbers(2 * steps), numbers(2 * steps))
        counts.append(len(calls))
    return counts


def test_steps_take_no_collective_beyond_those_of_the_engine(tmp_path: Path) -> None:
    for short, long in run(counted, 2, str(tmp_path)):
        assert 0 < short == long


class Configured(Regression):
    """Makes its layers when the run starts, otherwise in each process."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        torch.manual_seed(self.trainer.global_rank + 3)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def configured(rank: int, size: int) -> dict[str, Any]:
    module = Configured()
    (joined if size > 1 else quiet)().fit(module, loader(Vectors(30), 6, size))
    return plain(module.state_dict())


def test_layers_made_in_configure_model_become_those_of_rank_0() -> None:
    first, second = run(configured, 2)
    assert first == second
    assert largest_difference(first, run(configured, 1)[0]) < 1e-6


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return numbers(8, 2)

    def val_dataloader(self) -> Any:
        return [numbers(3), numbers(5)]

    def test_dataloader(self) -> Any:
        return numbers(3)

    def predict_dataloader(self) -> Any:
        return numbers(3)


class Model(Evaluated):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        super().validation_step(batch, batch_idx)


def short(rank: int, size: int) -> list[Any]:
    warnings.filterwarnings("ignore", ".*fast_dev_run.*")
    model, trainer = Model(), joined(fast_dev_run=True)
    trainer.fit(model, datamodule=Data())
    fast = [len(model.seen), len(model.evaluated), trainer.global_step]
    trainer = joined(num_sanity_val_steps=1, max_epochs=2)
    model = Model()
    trainer.fit(model, datamodule=Data())
    batches = trainer.num_val_batches
    tested = trainer.test(datamodule=Data(), verbose=False)
    predicted = trainer.predict(datamodule=Data())
    return [fast, len(model.seen), tested, len(predicted), batches]


def test_short_runs_and_datamodules() -> None:
    for rank, result in enumerate(run(short, 2)):
        assert result == [[1, 2, 1], 4, [{"test": 1.0}], 2 - rank, [2 - rank, 3 - rank]]


def profiled(rank: int, size: int, folder: str) -> None:
    joined(profiler=SimpleProfiler(folder, "report")).fit(Evaluated(), numbers(4), numbers(2))


def test_each_process_writes_a_profile_of_its_own(tmp_path: Path) -> None:
    run(profiled, 2, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit-report-0.txt", "fit-report-1.txt"]


def with_streams(rank: int, size: int) -> list[Any]:
    """Training and validation from streams, of which that of rank 1 is empty in validation."""
    rows, model = Rows(), Evaluated()
    trainer = joined(logger=rows, max_epochs=2)
    trainer.fit(model, DataLoader(Stream(3, start=3 * rank)), DataLoader(Stream(2 - 2 * rank)))
    return [trainer.callback_metrics["val"].item(), [value for _, value in rows.of("val")], model.weight.item()]


def test_streams_may_be_empty_in_some_processes_of_an_evaluation() -> None:
    first, second = run(with_streams, 2)
    assert first == second == [0.5, [0.5, 0.5], -15.0]


def test_trainer_with_all_that_is_default_can_be_sent_to_a_process(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", default_root_dir=tmp_path, max_time={"hours": 1})
    sent = pickle.loads(pickle.dumps((trainer, trainer.fit)))
    assert sent[0].world_size == 2
    assert [type(callback) for callback in sent[0].callbacks] == [type(callback) for callback in trainer.callbacks]
