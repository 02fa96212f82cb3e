"""What happens around the loop of one call: everybody hears of errors, everything is closed, and the trainer can be used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus


class Boom(Exception):
    pass


def failing(owner: Any, name: str, error: type[BaseException] = Boom) -> Any:
    """``owner`` with a hook of the instance that raises."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error(name)

    owner.__dict__[name] = fail
    return owner


class Heard(Callback):
    """Keeps what ``on_exception`` is told."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.status: list[Any] = []

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.errors.append(exception)
        self.status.append(trainer.state.status)


class Data(LightningDataModule):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.errors = make, []

    def train_dataloader(self) -> Any:
        return self.make(2)

    def val_dataloader(self) -> Any:
        return self.make(1)

    def on_exception(self, exception: BaseException) -> None:
        self.errors.append(exception)


@pytest.fixture
def Scheduled(Evaluated: Any) -> Any:
    class Scheduled(Evaluated):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Dropout().eval()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    return Scheduled


# ---- errors: those in each of the hooks are in test_failures.py --------------------------------------------------------


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_error_in_evaluation_reaches_everybody_too(Scheduled: Any, make_trainer: Any, numbers: Any, Rows: Any, task: str) -> None:
    step = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}[task]
    heard, logger, module = Heard(), Rows(), failing(Scheduled(), step)
    trainer = make_trainer(callbacks=[heard], logger=logger)
    with pytest.raises(Boom, match=step):
        getattr(trainer, task)(module, numbers(1))
    assert len(heard.errors) == 1
    assert trainer.interrupted
    assert trainer.state.fn == task
    assert logger.finalized == ["failed"]


@pytest.mark.filterwarnings("ignore:.*in evaluation mode at the start")
def test_first_error_is_raised_where_the_end_fails_as_well(Scheduled: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Failing(Rows):  # type: ignore[misc]
        def finalize(self, status: str) -> None:
            super().finalize(status)
            raise RuntimeError("logger")

    heard, loggers = Heard(), [Failing(), Rows()]
    trainer = make_trainer(callbacks=[failing(Callback(), "on_exception"), heard], logger=loggers)
    data = failing(Data(numbers), "on_exception")
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="was being ended by ZeroDivisionError") as caught:
        trainer.fit(failing(Scheduled(), "training_step", ZeroDivisionError), datamodule=data)
    told = [str(w.message) for w in caught if "was being ended" in str(w.message)]
    assert len(told) == 3
    assert len(heard.errors) == 1
    assert [logger.finalized for logger in loggers] == [["failed"], ["failed"]]


@pytest.mark.filterwarnings("error")
def test_end_of_a_failed_run_is_complete_where_warnings_are_errors(Evaluated: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    heard, logger = Heard(), Rows()
    trainer = make_trainer(callbacks=[failing(Callback(), "on_exception"), heard], logger=logger)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(failing(Evaluated(), "training_step", ZeroDivisionError), numbers(1), numbers(1))
    assert len(heard.errors) == 1
    assert logger.finalized == ["failed"]


def test_error_before_anything_runs_reaches_the_callbacks(make_trainer: Any, Weight: Any, numbers: Any) -> None:
    heard = Heard()
    trainer = make_trainer(callbacks=[heard])
    with pytest.raises(FileNotFoundError):
        trainer.fit(Weight(), numbers(1), ckpt_path="absent.ckpt")
    assert [type(error) for error in heard.errors] == [FileNotFoundError]
    assert trainer.interrupted


# ---- interrupts ------------------------------------------------------------------------------------------------------


def test_interrupt_leaves_a_trainer_that_can_be_used(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        interrupts = True

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if self.interrupts and batch_idx == 1:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    model, trainer = Model(), make_trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(model, numbers(3), numbers(1))
    assert trainer.interrupted
    assert trainer.state.fn is TrainerFn.FITTING
    trainer.save_checkpoint("interrupted.ckpt")
    assert trainer.validate(model, numbers(3), verbose=False) == [{"val": 1.0}]
    assert not trainer.interrupted
    model.interrupts = False
    trainer.fit(model, numbers(3), numbers(1))
    assert trainer.current_epoch == 1
    assert trainer.state.status is TrainerStatus.FINISHED


def test_system_exit_ends_the_run_like_an_error(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    heard = Heard()
    trainer = make_trainer(callbacks=[heard])
    with pytest.raises(SystemExit):
        trainer.fit(failing(Evaluated(), "training_step", SystemExit), numbers(1), numbers(1))
    assert len(heard.errors) == 1
    assert trainer.interrupted


@pytest.mark.filterwarnings("ignore:.*[Aa]nomaly")
def test_anomaly_detection_ends_with_the_run(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[bool] = []

    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.append(torch.is_anomaly_enabled())
            raise Boom

    with pytest.raises(Boom):
        make_trainer(detect_anomaly=True).fit(Model(), numbers(1))
    assert seen == [True]
    assert not torch.is_anomaly_enabled()


# ---- one run after the other -----------------------------------------------------------------------------------------


def test_checkpoint_saved_after_a_test_holds_the_optimizers_of_the_fit(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer, model = make_trainer(), Model()
    trainer.fit(model, numbers(3), numbers(1))
    trainer.test(model, numbers(2), verbose=False)
    assert trainer.optimizers[0].state[model.weight]["step"] == 3
    trainer.save_checkpoint("after.ckpt")
    resumed, again = make_trainer(max_epochs=2), Model()
    resumed.fit(again, numbers(3), numbers(1), ckpt_path="after.ckpt")
    assert resumed.optimizers[0].state[again.weight]["step"] == 6
    trainer.test(again, numbers(2), verbose=False)
    assert trainer.optimizers == []  # those of the other model, which must not be saved with this one's weights


def test_callbacks_of_the_model_do_not_pile_up(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def configure_callbacks(self) -> Any:
            return [Heard()]

    model, trainer = Model(), make_trainer()
    for _ in range(3):
        trainer.validate(model, numbers(1), verbose=False)
    assert len([callback for callback in trainer.callbacks if isinstance(callback, Heard)]) == 1


def test_module_that_was_run_can_be_pickled_and_copied(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    import copy
    import io

    model = Evaluated()
    make_trainer().fit(model, numbers(2), numbers(1))
    assert copy.deepcopy(model).weight == model.weight
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


@pytest.mark.parametrize(
    "error",
    [{"datamodule": 3}, {"train_dataloaders": 5}, {"ckpt_path": ""}, {"ckpt_path": 7}],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_wrong_arguments_leave_a_trainer_that_can_be_used(Evaluated: Any, make_trainer: Any, numbers: Any, error: Any) -> None:
    model, trainer = Evaluated(), make_trainer()
    arguments = {"train_dataloaders": numbers(1), "val_dataloaders": numbers(1), **error}
    if "datamodule" in error:
        arguments = error
    with pytest.raises((TypeError, ValueError)):
        trainer.fit(model, **arguments)
    trainer.fit(model, numbers(2), numbers(1))
    assert trainer.current_epoch == 1
