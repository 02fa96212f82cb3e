"""Checkpoints of runs of several processes: in the background, tried again, and when a process dies while it is written."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from sharded import fsdp, weights
from trainers import Numbers, Weight, joined, quiet

from lightning.fabric.checkpoint import sharded
from lightning.fabric.checkpoint.background import BackgroundCheckpointIO
from lightning.fabric.checkpoint.generations import generation_of, newest_valid
from lightning.fabric.checkpoint.io import TorchCheckpointIO, load
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def numbers(count: int) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count))


def every_step(folder: str, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, **options)


class At(Callback):
    """Does something before a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


# ---- one file -------------------------------------------------------------------------------------------------------


class Failing(TorchCheckpointIO):
    """Refuses some files as often as it is told to."""

    def __init__(self, **times: int) -> None:
        self.times = times

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        name = Path(path).stem.replace("=", "")
        if self.times.get(name, 0) > 0:
            self.times[name] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", path)
        super().save_checkpoint(checkpoint, path, storage_options)


def going_on(rank: int, size: int, folder: str, background: bool) -> list[Any]:
    trainer = joined(
        callbacks=every_step(folder, save_last="link"), enable_checkpointing=True, plugins=[Failing(step2=3)],
        async_checkpointing=background, on_save_error="retry",
    )  # fmt: skip
    writer: Any = trainer.strategy.checkpoint_io
    writer.first_pause = writer.longest_pause = 0.01
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(Weight(), numbers(8))
    return [trainer.global_step, sum("was not saved" in str(each.message) for each in told)]


@pytest.mark.parametrize("background", [False, True])
def test_run_goes_on_in_all_processes_when_rank_0_could_not_save(tmp_path: Path, background: bool) -> None:
    assert run(going_on, 2, str(tmp_path), background) == [[4, 1], [4, 0]]
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=4.ckpt"]
    assert load(tmp_path / "last.ckpt")["global_step"] == 4


def ending(rank: int, size: int, folder: str) -> None:
    def hurry() -> None:
        trainer.strategy.side_channel.grace = 2.0  # type: ignore[attr-defined]

    trainer = joined(
        callbacks=[every_step(folder), At(0, hurry)], enable_checkpointing=True, plugins=[Failing(step2=1)], async_checkpointing=True
    )
    trainer.fit(Weight(), numbers(400))


def test_error_in_the_background_of_rank_0_ends_all_processes_with_it(tmp_path: Path) -> None:
    first, second = run_to_end(ending, 2, str(tmp_path))
    assert first.error == "OSError"
    assert "step=2.ckpt' was not saved: No space left" in first.message
    assert second.error is not None
    assert os.listdir(tmp_path) == ["step=1.ckpt"]


def without_folder(rank: int, size: int, folder: str) -> int:
    model = Weight()
    trainer = joined(callbacks=every_step(os.path.join(folder, "file", "saved")), enable_checkpointing=True)
    with pytest.raises(NotADirectoryError, match=r"can't be written to .* since this is no folder"):
        trainer.fit(model, numbers(8))
    return len(model.seen)


def test_folder_that_cannot_be_written_is_the_same_error_in_all_processes_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run(without_folder, 2, str(tmp_path)) == [0, 0]


# ---- directories ----------------------------------------------------------------------------------------------------


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def vectors(rank: int, size: int, count: int = 6) -> Any:
    data = torch.randn(count, 4, 5, generator=torch.Generator().manual_seed(5))
    return DataLoader([batch[rank::size] for batch in data], batch_size=None)  # type: ignore[arg-type]


def in_parts(size: int, *callbacks: Callback, **options: Any) -> Trainer:
    return quiet(
        strategy=fsdp(size, state_dict_type="sharded"), devices=size, callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks), use_distributed_sampler=False, **options,
    )  # fmt: skip


@contextmanager
def held_back(gate: threading.Event) -> Iterator[None]:
    """Inside, shards are written once the gate is open."""
    original = sharded.write_shards

    def later(*args: Any) -> None:
        assert gate.wait(30)
        original(*args)

    sharded.write_shards = later
    try:
        yield
    finally:
        sharded.write_shards = original


def two_runs(rank: int, size: int, folder: str) -> list[Any]:
    """One that waits for its saves, and one that goes on while they are written, which takes them a while."""
    warnings.filterwarnings("ignore", ".*state of callbacks that this trainer does not have")
    results = []
    waits = in_parts(size, ModelCheckpoint(os.path.join(folder, "waits"), "{step}", every_n_train_steps=3))
    waits.fit(Model(), vectors(rank, size))
    results.append(weights(waits.strategy))
    gate, there = threading.Event(), []

    def look() -> None:
        there.append(os.path.exists(os.path.join(folder, "goes on", "step=3.ckpt")))
        gate.set()

    saving = ModelCheckpoint(os.path.join(folder, "goes on"), "{step}", every_n_train_steps=3)
    goes_on = in_parts(size, saving, At(4, look), async_checkpointing=True)
    with held_back(gate):
        goes_on.fit(Model(), vectors(rank, size))
    results += [weights(goes_on.strategy), there]
    resumed = in_parts(size, max_epochs=2)
    resumed.fit(Model(), vectors(rank, size), ckpt_path=os.path.join(folder, "goes on", "step=6.ckpt"))
    results.append(weights(resumed.strategy))
    whole = in_parts(size, max_epochs=2)
    whole.fit(Model(), vectors(rank, size))
    return [*results, weights(whole.strategy)]


