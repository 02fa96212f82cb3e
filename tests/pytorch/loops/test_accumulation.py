"""Gradients of an accumulation window are the mean over the batches that are in it, whatever ends the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader


@pytest.fixture
def Stepping(Weight: Any) -> Any:
    """A model that keeps the gradient of each update, which is the mean of the numbers in the window."""

    class Stepping(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.updates: list[float] = []

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.updates.append(self.weight.grad.item())

    return Stepping


class Loader:
    """Gives as many batches as it likes, whatever its ``len`` says."""

    def __init__(self, count: int, says: int | None) -> None:
        self.count, self.says = count, says

    def __iter__(self) -> Any:
        return (torch.tensor([float(number)]) for number in range(self.count))

    def __len__(self) -> int:
        if self.says is None:
            raise TypeError
        return self.says


@pytest.mark.parametrize(
    ("count", "window", "means"),
    [
        (4, 2, [0.5, 2.5]),
        (5, 2, [0.5, 2.5, 4.0]),
        (7, 3, [1.0, 4.0, 6.0]),
        (8, 3, [1.0, 4.0, 6.5]),
        (3, 5, [1.0]),
        (1, 2, [0.0]),
    ],
)
@pytest.mark.parametrize("kind", ["sized", "unsized", "plain iterable", "says too many", "limited", "limited stream", "combined"])
def test_each_update_is_the_mean_of_its_window(
    Stepping: Any, make_trainer: Any, numbers: Any, stream: Any, kind: str, count: int, window: int, means: list[float]
) -> None:
    loaders = {
        "sized": lambda: numbers(count),
        "unsized": lambda: stream(count),
        "plain iterable": lambda: Loader(count, None),
        "says too many": lambda: Loader(count, count + 2),
        "limited": lambda: numbers(count + 3),
        "limited stream": lambda: stream(count + 3),
        "combined": lambda: CombinedLoader([numbers(count)], "max_size"),
    }

    class Model(Stepping):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.weight * (batch[0] if isinstance(batch, list) else batch).mean()

    model = Model()
    limit = count if kind.startswith("limited") else None
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=window, limit_train_batches=limit)
    trainer.fit(model, loaders[kind]())
    assert model.updates == pytest.approx(means * 2)
    assert model.weight.item() == pytest.approx(-2 * sum(means))
    assert trainer.global_step == 2 * len(means)


def test_windows_begin_anew_in_each_epoch(Stepping: Any, make_trainer: Any, numbers: Any) -> None:
    model = Stepping()
    make_trainer(max_epochs=3, accumulate_grad_batches=4).fit(model, numbers(6))
    assert model.updates == [1.5, 4.5] * 3


@pytest.mark.parametrize("loader", ["numbers", "stream"])
def test_window_changes_from_epoch_to_epoch(Stepping: Any, make_trainer: Any, loader: str, request: pytest.FixtureRequest) -> None:
    model = Stepping()
    trainer = make_trainer(max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 2, 1: 1, 2: 3})])
    trainer.fit(model, request.getfixturevalue(loader)(4))
    assert model.updates == pytest.approx([0.5, 2.5, 0.0, 1.0, 2.0, 3.0, 1.0, 3.0])
    assert trainer.global_step == 8


def test_window_set_by_a_callback_counts_from_the_epoch_that_starts(Stepping: Any, make_trainer: Any, numbers: Any) -> None:
    class Change(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = trainer.current_epoch + 1

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.accumulate_grad_batches = 100  # too late for this epoch

    model = Stepping()
    make_trainer(max_epochs=2, callbacks=[Change()]).fit(model, numbers(4))
    assert model.updates == [0.0, 1.0, 2.0, 3.0, 0.5, 2.5]


def test_gradients_survive_a_validation_inside_the_window(Stepping: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Stepping):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert not torch.is_grad_enabled()

    model = Model()
    make_trainer(accumulate_grad_batches=4, val_check_interval=1).fit(model, numbers(8), numbers(1))
    assert model.updates == [1.5, 5.5]


def test_gradients_of_a_window_are_zeroed_on_its_first_batch(Stepping: Any, make_trainer: Any, numbers: Any) -> None:
    zeroed: list[int] = []

    class Model(Stepping):  # type: ignore[misc]
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            zeroed.append(batch_idx)
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    make_trainer(accumulate_grad_batches=3).fit(Model(), numbers(7))
    assert zeroed == [0, 3, 6]


def test_batch_that_is_skipped_leaves_the_others_of_its_window(Stepping: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Stepping):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

    model = Model()
    with pytest.warns(UserWarning, match="returned None"):
        make_trainer(accumulate_grad_batches=2).fit(model, numbers(6))
    assert model.updates == [0.5, 1.0, 4.5]  # 1/2, 2/2, (4 + 5)/2


def test_epoch_that_is_cut_short_inside_a_window_leaves_no_gradients_behind(Stepping: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Stepping):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    model = Model()
    make_trainer(max_epochs=2, accumulate_grad_batches=2).fit(model, numbers(6))
    assert model.updates == [0.5, 0.5]


def test_learning_rates_and_losses_of_the_outputs_are_not_divided(Stepping: Any, make_trainer: Any, numbers: Any) -> None:
    losses: list[float] = []

    class Model(Stepping):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.weight * 0.0 + batch.mean()

        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            losses.append(outputs["loss"].item())

    make_trainer(accumulate_grad_batches=2).fit(Model(), numbers(4))
    assert losses == [0.0, 1.0, 2.0, 3.0]


def test_clipping_sees_the_gradients_of_the_whole_window(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model = Weight()
    make_trainer(accumulate_grad_batches=2, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(model, numbers(4))
    assert model.weight.item() == -1.5  # 0.5 as it is, 2.5 clipped


@pytest.mark.parametrize("count", [5, 6])
def test_loader_of_exact_length_with_a_sampler_of_its_own_is_not_divided_wrongly(
    Stepping: Any, make_trainer: Any, Numbers: Any, count: int
) -> None:
    class Buckets:
        """A batch sampler that promises more batches than it gives."""

        def __iter__(self) -> Any:
            return ([number] for number in range(count))

        def __len__(self) -> int:
            return 8

    model = Stepping()
    make_trainer(accumulate_grad_batches=4).fit(model, DataLoader(Numbers(8), batch_sampler=Buckets()))  # type: ignore[arg-type]
    assert model.updates == pytest.approx([1.5, sum(range(4, count)) / (count - 4)])
