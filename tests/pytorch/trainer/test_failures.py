"""Whatever fails in a run: the first error is what the caller gets, everybody hears of it, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.hooks import DATA_HOOKS, EVENT_HOOKS, MODULE_HOOKS
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

# Hooks of a callback and of a module beside those of the lists.
CALLBACK_HOOKS = ("setup", "teardown", "on_save_checkpoint", "on_load_checkpoint", "state_dict", "load_state_dict")
HOOKS = [
    *(("callback", name) for name in dict.fromkeys((*EVENT_HOOKS, *CALLBACK_HOOKS))),
    *(("module", name) for name in (*EVENT_HOOKS, *MODULE_HOOKS, *DATA_HOOKS) if hasattr(LightningModule, name)),
    *(("data", name) for name in DATA_HOOKS),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than log_every_n_steps.*", "ignore:.*in evaluation mode at the start")


class Boom(Exception):
    pass


class Heard(Callback):
    """Keeps what ``on_exception`` is told."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.errors.append(exception)


class TornDown(Callback):
    """Counts what is called at the end of a run."""

    def __init__(self) -> None:
        self.count = 0

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.count += 1


@pytest.fixture
def Everything(Evaluated: Any, numbers: Any) -> Any:
    """A model for which every hook runs."""

    class Everything(Evaluated):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.frozen = torch.nn.Dropout().eval()

        def val_dataloader(self) -> Any:
            return numbers(1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = self.weight * batch.mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    return Everything


class Data(LightningDataModule):
    """Loaders of numbers; that of training has a worker."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make(3, num_workers=1, persistent_workers=True)

    def val_dataloader(self) -> Any:
        return self.make(1)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """After the test there are the threads, processes and files that a run leaves, and no more."""
    threads = set(threading.enumerate())
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    yield
    left = set(threading.enumerate()) - threads
    for thread in left:
        thread.join(10)  # those that feed the queues of workers end when they notice
    assert [thread for thread in left if thread.is_alive()] == []
    assert multiprocessing.active_children() == []
    assert [path for path in Path.cwd().rglob("*") if "tmp" in path.name or path.name.startswith(".")] == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers


def failing(owner: Any, name: str, error: type[BaseException]) -> Any:
    """``owner`` with a hook of its class that raises."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error(name)

    owner.__class__ = type(f"Failing{type(owner).__name__}", (type(owner),), {name: fail})
    return owner


def run(trainer: Any, module: Any, data: Any, hook: str, ckpt_path: Any) -> None:
    """The run in which a hook is called."""
    if "test" in hook:
        trainer.test(module, datamodule=data)
    elif "predict" in hook:
        trainer.predict(module, datamodule=data)
    else:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)


@pytest.fixture
def checkpoint(Everything: Any, make_trainer: Any, numbers: Any) -> str:
    """A checkpoint with the state of a callback."""

    class Callback_(Callback):
        state_key = "failing"  # type: ignore[assignment]

        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

    trainer = make_trainer(callbacks=Callback_())
    trainer.fit(Everything(), datamodule=Data(numbers))
    trainer.save_checkpoint("first.ckpt")
    return os.path.abspath("first.ckpt")


@pytest.mark.parametrize(("owner", "hook"), HOOKS, ids=lambda value: value)
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_error_in_any_hook_is_raised_and_leaves_nothing(
    Everything: Any,
    make_trainer: Any,
    numbers: Any,
    Rows: Any,
    request: pytest.FixtureRequest,
    owner: str,
    hook: str,
    error: type[BaseException],
) -> None:
    resumed = request.getfixturevalue("checkpoint") if "load" in hook and "dataloader" not in hook else None
    request.getfixturevalue("leaves_nothing")

    class Keyed(Callback):
        state_key = "failing"  # type: ignore[assignment]

    callback, module, data = Keyed(), Everything(), Data(numbers)
    asked = owner == "module" and "dataloader" in hook  # the module for its loaders, for want of a datamodule
    for name in DATA_HOOKS if asked else ():
        if "dataloader" in name and name != hook:
            setattr(module, name, getattr(data, name))
    failing({"callback": callback, "module": module, "data": data}[owner], hook, error)
    heard, loggers, end = Heard(), [Rows(), CSVLogger("."), TensorBoardLogger(".")], TornDown()
    trainer = make_trainer(
        callbacks=[end, callback, heard, ModelCheckpoint("saved")],
        logger=loggers,
        num_sanity_val_steps=1,
        enable_checkpointing=True,
        max_epochs=2,
    )
    with pytest.raises(error) as raised:
        run(trainer, module, None if asked else data, hook, resumed)
    assert str(raised.value) == hook
    assert heard.errors == [raised.value]
    assert loggers[0].finalized == ["failed"]
    assert loggers[1]._outbox is None
    assert trainer.interrupted
    assert end.count == (hook == "teardown")
    assert (module.training, module.frozen.training) == (True, False)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    with pytest.raises(MisconfigurationException):
        module.log("x", 1.0)  # no loop runs any more
    assert getattr(raised.value, "__notes__", []) == []


