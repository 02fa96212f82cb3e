"""The wrapper around an optimizer: it is the optimizer to all who look, and its step goes another way."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer


def adam(lr: float = 0.1) -> Adam:
    optimizer = Adam([nn.Parameter(torch.ones(2))], lr=lr)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    return optimizer


# ---- it stands where the wrapped one can -----------------------------------------------------------------------------


def test_it_is_an_instance_of_the_wrapped_class() -> None:
    optimizer = adam()
    wrapper: Any = LightningOptimizer(optimizer)
    assert isinstance(wrapper, Adam)
    assert isinstance(wrapper, Optimizer)
    assert isinstance(wrapper, LightningOptimizer)
    assert type(wrapper).__name__ == "LightningAdam"
    assert wrapper.optimizer is optimizer
    assert repr(wrapper).startswith("LightningAdam")


def test_attributes_are_the_wrapped_ones_in_both_directions() -> None:
    optimizer = adam()
    wrapper: Any = LightningOptimizer(optimizer)
    assert wrapper.param_groups is optimizer.param_groups
    assert wrapper.state is optimizer.state
    assert wrapper.defaults is optimizer.defaults
    wrapper.param_groups[0]["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups = []
    assert wrapper.param_groups == []
    wrapper.param_groups = [{"params": [], "lr": 1.0}]
    assert optimizer.param_groups == [{"params": [], "lr": 1.0}]
    wrapper.mine = 3
    assert optimizer.mine == 3  # type: ignore[attr-defined]
    del wrapper.mine
    assert not hasattr(optimizer, "mine")


def test_an_attribute_that_is_not_there_is_reported_as_the_wrapped_ones() -> None:
    wrapper: Any = LightningOptimizer(adam())
    assert not hasattr(wrapper, "nothing")
    with pytest.raises(AttributeError, match="'Adam' object has no attribute 'nothing'"):
        wrapper.nothing  # noqa: B018


def test_a_state_loaded_through_it_reaches_the_wrapped_one() -> None:
    trained = adam(lr=0.3)
    trained.step()
    optimizer = adam()
    wrapper: Any = LightningOptimizer(optimizer)
    wrapper.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.3
    (state,) = optimizer.state.values()
    assert state["step"] == 1
    assert wrapper.state_dict() == optimizer.state_dict()


def test_a_state_loaded_into_the_wrapped_one_is_seen_through_it() -> None:
    trained = adam(lr=0.3)
    trained.step()
    optimizer = adam()
    wrapper: Any = LightningOptimizer(optimizer)
    optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert wrapper.param_groups[0]["lr"] == 0.3
    assert len(wrapper.state) == 1


def test_methods_act_on_the_wrapped_one() -> None:
    optimizer = adam()
    wrapper: Any = LightningOptimizer(optimizer)
    wrapper.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 2.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 2.0]
    wrapper.zero_grad()
    assert optimizer.param_groups[0]["params"][0].grad is None
    calls = []
    wrapper.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["post"]


def test_it_is_copied_and_pickled_with_the_wrapped_one() -> None:
    optimizer = adam()
    optimizer.step()
    for duplicate in (copy.deepcopy(LightningOptimizer(optimizer)), pickle.loads(pickle.dumps(LightningOptimizer(optimizer)))):
        assert type(duplicate).__name__ == "LightningAdam"
        assert duplicate.optimizer is not optimizer
        assert len(duplicate.state) == 1


def test_it_can_be_referred_to_weakly() -> None:
    wrapper = LightningOptimizer(adam())
    assert weakref.ref(wrapper)() is wrapper


# ---- stepping --------------------------------------------------------------------------------------------------------


def test_its_step_goes_where_it_was_told() -> None:
    calls: list[Any] = []

    def through(optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any) -> str:
        calls.append((optimizer, closure(), kwargs))
        return "stepped"

    optimizer = adam()
    wrapper = LightningOptimizer(optimizer, through)
    assert wrapper.step(lambda: 5, extra=1) == "stepped"
    assert wrapper.step() == "stepped"
    assert calls == [(optimizer, 5, {"extra": 1}), (optimizer, None, {})]


def test_without_a_trainer_it_steps_the_wrapped_one() -> None:
    optimizer = adam()
    LightningOptimizer(optimizer).step()
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize("closure", [3, "closure", torch.ones(1)])
def test_a_closure_that_cannot_be_called_is_refused(closure: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"`optimizer\.step\(closure\)` got .*; a function without arguments is needed"):
        LightningOptimizer(adam()).step(closure)


def test_toggling_needs_a_trainer() -> None:
    with (
        pytest.raises(RuntimeError, match=r"optimizers that a trainer has wrapped: get them from `self\.optimizers\(\)`"),
        LightningOptimizer(adam()).toggle_model(),
    ):
        pass


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_of_the_users_unscales_through_it(fused: bool) -> None:
    weight = nn.Parameter(torch.ones(1))
    wrapper: Any = LightningOptimizer(SGD([weight], lr=0.5, fused=fused))
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale((3 * weight).sum()).backward()
    scaler.step(wrapper)
    scaler.update()
    assert weight.item() == pytest.approx(1 - 0.5 * 3)
    assert not hasattr(wrapper.optimizer, "grad_scale")


def test_a_grad_scaler_skips_a_step_that_overflowed() -> None:
    weight = nn.Parameter(torch.ones(1))
    wrapper: Any = LightningOptimizer(SGD([weight], lr=0.5))
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale((float("inf") * weight).sum()).backward()
    scaler.unscale_(wrapper)
    scaler.step(wrapper)
    assert weight.item() == 1


@pytest.mark.filterwarnings("error")
def test_schedulers_take_it_for_an_optimizer() -> None:
    optimizer = adam(lr=1.0)
    wrapper: Any = LightningOptimizer(optimizer)
    scheduler = StepLR(wrapper, 1)
    wrapper.step()
    scheduler.step()  # would warn if it had not seen the step
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    cycle = OneCycleLR(wrapper, max_lr=2.0, total_steps=4)
    wrapper.step()
    cycle.step()
    assert optimizer.param_groups[0]["lr"] == cycle.get_last_lr()[0]
    assert scheduler.optimizer is wrapper


# ---- in a run --------------------------------------------------------------------------------------------------------


class Manual(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.automatic_optimization = False
        self.seen: list[Any] = []

    def configure_optimizers(self) -> Any:
        return SGD([self.weight], lr=1.0)


def test_a_step_returns_what_the_closure_does_and_counts(make_trainer: Callable[..., Any]) -> None:
    class Model(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Any:
                optimizer.zero_grad()
                loss = self.weight.sum()
                self.manual_backward(loss)
                return loss

            self.seen += [optimizer.step(closure).item(), optimizer.step(), self.global_step, self.weight.item()]

    model = Model()
    make_trainer().fit(model, DataLoader(range(1)))
    assert model.seen == [1.0, None, 2, -1.0]


def test_keywords_of_a_step_reach_the_wrapped_one(make_trainer: Callable[..., Any]) -> None:
    class Counting(SGD):
        extra = 0

        def step(self, closure: Any = None, extra: int = 0) -> Any:  # type: ignore[override]
            self.extra = extra
            return super().step(closure)

    class Model(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step(extra=5)
            self.seen.append(self.optimizers().extra)

        def configure_optimizers(self) -> Any:
            return Counting([self.weight], lr=1.0)

    model = Model()
    make_trainer().fit(model, DataLoader(range(1)))
    assert model.seen == [5]


def test_a_scheduler_made_of_it_during_a_run_steps(make_trainer: Callable[..., Any]) -> None:
    class Model(Manual):
        def on_train_start(self) -> None:
            self.scheduler = StepLR(self.optimizers(), 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.weight.sum() * 0)
            optimizer.step()
            self.scheduler.step()
            self.seen.append(optimizer.param_groups[0]["lr"])

    model = Model()
    trainer = make_trainer()
    trainer.fit(model, DataLoader(range(2)))
    assert model.seen == pytest.approx([0.1, 0.01])
    assert trainer.global_step == 2


def test_the_override_of_optimizer_step_gets_it(make_trainer: Callable[..., Any]) -> None:
    class Model(Manual):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.weight.sum()

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            self.seen.append((epoch, batch_idx, type(optimizer).__name__, optimizer is self.optimizers()))
            optimizer.step(optimizer_closure)

    model = Model()
    make_trainer().fit(model, DataLoader(range(2)))
    assert model.seen == [(0, 0, "LightningSGD", True), (0, 1, "LightningSGD", True)]
    assert model.weight.item() == -1.0


def test_the_plain_ones_are_there_on_request(make_trainer: Callable[..., Any]) -> None:
    class Model(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            plain = self.optimizers(use_pl_optimizer=False)
            self.seen.append((type(plain), self.optimizers().optimizer is plain, self.trainer.optimizers[0] is plain))

    model = Model()
    make_trainer().fit(model, DataLoader(range(1)))
    assert model.seen == [(SGD, True, True)]
