"""What the module offers to those who optimize by hand, and the hooks that change how the trainer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule

MakeTrainer = Callable[..., Any]


def ones(count: int = 1) -> DataLoader[Tensor]:
    return DataLoader(torch.ones(count, 1))  # type: ignore[arg-type]


# ---- toggling --------------------------------------------------------------------------------------------------------


class Two(LightningModule):
    """Two optimizers with a part of their own each, and one that they share; ``b``'s bias is frozen."""

    def __init__(self, action: Callable[[Any], Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b, self.shared = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
        self.b.bias.requires_grad = False
        self.action = action

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.action(self)

    def configure_optimizers(self) -> Any:
        return [SGD([*part.parameters(), *self.shared.parameters()], lr=0.1) for part in (self.a, self.b)]

    @property
    def live(self) -> str:
        """Which parameters require gradients: weight and bias of each part."""
        return "".join(str(int(p.requires_grad)) for part in (self.a, self.b, self.shared) for p in part.parameters())


def run(make_trainer: MakeTrainer, action: Callable[[Any, Any, Any], Any]) -> None:
    """Call ``action(model, first optimizer, second optimizer)`` in a training step."""
    make_trainer().fit(Two(lambda model: action(model, *model.optimizers())), ones())


BEFORE, FIRST, SECOND = "111011", "110011", "001011"


def test_toggling_leaves_gradients_to_one_optimizer_and_untoggling_restores_them(make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        for optimizer, live in ((first, FIRST), (second, SECOND)):
            model.toggle_optimizer(optimizer)
            assert model.live == live
            model.untoggle_optimizer(optimizer)
            assert model.live == BEFORE

    run(make_trainer, check)


def test_toggling_takes_plain_optimizers_too(make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        model.toggle_optimizer(first.optimizer)
        assert model.live == FIRST
        model.untoggle_optimizer(first.optimizer)
        assert model.live == BEFORE

    run(make_trainer, check)


@pytest.mark.parametrize("sync_grad", [True, False])
def test_toggling_as_a_context_ends_with_it_whatever_happens(sync_grad: bool, make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        for context in (lambda: model.toggled_optimizer(first), lambda: first.toggle_model(sync_grad=sync_grad)):
            with context():
                assert model.live == FIRST
            assert model.live == BEFORE
            with pytest.raises(ZeroDivisionError), context():
                1 / 0  # noqa: B018
            assert model.live == BEFORE

    run(make_trainer, check)


def test_what_is_frozen_while_toggled_stays_frozen(make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        model.toggle_optimizer(first)
        model.a.bias.requires_grad = False
        model.untoggle_optimizer(first)
        assert model.live == "101011"

    run(make_trainer, check)


def test_toggling_the_next_without_untoggling_the_first_trains_the_next(make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        model.toggle_optimizer(first)
        model.toggle_optimizer(second)
        assert model.live == SECOND
        model.untoggle_optimizer(second)
        assert model.live == BEFORE

    run(make_trainer, check)


def test_untoggling_what_was_not_toggled_changes_nothing(make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        model.untoggle_optimizer(first)
        assert model.live == BEFORE

    run(make_trainer, check)


def test_an_optimizer_of_ones_own_can_be_toggled(make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        own = nn.Parameter(torch.ones(1))
        with model.toggled_optimizer(SGD([own], lr=1.0)):
            assert model.live == "000000"
            assert own.requires_grad
        assert model.live == BEFORE

    run(make_trainer, check)


def test_backward_while_toggled_gives_gradients_to_one_alone(make_trainer: MakeTrainer) -> None:
    def check(model: Any, first: Any, second: Any) -> None:
        with first.toggle_model():
            model.manual_backward(model.b(model.a(torch.ones(1, 1))).sum())
        assert model.a.weight.grad is not None
        assert model.b.weight.grad is None

    run(make_trainer, check)


# ---- optimizers and schedulers ---------------------------------------------------------------------------------------


class One(LightningModule):
    """One weight, of value 1, whose gradient is 4 times the batch."""

    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.automatic_optimization = automatic

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return (4 * self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        return SGD([self.weight], lr=1.0)


@pytest.mark.parametrize(("count", "expected"), [(0, "NoneType"), (1, "StepLR"), (2, "list")])
def test_schedulers_come_as_none_one_or_a_list(count: int, expected: str, make_trainer: MakeTrainer) -> None:
    seen: list[str] = []

    class Model(One):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            seen.append(type(self.lr_schedulers()).__name__)

        def configure_optimizers(self) -> Any:
            optimizer = SGD([self.weight], lr=1.0)
            return [optimizer], [StepLR(optimizer, 1) for _ in range(count)]

    make_trainer().fit(Model(automatic=False), ones())
    assert seen == [expected]


def test_the_override_of_lr_scheduler_step_gets_scheduler_and_metric(make_trainer: MakeTrainer) -> None:
    calls: list[Any] = []

    class Model(One):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            calls.append((type(scheduler), None if metric is None else float(metric)))
            super().lr_scheduler_step(scheduler, metric)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("loss", 2.0)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = SGD([self.weight], lr=1.0)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": StepLR(optimizer, 1), "interval": "step"}, {"scheduler": plateau, "monitor": "loss"}]

    model, trainer = Model(), make_trainer()
    trainer.fit(model, ones(2))
    assert calls == [(StepLR, None), (StepLR, None), (torch.optim.lr_scheduler.ReduceLROnPlateau, 2.0)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


# ---- manual optimization ---------------------------------------------------------------------------------------------


def test_manual_backward_runs_the_hooks_around_it(make_trainer: MakeTrainer) -> None:
    calls: list[str] = []

    class Model(One):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            assert self.weight.grad is not None
            calls.append(f"gradient {self.weight.grad.item()}")

        def on_before_backward(self, loss: Tensor) -> None:
            calls.append("before")

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            calls.append(f"backward {kwargs}")
            super().backward(loss, *args, **kwargs)

        def on_after_backward(self) -> None:
            calls.append("after")

    make_trainer().fit(Model(automatic=False), ones())
    assert calls == ["before", "backward {'retain_graph': True}", "after", "before", "backward {}", "after", "gradient 8.0"]


def test_manual_backward_is_for_manual_optimization(make_trainer: MakeTrainer) -> None:
    class Model(One):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.manual_backward(self.weight.sum())

    message = r"`manual_backward` belongs to manual optimization.* set `self.automatic_optimization = False` in its `__init__`"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer().fit(Model(), ones())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"gradient_clip_val": 1.0}, "call `self.clip_gradients`"), ({"accumulate_grad_batches": 2}, "step every n batches")],
)
def test_arguments_about_gradients_are_refused_in_manual_optimization(arguments: Any, named: str, make_trainer: MakeTrainer) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(MisconfigurationException, match=rf"`Trainer\({name}={value}\)` has no effect in manual optimization.*{named}"):
        make_trainer(**arguments).fit(One(automatic=False), ones())


# ---- clipping --------------------------------------------------------------------------------------------------------


def clipped(make_trainer: MakeTrainer, call: Callable[[Any, Any], None], **arguments: Any) -> float:
    """The gradient, of 4, after ``call(model, optimizer)`` in ``configure_gradient_clipping``."""
    seen: list[float] = []

    class Model(One):
        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
            call(self, optimizer)
            assert self.weight.grad is not None
            seen.append(self.weight.grad.item())

    make_trainer(**arguments).fit(Model(), ones())
    return seen[0]


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        ({}, {}, 4.0),
        ({}, {"gradient_clip_val": 0.5}, 0.5),
        ({}, {"gradient_clip_val": 3, "gradient_clip_algorithm": "value"}, 3.0),
        ({"gradient_clip_val": 0.5}, {}, 0.5),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, {}, 0.5),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "NORM"}, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}, 0.5),
        ({"gradient_clip_val": 0}, {}, 4.0),
    ],
)
def test_clipping_takes_what_is_given_else_the_trainers(given: Any, arguments: Any, expected: float, make_trainer: MakeTrainer) -> None:
    found = clipped(make_trainer, lambda model, optimizer: model.clip_gradients(optimizer, **given), **arguments)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"gradient_clip_val": 1.0}, {"gradient_clip_val": 2.0}),
        ({"gradient_clip_algorithm": "norm"}, {"gradient_clip_val": 2.0, "gradient_clip_algorithm": "value"}),
    ],
)
def test_clipping_otherwise_than_the_trainer_is_refused(given: Any, arguments: Any, make_trainer: MakeTrainer) -> None:
    ((name, value),) = given.items()
    message = rf"`clip_gradients\({name}={value!r}\)` contradicts `Trainer\({name}=.*{arguments[name]}.*\)`: set it in one place only"
    with pytest.raises(MisconfigurationException, match=message):
        clipped(make_trainer, lambda model, optimizer: model.clip_gradients(optimizer, **given), **arguments)