def test_every_teardown_runs_whichever_of_them_fails(Everything: Any, make_trainer: Any, numbers: Any, leaves_nothing: None) -> None:
    ends = [TornDown(), TornDown(), TornDown()]
    failing(ends[0], "teardown", Boom)
    failing(ends[1], "teardown", RuntimeError)
    module = Everything()
    module.teardown = lambda stage: ends.append(stage)
    with pytest.warns(UserWarning, match="ended by Boom, FailingTornDown|fail raised RuntimeError"), pytest.raises(Boom) as raised:
        make_trainer(callbacks=ends).fit(module, numbers(1))
    assert ends[2].count == 1
    assert ends[3] == "fit"
    assert len(raised.value.__notes__) == 1
    assert "RuntimeError: teardown" in raised.value.__notes__[0]


@pytest.mark.parametrize("second", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_first_error_is_raised_with_notes_of_those_that_came_after_it(
    Everything: Any, make_trainer: Any, numbers: Any, Rows: Any, leaves_nothing: None, second: type[BaseException]
) -> None:
    class Broken(Rows):  # type: ignore[misc]
        def finalize(self, status: str) -> None:
            super().finalize(status)
            raise second("logger")

    heard, loggers, data = Heard(), [Broken(), Rows()], Data(numbers)
    data = failing(data, "on_exception", second)
    trainer = make_trainer(callbacks=[failing(Callback(), "on_exception", second), heard], logger=loggers)
    trainer.strategy.teardown = failing(Callback(), "teardown", second).teardown
    with pytest.warns(UserWarning, match="was being ended by Boom"), pytest.raises(Boom) as raised:
        trainer.fit(failing(Everything(), "training_step", Boom), datamodule=data)
    assert heard.errors == [raised.value]
    assert [logger.finalized for logger in loggers] == [["failed"], ["failed"]]
    notes = raised.value.__notes__
    assert len(notes) == 4
    assert all(f"{second.__name__}: " in note for note in notes)
    assert f"Broken.finalize raised {second.__name__}: logger" in notes[2]


def test_hook_that_raises_again_what_it_was_told_adds_nothing(Everything: Any, make_trainer: Any, numbers: Any) -> None:
    class Raises(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            raise exception

    with pytest.raises(Boom) as raised:  # no warning
        make_trainer(callbacks=Raises()).fit(failing(Everything(), "training_step", Boom), numbers(1))
    assert getattr(raised.value, "__notes__", []) == []


def test_error_of_a_step_is_the_first_even_where_the_run_fails_for_it_in_another_way(
    Everything: Any, make_trainer: Any, numbers: Any
) -> None:
    class Model(Everything):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raise Boom("the cause")

    class Context(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            raise ValueError("the second") from exception

    with pytest.warns(UserWarning, match="the second"), pytest.raises(Boom, match="the cause") as raised:
        make_trainer(callbacks=Context()).fit(Model(), numbers(1))
    assert raised.value.__cause__ is None


# ---- workers of loaders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stage", ["train", "val", "predict"])
def test_worker_that_is_killed_ends_the_run_and_the_other_workers(
    Everything: Any, make_trainer: Any, numbers: Any, Rows: Any, leaves_nothing: None, stage: str, persistent: bool
) -> None:
    class Kill(Callback):
        def kill(self, *args: Any) -> None:
            victim = multiprocessing.active_children()[-1]
            os.kill(victim.pid or 0, signal.SIGKILL)
            victim.join()

        on_train_batch_start = on_validation_batch_start = on_predict_batch_start = kill

    loader, heard, rows, module = numbers(60, num_workers=2, persistent_workers=persistent), Heard(), Rows(), Everything()
    trainer = make_trainer(callbacks=[heard, Kill()], logger=rows)
    task = {"train": trainer.fit, "val": trainer.validate, "predict": trainer.predict}[stage]
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly|killed by signal") as raised:
        task(module, loader)
    assert heard.errors == [raised.value]
    assert rows.finalized == ["failed"]


def test_error_in_a_dataset_of_a_worker_is_shown_with_its_traceback(
    Everything: Any, make_trainer: Any, Numbers: Any, leaves_nothing: None
) -> None:
    class Broken(Numbers):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Tensor:
            if index == 3:
                raise Boom("the sample")
            return super().__getitem__(index)  # type: ignore[no-any-return]

    with pytest.raises(Boom, match="the sample"):
        make_trainer().fit(Everything(), torch.utils.data.DataLoader(Broken(10), num_workers=2))
