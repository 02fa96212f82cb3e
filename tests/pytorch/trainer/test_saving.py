"""Checkpoints of a run: written in the background, tried again, and what happens to the run when that fails."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint.background import BackgroundCheckpointIO, PatientCheckpointIO
from lightning.fabric.checkpoint.io import TorchCheckpointIO, load
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

Make = Callable[..., Any]


class Disk(TorchCheckpointIO):
    """Writes when it is let, and refuses what it is told to."""

    def __init__(self, refuses: Callable[[str], bool] = lambda name: False, error: type[BaseException] | None = None) -> None:
        self.refuses = refuses
        self.error = error
        self.gate = threading.Event()
        self.gate.set()
        self.saved: list[str] = []

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        name = os.path.basename(path)
        assert self.gate.wait(30)
        if self.refuses(name):
            raise OSError(errno.ENOSPC, "No space left on device", path) if self.error is None else self.error("odd")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.saved.append(name)


class Steps(Callback):
    """Does something at the beginning of each batch, and notes how far the run came."""

    def __init__(self, action: Callable[[Trainer], Any] = lambda trainer: None) -> None:
        self.action, self.reached = action, 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.reached = trainer.global_step
        self.action(trainer)


def settled(trainer: Trainer) -> bool:
    """Waits until the background has nothing to do but to try again."""
    writer: Any = trainer.strategy.checkpoint_io
    thread = writer._thread
    while thread is not None and thread.is_alive() and not writer._pausing:
        time.sleep(0.001)
    return True


def every_step(folder: Any = "saved", **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, **options)


@pytest.fixture
def make(make_trainer: Make) -> Make:
    return lambda *callbacks, **options: make_trainer(callbacks=list(callbacks), **{"enable_checkpointing": None, **options})


# ---- the arguments --------------------------------------------------------------------------------------------------


def test_arguments_choose_who_writes(make_trainer: Make) -> None:
    background, again = {"async_checkpointing": True}, {"on_save_error": "retry"}
    writers = [make_trainer(**options).strategy.checkpoint_io for options in ({}, background, again, {**background, **again})]
    assert [type(writer) for writer in writers] == [TorchCheckpointIO, AsyncCheckpointIO, PatientCheckpointIO, AsyncCheckpointIO]
    assert [writer.retries for writer in writers] == [False, False, True, True]


def test_plugin_of_the_user_goes_on_writing(make_trainer: Make) -> None:
    plugin = Disk()
    assert make_trainer(plugins=[plugin], async_checkpointing=True).strategy.checkpoint_io.checkpoint_io is plugin
    own = AsyncCheckpointIO(plugin)
    assert make_trainer(plugins=[own], async_checkpointing=True, on_save_error="retry").strategy.checkpoint_io is own


@pytest.mark.parametrize(("name", "value"), [("on_save_error", "ignore"), ("on_save_error", None), ("async_checkpointing", "yes")])
def test_other_values_are_refused(make_trainer: Make, name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=name):
        make_trainer(**{name: value})


# ---- in the background ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"save_top_k": 3, "monitor": "step", "mode": "max"}, {"save_last": True}, {"save_last": "link"}])
def test_run_and_files_are_those_of_a_run_that_waits(Weight: Any, make: Make, numbers: Make, options: dict[str, Any]) -> None:
    found = []
    for folder, background in (("a", False), ("b", True)):
        model, callback = Weight(), every_step(folder, **options)
        make(callback, async_checkpointing=background).fit(model, numbers(6))
        files = {name: load(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
        names = [os.path.relpath(path, callback.dirpath) for path in (*callback.best_k_models, callback.best_model_path)]
        found.append((model.weight.item(), {name: (file["global_step"], file["state_dict"]) for name, file in files.items()}, names))
    assert found[0] == found[1]


def test_training_goes_on_while_the_file_is_written_and_fit_returns_when_it_is_there(Weight: Any, make: Make, numbers: Make) -> None:
    disk = Disk()
    disk.gate.clear()
    seen = []

    def look(trainer: Trainer) -> None:
        if trainer.global_step == 3:
            seen.append(os.path.exists("saved/step=2.ckpt"))
            disk.gate.set()

    callback = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=2)
    make(callback, Steps(look), plugins=[disk], async_checkpointing=True).fit(Weight(), numbers(4))
    assert seen == [False]
    assert os.listdir("saved") == ["step=4.ckpt"]


def test_a_whole_checkpoint_is_there_at_every_moment_after_the_first(Weight: Any, make: Make, numbers: Make) -> None:
    class Looking(Disk):
        """Looks at the folder before and after each change, from the thread that makes them."""

        seen: list[int] = []

        def look(self) -> None:
            self.seen.append(sum(os.path.exists(os.path.join("saved", name)) for name in os.listdir("saved")))

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            os.makedirs("saved", exist_ok=True)
            self.look()
            super().save_checkpoint(*args, **kwargs)
            self.look()

        def remove_checkpoint(self, path: Any) -> None:
            super().remove_checkpoint(path)
            self.look()

    disk = Looking()
    make(every_step(save_last="link"), plugins=[disk], async_checkpointing=True).fit(Weight(), numbers(8))
    assert disk.seen[0] == 0
    assert all(disk.seen[1:])
    assert len(disk.seen) > 16
    assert os.path.samefile("saved/last.ckpt", "saved/step=8.ckpt")


def test_last_is_a_copy_where_there_are_no_links(Weight: Any, make: Make, numbers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    make(every_step(save_last="link"), async_checkpointing=True).fit(Weight(), numbers(4))
    assert sorted(os.listdir("saved")) == ["last.ckpt", "step=4.ckpt"]
    assert not os.path.islink("saved/last.ckpt")
    assert load("saved/last.ckpt")["global_step"] == 4


def test_error_is_raised_after_the_next_batch_and_what_was_saved_before_stays(Weight: Any, make: Make, numbers: Make) -> None:
    disk, steps = Disk(lambda name: name == "step=3.ckpt"), Steps(settled)
    with pytest.raises(OSError, match=r"step=3\.ckpt' was not saved: No space left") as info:
        make(every_step(), steps, plugins=[disk], async_checkpointing=True).fit(Weight(), numbers(8))
    assert info.value.errno == errno.ENOSPC
    assert steps.reached in (2, 3)  # after that batch, or, if the disk takes longer, the next
    assert os.listdir("saved") == ["step=2.ckpt"]


def test_error_of_another_kind_is_raised_as_it_is(Weight: Any, make: Make, numbers: Make) -> None:
    disk, steps = Disk(lambda name: True, ZeroDivisionError), Steps(settled)
    with pytest.raises(ZeroDivisionError):
        make(every_step(), steps, plugins=[disk], async_checkpointing=True).fit(Weight(), numbers(8))
    assert steps.reached in (0, 1)


def test_error_of_the_last_save_is_raised_by_fit_before_it_is_finished(Weight: Any, Rows: Any, make: Make, numbers: Make) -> None:
    disk, logger = Disk(lambda name: name == "step=4.ckpt"), Rows()
    trainer = make(every_step(), plugins=[disk], async_checkpointing=True, logger=logger)
    with pytest.raises(OSError, match=r"step=4\.ckpt' was not saved"):
        trainer.fit(Weight(), numbers(4))
    assert logger.finalized == ["failed"]
    assert trainer.state.status == "interrupted"
    disk.refuses = lambda name: False
    trainer.save_checkpoint("after.ckpt")  # the failure is over
    assert load("after.ckpt")["global_step"] == 4


def test_first_cause_of_a_failing_run_is_what_the_user_sees(Weight: Any, make: Make, numbers: Make) -> None:
    disk = Disk(lambda name: True)
    disk.gate.clear()

    def crash(trainer: Trainer) -> None:
        if trainer.global_step == 1:
            disk.gate.set()
            raise ZeroDivisionError("first")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ZeroDivisionError, match="first"):
            make(every_step(), Steps(crash), plugins=[disk], async_checkpointing=True).fit(Weight(), numbers(4))


def test_failed_save_does_not_keep_the_checkpoint_of_an_exception_from_being_saved(Weight: Any, make: Make, numbers: Make) -> None:
    disk = Disk(lambda name: name == "step=1.ckpt")
    disk.gate.clear()

    def crash(trainer: Trainer) -> None:
        if trainer.global_step == 1:
            disk.gate.set()
            raise ZeroDivisionError("first")

    callbacks = every_step(), Steps(crash), OnExceptionCheckpoint("saved")
    with pytest.raises(ZeroDivisionError, match="first"):
        make(*callbacks, plugins=[disk], async_checkpointing=True).fit(Weight(), numbers(4))
    assert load("saved/on_exception.ckpt")["global_step"] == 1


def test_checkpoint_that_is_saved_after_the_run_is_there_when_the_call_returns(Weight: Any, make: Make, numbers: Make) -> None:
    trainer = make(enable_checkpointing=False, async_checkpointing=True)
    trainer.fit(Weight(), numbers(4))
    trainer.save_checkpoint("after.ckpt")
    assert load("after.ckpt")["global_step"] == 4
    with pytest.raises(OSError, match="was not saved"):
        trainer.save_checkpoint("after.ckpt/x.ckpt")


# ---- again ----------------------------------------------------------------------------------------------------------


def impatient(trainer: Trainer) -> Trainer:
    writer: Any = trainer.strategy.checkpoint_io
    assert isinstance(writer, BackgroundCheckpointIO)
    writer.first_pause = writer.longest_pause = 0.01
    return trainer


BACKGROUND = pytest.mark.parametrize("background", [False, True])


@BACKGROUND
@pytest.mark.parametrize("options", [{}, {"save_last": "link"}, {"save_last": True}])
def test_run_goes_on_when_the_disk_is_full_and_ends_with_the_files_of_any_other(
    Weight: Any, make: Make, numbers: Make, background: bool, options: dict[str, Any]
) -> None:
    disk = Disk()
    whole = []

    def fill_and_empty(trainer: Trainer) -> None:
        settled(trainer)
        if trainer.global_step >= 3:
            disk.refuses = lambda name: trainer.global_step < 6
            whole.append([name for name in os.listdir("saved") if os.path.exists(f"saved/{name}") and name[0] != "."])

    model = Weight()
    trainer = impatient(
        make(every_step(**options), Steps(fill_and_empty), plugins=[disk], async_checkpointing=background, on_save_error="retry")
    )
    with pytest.warns(UserWarning, match=r"was not saved: No space left on device \(errno 28\)"):
        trainer.fit(model, numbers(8))
    assert all("step=3.ckpt" in names for names in whole[:3])  # it stayed until there was another
    expected = Weight()
    make(every_step("other", **options)).fit(expected, numbers(8))
    assert model.weight == expected.weight
    assert sorted(os.listdir("saved")) == sorted(os.listdir("other"))
    assert all(load(f"saved/{name}")["global_step"] == 8 for name in os.listdir("saved"))


@BACKGROUND
def test_one_of_the_best_is_saved_when_the_disk_has_room_again(Weight: Any, make: Make, numbers: Make, background: bool) -> None:
    disk = Disk()

    def fill_and_empty(trainer: Trainer) -> None:
        settled(trainer)
        disk.refuses = lambda name: trainer.global_step == 2 and name == "step=2.ckpt"

    callback = every_step(save_top_k=2, monitor="step", mode="min")
    trainer = impatient(make(callback, Steps(fill_and_empty), plugins=[disk], async_checkpointing=background, on_save_error="retry"))
    with pytest.warns(UserWarning, match=r"step=2\.ckpt' was not saved"):
        trainer.fit(Weight(), numbers(6))
    assert sorted(os.listdir("saved")) == ["step=1.ckpt", "step=2.ckpt"]
    assert load("saved/step=2.ckpt")["global_step"] == 2
    assert sorted(os.path.basename(path) for path in callback.best_k_models) == ["step=1.ckpt", "step=2.ckpt"]


@BACKGROUND
def test_books_forget_what_was_given_up(Weight: Any, make: Make, numbers: Make, background: bool) -> None:
    disk = Disk(lambda name: name in ("step=2.ckpt", "step=3.ckpt"))
    callback = every_step(save_top_k=-1)
    ranked = every_step("ranked", save_top_k=3, monitor="step", mode="max")
    trainer = make(callback, ranked, Steps(settled), plugins=[disk], async_checkpointing=background, on_save_error="retry")
    with pytest.warns(UserWarning, match="was not saved"):
        trainer.fit(Weight(), numbers(5))
    assert sorted(os.listdir("saved")) == ["step=1.ckpt", "step=4.ckpt", "step=5.ckpt"]
    assert sorted(os.listdir("ranked")) == sorted(os.path.basename(path) for path in ranked.best_k_models)
    assert {"step=4.ckpt", "step=5.ckpt"} <= set(os.listdir("ranked"))


@BACKGROUND
def test_save_that_fails_to_the_end_is_an_error(Weight: Any, make: Make, numbers: Make, background: bool) -> None:
    disk, steps = Disk(lambda name: name != "step=1.ckpt"), Steps(settled)
    trainer = make(every_step(), steps, plugins=[disk], async_checkpointing=background, on_save_error="retry")
    with pytest.warns(UserWarning, match="The run goes on"), pytest.raises(OSError, match=r"step=4\.ckpt' was not saved: No space"):
        trainer.fit(Weight(), numbers(4))
    assert steps.reached == 3
    assert os.listdir("saved") == ["step=1.ckpt"]


def test_without_the_argument_a_failed_save_is_an_error_at_once(Weight: Any, make: Make, numbers: Make) -> None:
    steps = Steps()
    with pytest.raises(OSError, match="No space left"):
        make(every_step(), steps, plugins=[Disk(lambda name: name == "step=2.ckpt")]).fit(Weight(), numbers(4))
    assert steps.reached == 1
    assert os.listdir("saved") == ["step=1.ckpt"]


def test_disk_that_is_really_full_is_told_with_its_number(Weight: Any, make: Make, numbers: Make, tmp_path: Path) -> None:
    class OnFullDevice(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"x")

    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    trainer = make(every_step(), plugins=[OnFullDevice()], on_save_error="retry")
    with pytest.warns(UserWarning, match=rf"errno {errno.ENOSPC}"), pytest.raises(OSError) as info:
        trainer.fit(Weight(), numbers(2))
    assert info.value.errno == errno.ENOSPC


# ---- weights that are no numbers ------------------------------------------------------------------------------------


def spoil(at: int, value: float) -> Callable[[Trainer], None]:
    def action(trainer: Trainer) -> None:
        if trainer.global_step == at:
            with torch.no_grad():
                trainer.lightning_module.weight.fill_(value)

    return action


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"save_last": True}, {"save_last": "link"}, {"save_top_k": 0, "save_last": True}])
def test_weights_that_are_no_numbers_replace_nothing(Weight: Any, make: Make, numbers: Make, value: float, options: dict[str, Any]) -> None:
    callback = every_step(**options)
    with pytest.warns(UserWarning, match="'weight' holds NaN or infinity at global step 4") as told:
        make(callback, Steps(spoil(3, value))).fit(Weight(), numbers(8))
    assert sum("NaN" in str(each.message) for each in told) == 1
    assert {load(os.path.join("saved", name))["global_step"] for name in os.listdir("saved")} == {3}
    assert callback.best_model_path in ("", os.path.abspath("saved/step=3.ckpt"))


def test_saving_goes_on_once_they_are_numbers_again(Weight: Any, make: Make, numbers: Make) -> None:
    def action(trainer: Trainer) -> None:
        spoil(2, torch.nan)(trainer)
        spoil(4, 0.0)(trainer)

    with pytest.warns(UserWarning, match="NaN or infinity"):
        make(every_step(save_top_k=-1), Steps(action)).fit(Weight(), numbers(6))
    assert sorted(os.listdir("saved")) == [f"step={step}.ckpt" for step in (1, 2, 5, 6)]


def test_explicit_save_warns_and_saves(Weight: Any, make: Make, numbers: Make) -> None:
    trainer = make(Steps(spoil(1, torch.inf)), enable_checkpointing=False)
    trainer.fit(Weight(), numbers(2))
    with pytest.warns(UserWarning, match="holds NaN or infinity in the parameter 'weight'"):
        trainer.save_checkpoint("bad.ckpt")
    assert not torch.isfinite(load("bad.ckpt")["state_dict"]["weight"])


def test_buffers_and_large_numbers_are_no_reason_not_to_save(Weight: Any, make: Make, numbers: Make) -> None:
    class Odd(Weight):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("best", torch.tensor(torch.inf))
            largest = torch.finfo(torch.float16).max
            self.short = torch.nn.Parameter(torch.full((100,), largest, dtype=torch.float16), requires_grad=False)
            self.integers = torch.nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
            self.imaginary = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
            self.empty = torch.nn.Parameter(torch.ones(0))

    make(every_step()).fit(Odd(), numbers(2))
    assert os.listdir("saved") == ["step=2.ckpt"]


class Normed(LightningModule):
    """Weights, statistics and moments; a mask and a place for what is not known yet, which are no numbers from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.register_buffer("unknown", torch.full((3,), torch.nan))
        self.register_buffer("smallest", torch.zeros(3))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)
        self.frozen = torch.nn.Parameter(torch.full((3,), -torch.inf), requires_grad=False)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.norm(self.layer(batch.float().reshape(-1, 1).expand(4, 1) + torch.rand(4, 1))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def spoiled(what: str, value: float) -> Callable[[Trainer], None]:
    def action(trainer: Trainer) -> None:
        if trainer.global_step == 2:
            module: Any = trainer.lightning_module
            moments = trainer.optimizers[0].state[module.layer.weight]
            tensors = {"moment": moments["exp_avg_sq"], "statistics": module.norm.running_var, "smallest": module.smallest}
            with torch.no_grad():
                tensors.get(what, module.unsaved)[0] = value

    return action


@pytest.mark.parametrize(
    ("what", "value", "named"),
    [
        ("moment", torch.inf, r"optimizer's state for the parameter 'layer\.weight'"),
        ("statistics", torch.nan, r"buffer 'norm\.running_var'"),
        ("statistics", torch.inf, r"buffer 'norm\.running_var'"),
        ("smallest", torch.nan, "buffer 'smallest'"),
    ],
)
def test_statistics_and_moments_that_are_no_numbers_replace_nothing(make: Make, numbers: Make, what: str, value: float, named: str) -> None:
    with pytest.warns(UserWarning, match=f"The {named} holds NaN or infinity at global step 3"):
        make(every_step(), Steps(spoiled(what, value))).fit(Normed(), numbers(5))
    assert os.listdir("saved") == ["step=2.ckpt"]


@pytest.mark.parametrize(("what", "value"), [("nothing", torch.nan), ("smallest", torch.inf)])
def test_what_is_no_number_from_the_start_is_no_reason_not_to_save(make: Make, numbers: Make, what: str, value: float) -> None:
    make(every_step(), Steps(spoiled(what, value))).fit(Normed(), numbers(5))
    assert os.listdir("saved") == ["step=5.ckpt"]


def test_moments_do_not_matter_where_weights_are_saved_alone(make: Make, numbers: Make) -> None:
    make(every_step(save_weights_only=True), Steps(spoiled("moment", torch.inf))).fit(Normed(), numbers(5))
    assert os.listdir("saved") == ["step=5.ckpt"]
