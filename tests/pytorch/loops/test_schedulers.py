"""When learning rate schedulers step, and what those see that watch a metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau, StepLR

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback


@pytest.fixture
def rates(Evaluated: Any, make_trainer: Any, numbers: Any) -> Any:
    """``rates(settings, ...)``: the exponent of the rate (which each step multiplies by a tenth) that each batch was trained with."""

    def run(settings: dict[str, Any], batches: int = 4, scheduler: Any = None, model: Any = Evaluated, **arguments: Any) -> list[int]:
        used: list[int] = []

        class Model(model):  # type: ignore[misc]
            def training_step(self, batch: Tensor, batch_idx: int) -> Any:
                used.append(round(-torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"]).log10().item()))
                return super().training_step(batch, batch_idx) * 0.0

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                made = ExponentialLR(optimizer, 0.1) if scheduler is None else scheduler(optimizer)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, **settings}}

        make_trainer(**{"max_epochs": 2, **arguments}).fit(Model(), numbers(batches), numbers(1))
        return used

    return run


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({}, {}, [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 3}, [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]),
        ({"interval": "step"}, {}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"interval": "step", "frequency": 3}, {}, [0, 0, 0, 1, 1, 1, 2, 2]),
        ({"interval": "step"}, {"accumulate_grad_batches": 2}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"interval": "step"}, {"accumulate_grad_batches": 3}, [0, 0, 0, 1, 2, 2, 2, 3]),
        ({"interval": "step", "frequency": 2}, {"accumulate_grad_batches": 2}, [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"interval": "epoch"}, {"limit_train_batches": 2, "max_epochs": 3}, [0, 0, 1, 1, 2, 2]),
        ({"interval": "epoch"}, {"max_steps": 6}, [0, 0, 0, 0, 1, 1]),
    ],
)
def test_scheduler_steps_by_epochs_or_optimizer_steps(rates: Any, settings: Any, arguments: Any, expected: list[int]) -> None:
    assert rates(settings, **arguments) == expected


def test_scheduler_steps_before_the_batch_end_and_before_validation_and_saving(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    seen: dict[str, list[float]] = {"on_train_batch_end": [], "on_validation_start": [], "on_train_epoch_end": []}

    class Model(Evaluated):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]

    def look(name: str) -> Any:
        return lambda self, trainer, *args: seen[name].append(trainer.optimizers[0].param_groups[0]["lr"])

    Look = type("Look", (Callback,), {name: look(name) for name in seen})
    make_trainer(max_epochs=2, callbacks=[Look()]).fit(Model(), numbers(2), numbers(1))
    assert seen == {"on_train_batch_end": [1.0, 0.5, 0.5, 0.25], "on_validation_start": [0.5, 0.25], "on_train_epoch_end": [0.5, 0.25]}


def test_several_schedulers_step_each_in_its_way(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Counting(LRScheduler):
        steps = -1  # torch takes the first itself

        def step(self, *args: Any) -> None:
            self.steps += 1
            super().step(*args)

        def get_lr(self) -> list[float]:
            return [group["lr"] for group in self.optimizer.param_groups]

    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            self.by = [Counting(optimizer) for _ in range(3)]
            return [optimizer], [self.by[0], {"scheduler": self.by[1], "interval": "step"}, {"scheduler": self.by[2], "frequency": 2}]

    model = Model()
    make_trainer(max_epochs=3).fit(model, numbers(4))
    assert [scheduler.steps for scheduler in model.by] == [3, 12, 1]


def test_manual_optimization_steps_its_own_schedulers(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.optimizers().step()
            if self.trainer.is_last_batch:
                self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [{"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "step"}]

    trainer = make_trainer(max_epochs=2)
    trainer.fit(Model(), numbers(4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_lr_scheduler_step_may_be_overridden(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    calls: list[Any] = []

    class Own:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def advance(self) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] /= 2

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [Own(optimizer)]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            calls.append(metric)
            scheduler.advance()

    trainer = make_trainer(max_epochs=2)
    trainer.fit(Model(), numbers(2))
    assert calls == [None, None]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25


# ---- ReduceLROnPlateau ----------------------------------------------------------------------------------------------


def plateau(optimizer: Any) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.1, patience=0)


@pytest.mark.parametrize("where", ["validation_step", "on_validation_epoch_end", "on_train_epoch_end", "training_step", "callback"])
def test_plateau_sees_the_metric_of_this_epoch_wherever_it_is_logged(Evaluated: Any, rates: Any, where: str) -> None:
    scores = [3.0, 4.0, 5.0, 1.0, 2.0]  # worse in epochs 1, 2 and 4

    class Model(Evaluated):  # type: ignore[misc]
        def score(self, name: str) -> None:
            if name == where:
                self.log("score", scores[self.current_epoch], on_epoch=True, on_step=False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.score("training_step")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.score("validation_step")

        def on_validation_epoch_end(self) -> None:
            self.score("on_validation_epoch_end")

        def on_train_epoch_end(self) -> None:
            self.score("on_train_epoch_end")

    class Logging(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.score("callback")

    assert rates({"monitor": "score"}, 1, plateau, Model, max_epochs=5, callbacks=[Logging()]) == [0, 0, 1, 2, 2]


def test_plateau_by_steps_sees_the_value_of_each_step(Evaluated: Any, rates: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("score", [1.0, 2.0, 0.5, 3.0][batch_idx])
            return super().training_step(batch, batch_idx)

    assert rates({"monitor": "score", "interval": "step"}, 4, plateau, Model, max_epochs=1) == [0, 0, 1, 1]


def test_plateau_with_a_frequency_waits_for_its_epochs(Evaluated: Any, rates: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("score", float(self.current_epoch))

    arguments = {"max_epochs": 6, "check_val_every_n_epoch": 2}
    assert rates({"monitor": "score", "frequency": 2}, 1, plateau, Model, **arguments) == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_metric_that_was_never_logged_is_an_error_with_what_there_is(rates: Any, interval: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"watches 'other', which was not logged"):
        rates({"monitor": "other", "interval": interval}, 2, plateau)


def test_metric_that_was_never_logged_is_a_warning_where_not_strict(rates: Any) -> None:
    with pytest.warns(RuntimeWarning, match="watches 'other'"):
        assert rates({"monitor": "other", "strict": False}, 1, plateau, max_epochs=3) == [0, 0, 0]


def test_plateau_on_the_validation_metric_of_another_epoch_is_told(Evaluated: Any, rates: Any) -> None:
    """Validation comes only every second epoch: in the first one there is no metric yet."""
    with pytest.raises(MisconfigurationException, match="watches 'val'"):
        rates({"monitor": "val"}, 1, plateau, Evaluated, max_epochs=2, check_val_every_n_epoch=2)
