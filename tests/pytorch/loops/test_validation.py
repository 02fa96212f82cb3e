"""Validation inside fit: when it runs, what it leaves alone, and the sanity check that leaves no trace."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback


@pytest.fixture
def validated(Evaluated: Any, make_trainer: Any) -> Any:
    """``validated(train, val, **arguments)``: after which training batches (counted over all epochs) validation ran."""

    def run(train: Any, val: Any, **arguments: Any) -> list[int]:
        ran: list[int] = []

        class Model(Evaluated):  # type: ignore[misc]
            def on_validation_start(self) -> None:
                ran.append(len(self.seen))

        make_trainer(**arguments).fit(Model(), train, val)
        return ran

    return run


# ---- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [4, 8, 12, 16]),
        ({"val_check_interval": 1.0}, [4, 8, 12, 16]),
        ({"val_check_interval": 4}, [4, 8, 12, 16]),
        ({"val_check_interval": 0.5, "max_epochs": 1}, [2, 4]),
        ({"val_check_interval": 0.3, "max_epochs": 1}, [1, 2, 3, 4]),
        ({"val_check_interval": 1, "max_epochs": 1}, [1, 2, 3, 4]),
        ({"val_check_interval": 3, "max_epochs": 2}, [3, 7]),
        ({"check_val_every_n_epoch": 2}, [8, 16]),
        ({"check_val_every_n_epoch": 2, "val_check_interval": 2}, [6, 8, 14, 16]),
        ({"check_val_every_n_epoch": 3}, [12]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 6}, [6, 12]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 6, 9, 12, 15]),
        ({"limit_val_batches": 0}, []),
        ({"limit_train_batches": 3}, [3, 6, 9, 12]),
        ({"limit_train_batches": 3, "val_check_interval": 0.34, "max_epochs": 1}, [1, 2, 3]),
        ({"max_steps": 6}, [4]),
        ({"val_check_interval": timedelta(microseconds=1), "max_epochs": 1}, [1, 2, 3, 4]),
        ({"val_check_interval": timedelta(days=1)}, []),
        ({"val_check_interval": "01:00:00:00"}, []),
        ({"fast_dev_run": 2}, [2]),
    ],
    ids=str,
)
def test_validation_runs_as_often_as_asked(validated: Any, numbers: Any, arguments: Any, expected: list[int]) -> None:
    assert validated(numbers(4), numbers(2), **{"max_epochs": 4, **arguments}) == expected


def test_interval_counts_batches_on_a_stream(validated: Any, stream: Any) -> None:
    assert validated(stream(5), stream(1), max_epochs=2) == [5, 10]
    assert validated(stream(5), stream(1), max_epochs=2, val_check_interval=2) == [2, 4, 7, 9]
    assert validated(stream(5), stream(1), max_epochs=2, val_check_interval=2, check_val_every_n_epoch=None) == [2, 4, 6, 8, 10]


def test_interval_that_cannot_be_kept_is_refused(validated: Any, numbers: Any, stream: Any) -> None:
    with pytest.raises(ValueError, match="val_check_interval=5 is more than the 4 training batches"):
        validated(numbers(4), numbers(1), val_check_interval=5)
    with pytest.raises(MisconfigurationException, match=r"val_check_interval=0\.5 is a fraction"):
        validated(stream(4), numbers(1), val_check_interval=0.5)


def test_fraction_of_an_interval_is_taken_of_the_limited_epoch(validated: Any, numbers: Any) -> None:
    assert validated(numbers(100), numbers(1), limit_train_batches=10, val_check_interval=0.5) == [5, 10]


def test_epoch_of_a_loader_that_gives_less_than_it_says_still_ends_with_validation(validated: Any, Numbers: Any) -> None:
    class Short(torch.utils.data.DataLoader):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Any:
            return iter([torch.zeros(1, 1)] * 4)

    assert validated(Short(Numbers(6)), [torch.zeros(1, 1)], max_epochs=2) == [4, 8]


# ---- what it leaves alone -------------------------------------------------------------------------------------------


def test_every_submodule_is_in_its_mode_again_after_validation(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.trained = nn.Sequential(nn.Dropout()), nn.Sequential(nn.Dropout())
            self.frozen.eval()
            self.modes: list[Any] = []

        def record(self, where: str) -> None:
            self.modes.append((where, self.training, self.frozen[0].training, self.trained[0].training))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.record("train")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.record("val")

    model = Model()
    with pytest.warns(UserWarning, match="eval"):
        make_trainer(val_check_interval=1).fit(model, numbers(2), numbers(1))
    train, val = ("train", True, False, True), ("val", False, False, False)
    assert model.modes == [train, val, train, val]


def test_validation_computes_no_gradients_and_keeps_tensors_usable_in_training(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert not torch.is_grad_enabled()
            self.kept = batch * 2

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            assert torch.is_grad_enabled()
            return self.weight * getattr(self, "kept", batch).mean()

    make_trainer(val_check_interval=1, num_sanity_val_steps=1).fit(Model(), numbers(3), numbers(1, start=1))


def test_validation_loaders_are_asked_for_anew_as_told(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    asked: list[tuple[str, int]] = []

    class Model(Evaluated):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            asked.append(("train", self.current_epoch))
            return numbers(2 + self.current_epoch)

        def val_dataloader(self) -> Any:
            asked.append(("val", self.current_epoch))
            return numbers(1)

    model = Model()
    make_trainer(max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(model)
    assert asked == [("train", 0), ("val", 0), ("train", 2), ("val", 2), ("train", 4), ("val", 4)]
    assert len(model.seen) == 2 + 2 + 4 + 4 + 6


def test_loaders_are_asked_for_once_otherwise(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    asked: list[str] = []

    class Model(Evaluated):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            asked.append("train")
            return numbers(2)

        def val_dataloader(self) -> Any:
            asked.append("val")
            return numbers(1)

    make_trainer(max_epochs=3, num_sanity_val_steps=1).fit(Model())
    assert asked == ["val", "train"]


# ---- the sanity check -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "expected"), [(0, (0, 0)), (2, (2, 2)), (100, (5, 6)), (-1, (5, 6)), (None, (2, 2))])
def test_sanity_check_runs_so_many_batches_of_each_loader(
    Weight: Any, make_trainer: Any, numbers: Any, steps: int | None, expected: tuple[int, int]
) -> None:
    ran: list[int] = []

    class Model(Weight):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            if self.trainer.sanity_checking:
                ran.append(dataloader_idx)

    make_trainer(num_sanity_val_steps=steps).fit(Model(), numbers(1), [numbers(5), numbers(6)])
    assert (ran.count(0), ran.count(1)) == expected


def test_sanity_check_draws_no_random_numbers_and_leaves_no_metrics(Evaluated: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", torch.rand(()) + random.random() + np.random.rand(), prog_bar=True)

        def on_train_start(self) -> None:
            self.drawn = (torch.rand(()).item(), random.random(), np.random.rand())
            self.metrics = (self.trainer.callback_metrics, self.trainer.logged_metrics, self.trainer.progress_bar_metrics)

    def run(steps: int) -> tuple[Any, Any]:
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)
        model, rows = Model(), Rows()
        make_trainer(num_sanity_val_steps=steps, logger=rows, limit_val_batches=3).fit(model, numbers(2), numbers(5, shuffle=False))
        assert model.metrics == ({}, {}, {})
        assert [step for step, _ in rows.rows] == [1]
        return model, rows

    with_check, without = run(3)[0], run(0)[0]
    assert with_check.drawn == without.drawn


def test_sanity_check_that_fails_says_so_before_training(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise RuntimeError("boom")

    model, trainer = Model(), make_trainer(num_sanity_val_steps=1)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(model, numbers(1), numbers(1))
    assert model.seen == []
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_trainer_validates_everything_after_a_fit_with_a_sanity_check(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        fails = True

        def on_train_start(self) -> None:
            if self.fails:
                raise RuntimeError("boom")

    model, trainer = Model(), make_trainer(num_sanity_val_steps=1)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(model, numbers(1), numbers(4))
    assert trainer.validate(model, numbers(4), verbose=False) == [{"val": 1.5}]


def test_callbacks_can_tell_the_sanity_check_from_validation(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[tuple[bool, bool]] = []

    class Look(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((trainer.sanity_checking, trainer.validating))

    make_trainer(num_sanity_val_steps=1, callbacks=[Look()]).fit(Evaluated(), numbers(1), numbers(1))
    assert seen == [(True, False), (False, True)]
