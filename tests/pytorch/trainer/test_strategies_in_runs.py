"""Strategies, precisions and accelerators of one's own: the trainer asks them wherever they have a say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.precision import Precision
from lightning.fabric.strategies import SingleDeviceStrategy, Strategy

MakeTrainer = Callable[..., Any]


def noting(base: type, *names: str) -> tuple[Any, list[str]]:
    """An instance of a class whose methods of these names note that they were called, and do what those of ``base`` do."""
    calls: list[str] = []

    def method(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(base, name)(self, *args, **kwargs)

        return call

    return type("Noting", (base,), {name: method(name) for name in names})(), calls


# ---- strategies ------------------------------------------------------------------------------------------------------


def test_a_strategy_of_ones_own_is_asked_at_each_turn(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    strategy, calls = noting(
        SingleDeviceStrategy, "setup_environment", "connect", "setup_module", "setup_optimizer", "process_dataloader", "batch_to_device",
        "bind", "no_backward_sync", "backward", "clip_gradients", "optimizer_step", "teardown",
    )  # fmt: skip
    model = Weight()
    trainer = make_trainer(strategy=strategy, gradient_clip_val=0.5, accumulate_grad_batches=2)
    trainer.fit(model, numbers(2, start=1))
    step = ["batch_to_device", "no_backward_sync", "backward", "batch_to_device", "optimizer_step", "backward", "clip_gradients"]
    assert [name for name in calls if name in step] == step
    assert {"setup_environment", "connect", "setup_module", "setup_optimizer", "process_dataloader", "bind", "teardown"} <= set(calls)
    assert trainer.strategy is strategy
    assert model.weight.item() == pytest.approx(-0.5, rel=1e-4)


def test_a_strategy_without_any_override_trains_like_the_built_in_one(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    class Own(Strategy):
        pass

    weights = []
    for strategy in (Own(), SingleDeviceStrategy(), "auto"):
        model = Weight()
        make_trainer(strategy=strategy).fit(model, numbers())
        weights.append(model.weight.item())
    assert weights == [-6.0] * 3


def test_checkpoints_go_through_the_strategy(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    strategy, calls = noting(SingleDeviceStrategy, "save_checkpoint", "load_checkpoint", "load_optimizer_state", "barrier")
    trainer = make_trainer(strategy=strategy)
    trainer.fit(Weight(), numbers())
    trainer.save_checkpoint("a.ckpt")
    assert "save_checkpoint" in calls
    trainer = make_trainer(strategy=strategy, max_epochs=2)
    trainer.fit(Weight(), numbers(), ckpt_path="a.ckpt")
    assert {"load_checkpoint", "load_optimizer_state"} <= set(calls)
    assert trainer.current_epoch == 2


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_evaluation_goes_through_the_strategy(function: str, make_trainer: MakeTrainer, Evaluated: Any, numbers: Any) -> None:
    strategy, calls = noting(SingleDeviceStrategy, "setup_module", "process_dataloader", "batch_to_device", "bind", "teardown")
    getattr(make_trainer(strategy=strategy), function)(Evaluated(), numbers(2))
    assert calls == ["setup_module", "process_dataloader", "bind", "batch_to_device", "batch_to_device", "teardown"]


def test_a_failed_run_tears_the_strategy_down_too(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    strategy, calls = noting(SingleDeviceStrategy, "teardown")

    class Fails(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        make_trainer(strategy=strategy).fit(Fails(), numbers())
    assert calls == ["teardown"]


# ---- precisions ------------------------------------------------------------------------------------------------------


def test_a_precision_of_ones_own_is_asked_at_each_turn(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    precision, calls = noting(
        Precision, "convert_module", "convert_input", "train_step_context", "pre_backward", "backward", "post_backward",
        "unscale_gradients", "clip_grad_by_norm", "optimizer_step", "teardown",
    )  # fmt: skip
    model = Weight()
    make_trainer(plugins=precision, gradient_clip_val=0.5).fit(model, numbers(1, start=1))
    step = ["convert_input", "optimizer_step", "train_step_context", "pre_backward", "backward", "post_backward"]
    assert [name for name in calls if name in step] == step
    assert {"convert_module", "unscale_gradients", "clip_grad_by_norm", "teardown"} <= set(calls)
    assert model.weight.item() == pytest.approx(-0.5, rel=1e-4)


def test_the_forward_context_of_a_precision_holds_in_every_step(make_trainer: MakeTrainer, Evaluated: Any, numbers: Any) -> None:
    inside: list[bool] = []

    class Own(Precision):
        active = False

        @contextmanager
        def forward_context(self) -> Any:
            self.active = True
            yield
            self.active = False

    own = Own()

    class Model(Evaluated):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            inside.append(own.active)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            inside.append(own.active)

        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            inside.append(own.active)
            return batch

    model, trainer = Model(), make_trainer(plugins=[own])
    trainer.fit(model, numbers(1), numbers(1))
    trainer.predict(model, numbers(1))
    assert inside == [True, True, True]
    assert not own.active


# ---- accelerators ----------------------------------------------------------------------------------------------------


def test_an_accelerator_of_ones_own_is_made_ready_and_torn_down(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    accelerator, calls = noting(CPUAccelerator, "setup_device", "teardown")
    trainer = make_trainer(accelerator=accelerator)
    trainer.fit(Weight(), numbers())
    assert trainer.accelerator is accelerator
    assert calls == ["setup_device", "teardown"]


# ---- modules made where the run will be ------------------------------------------------------------------------------


@pytest.mark.parametrize("empty_init", [None, False, True])
def test_init_module_makes_a_module_in_the_runs_precision(empty_init: bool | None, make_trainer: MakeTrainer, Weight: Any) -> None:
    with make_trainer(precision="bf16-true").init_module(empty_init=empty_init):
        model = Weight()
        layer = torch.nn.Linear(2, 2)
    assert (model.weight.dtype, model.dtype, layer.weight.dtype) == (torch.bfloat16,) * 3
    assert torch.get_default_dtype() is torch.float32


def test_init_module_makes_a_module_on_the_runs_device(make_trainer: MakeTrainer, Weight: Any) -> None:
    with make_trainer(strategy=SingleDeviceStrategy("meta", CPUAccelerator()), accelerator="auto").init_module():
        assert Weight().device.type == "meta"
    assert Weight().device.type == "cpu"


def test_a_module_made_in_configure_model_is_in_the_runs_precision(make_trainer: MakeTrainer, Weight: Any, numbers: Any) -> None:
    class Late(Weight):  # type: ignore[misc]
        def configure_model(self) -> None:
            self.layer = torch.nn.Linear(1, 1)
            self.made_in = self.layer.weight.dtype

    model = Late()
    make_trainer(precision="64-true").fit(model, numbers())
    assert model.made_in is torch.float64