def test_an_unknown_algorithm_of_clipping_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(MisconfigurationException, match="`gradient_clip_algorithm` is 'median'; accepted are 'norm' and 'value'"):
        clipped(make_trainer, lambda model, optimizer: model.clip_gradients(optimizer, 1.0, "median"))


def test_in_manual_optimization_clipping_is_called_by_hand(make_trainer: MakeTrainer) -> None:
    class Model(One):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, gradient_clip_val=0.25, gradient_clip_algorithm="norm")
            optimizer.step()

    model = Model(automatic=False)
    make_trainer().fit(model, ones())
    assert model.weight.item() == pytest.approx(0.75)


def test_the_override_of_clipping_gets_the_trainers_arguments(make_trainer: MakeTrainer) -> None:
    calls: list[Any] = []

    class Model(One):
        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
            calls.append((isinstance(optimizer, SGD), gradient_clip_val, gradient_clip_algorithm))

    make_trainer().fit(Model(), ones())
    make_trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value").fit(Model(), ones())
    assert calls == [(True, None, None), (True, 0.5, "value")]


# ---- overrides of the automatic step ---------------------------------------------------------------------------------


def test_overrides_of_zero_grad_and_backward_take_the_trainers_place(make_trainer: MakeTrainer) -> None:
    calls: list[Any] = []

    class Model(One):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            calls.append(("zero_grad", epoch, batch_idx))
            optimizer.zero_grad(set_to_none=False)

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            calls.append(("backward", loss.item()))
            (2 * loss).backward()

    model = Model()
    make_trainer().fit(model, ones())
    assert calls == [("zero_grad", 0, 0), ("backward", 4.0)]
    assert model.weight.item() == -7.0