def test_directories_are_written_while_training_goes_on(tmp_path: Path) -> None:
    for waits, goes_on, there, resumed, whole in run(two_runs, 2, str(tmp_path)):
        assert waits == goes_on
        assert there == [False]  # while later steps were taken
        assert resumed == whole
    assert os.listdir(tmp_path / "goes on") == ["step=6.ckpt"]
    one, other = (load(tmp_path / name / "step=6.ckpt") for name in ("waits", "goes on"))
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])
    for number, state in one["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, other["optimizer_states"][0]["state"][number][name]) for name, value in state.items())


def killed(rank: int, size: int, folder: str, victim: int) -> None:
    """The victim is killed while the second checkpoint is written."""
    original = sharded.write_shards
    calls = []

    def dying(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2 and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    sharded.write_shards = dying
    in_parts(size, every_step(folder), async_checkpointing=True).fit(Model(), vectors(rank, size, 2000))


@pytest.mark.parametrize("victim", [0, 1])
def test_death_of_a_process_in_the_middle_leaves_the_previous_checkpoint_whole(tmp_path: Path, victim: int) -> None:
    outcomes = run_to_end(killed, 2, str(tmp_path), victim)
    assert outcomes[victim].error == "Died"
    assert outcomes[1 - victim].error is not None
    assert outcomes[1 - victim].seconds < 40
    path = newest_valid(tmp_path)
    assert os.path.basename(path) == "step=1.ckpt"
    found = generation_of(path)
    assert found is not None
    assert found.global_step == 1
    trainer = quiet(max_steps=3, callbacks=[every_step(str(tmp_path))], enable_checkpointing=True)
    warnings.simplefilter("ignore")
    trainer.fit(Model(), vectors(0, 1), ckpt_path=path)
    assert trainer.global_step == 3
    assert not [name for name in os.listdir(tmp_path) if name[0] == "."]  # what was half-written is swept


def disk_of_one_fills_up(rank: int, size: int, folder: str, background: bool) -> list[Any]:
    original, room = sharded._summing_writer, [0 if rank == 1 else 99]

    def limited(path: str) -> Any:
        writer = original(path)
        write = writer.write_data

        def write_data(*args: Any) -> Any:
            room[0] -= 1
            if -4 < room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", path)
            return write(*args)

        writer.write_data = write_data
        return writer

    sharded._summing_writer = limited
    trainer = in_parts(size, every_step(folder), async_checkpointing=background, on_save_error="retry")
    writer: Any = trainer.strategy.checkpoint_io
    assert isinstance(writer, BackgroundCheckpointIO)
    writer.first_pause = writer.longest_pause = 0.01
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(Model(), vectors(rank, size))
    return [weights(trainer.strategy), trainer.global_step, [str(each.message) for each in told if "was not saved" in str(each.message)]]


@pytest.mark.parametrize("background", [False, True])
def test_run_goes_on_when_the_disk_of_one_process_is_full(tmp_path: Path, background: bool) -> None:
    first, second = run(disk_of_one_fills_up, 2, str(tmp_path), background)
    assert first[:2] == second[:2]
    assert first[1] == 6
    assert first[2]
    assert all("rank 1" in message and f"errno {errno.ENOSPC}" in message for message in first[2])
    assert second[2] == []
    assert os.listdir(tmp_path) == ["step=6.ckpt"]
    assert load(tmp_path / "step=6.ckpt")["global_step"] == 6


def never_saved(rank: int, size: int, folder: str, background: bool) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", folder)

    sharded.commit = full
    warnings.filterwarnings("ignore", ".*The run goes on")
    in_parts(size, every_step(folder), async_checkpointing=background, on_save_error="retry").fit(Model(), vectors(rank, size))


@pytest.mark.parametrize("background", [False, True])
def test_directory_that_could_not_be_saved_to_the_end_is_an_error_in_all_processes(tmp_path: Path, background: bool) -> None:
    began = time.monotonic()
    outcomes = run_to_end(never_saved, 2, str(tmp_path), background)
    assert time.monotonic() - began < 50
    assert outcomes[0].error == "OSError"
    assert "was not saved" in outcomes[0].message
    assert outcomes[1].error is not None
    assert os.listdir(tmp_path) == []


def spoiled(rank: int, size: int, folder: str, what: str) -> list[Any]:
    model = Model()

    def spoil() -> None:
        if rank == 1:
            weight: Any = model.layers[0].weight
            moments = model.trainer.optimizers[0].state[weight]
            with torch.no_grad():
                (weight if what == "weight" else moments["exp_avg_sq"])._local_tensor.fill_(torch.nan if what == "weight" else torch.inf)

    callback = every_step(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        in_parts(size, callback, At(3, spoil)).fit(model, vectors(rank, size))
    return [os.path.basename(callback.best_model_path), [str(each.message) for each in told if "NaN" in str(each.message)]]


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_part_of_one_process_that_is_no_number_keeps_all_from_saving(tmp_path: Path, what: str) -> None:
    first, second = run(spoiled, 2, str(tmp_path), what)
    assert [first[0], second[0]] == ["step=3.ckpt"] * 2
    assert len(first[1]) == 1
    assert "at global step 4" in first[1][0]
    assert ("optimizer's state for the parameter 'layers.0.weight'" if what == "moment" else "layers.") in first[1][0]
    assert os.listdir(tmp_path) == ["step=3.ckpt"]
