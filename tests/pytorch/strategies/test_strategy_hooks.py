"""Strategies of one's own: what the Trainer calls of them."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from trainers import Evaluated, Numbers, joined, quiet

from lightning.fabric.strategies.hooks import EVENTS
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


class Heard(SingleDeviceStrategy):
    """Notes what it hears."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.heard: list[str] = []


def _noting(name: str) -> Any:
    def hook(self: Heard, *args: Any) -> None:
        self.heard.append(name)

    return hook


for _name in EVENTS:
    setattr(Heard, _name, _noting(_name))


class Noting(Callback):
    """Notes the same into the same list."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        trainer.strategy.heard.append("callback")

    def on_validation_start(self, trainer: Any, *args: Any) -> None:
        trainer.strategy.heard.append("callback")


def batches(count: int) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count))


def test_strategy_hears_of_the_run_after_callbacks_and_module() -> None:
    strategy = Heard()
    trainer = quiet(strategy=strategy, callbacks=[Noting()])
    trainer.fit(Evaluated(), batches(2), batches(1))
    batch, validation = ["callback", "on_train_batch_start"], ["callback", "on_validation_start", "on_validation_end"]
    assert strategy.heard == ["on_train_start", *batch, *batch, *validation, "on_train_end"]
    for name, task in (("test", "test"), ("predict", "predict")):
        strategy.heard.clear()
        getattr(trainer, task)(Evaluated(), batches(1))
        assert strategy.heard == [f"on_{name}_start", f"on_{name}_end"]


class Doubling(SingleDeviceStrategy):
    """Takes steps in its own way, and restores and builds in its own way too."""

    lightning_restore_optimizer = False

    def __init__(self) -> None:
        super().__init__("cpu")
        self.steps: list[str] = []
        self.inside: list[bool] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.steps.append("train")
        return 2 * super().training_step(*args, **kwargs)

    def validation_step(self, batch: Tensor, *args: Any) -> Any:
        self.steps.append("val")
        return super().validation_step(batch + 1, *args)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().predict_step(*args, **kwargs) + 100

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        self.inside.append(True)
        yield
        self.inside.append(False)


class Momentum(Evaluated):
    built_inside: bool | None = None

    def configure_model(self) -> None:
        self.built_inside = self.trainer.strategy.inside == [True]

    def configure_optimizers(self) -> Any:
        import torch

        return torch.optim.SGD(self.parameters(), 1.0, momentum=0.5)


def test_steps_of_the_strategy_take_the_place_of_the_bound_ones() -> None:
    strategy, model = Doubling(), Momentum()
    trainer = quiet(strategy=strategy)
    trainer.fit(model, batches(2), batches(1))
    assert strategy.steps == ["train", "train", "val"]
    assert model.weight.item() == -2.0, "0 and 1, each doubled"
    assert model.evaluated == [[1.0]]
    assert model.built_inside
    (prediction,) = trainer.predict(model, batches(1))  # type: ignore[misc]
    assert prediction.item() == 98.0


@pytest.mark.parametrize(("strategy", "restored"), [(Doubling, False), (lambda: SingleDeviceStrategy("cpu"), True)])
def test_optimizers_are_restored_unless_the_strategy_does_so(strategy: Any, restored: bool, tmp_path: Path) -> None:
    first = quiet()
    first.fit(_with_momentum(), batches(2), batches(1))
    first.save_checkpoint(tmp_path / "first.ckpt")
    model, trainer = _with_momentum(), quiet(strategy=strategy(), max_epochs=2)
    found: list[bool] = []
    model.on_train_start = lambda: found.append(bool(trainer.optimizers[0].state))  # type: ignore[method-assign]
    trainer.fit(model, batches(2), batches(1), ckpt_path=str(tmp_path / "first.ckpt"))
    assert found == [restored]


def _with_momentum() -> Momentum:
    model = Momentum()
    model.configure_model = lambda: None  # type: ignore[method-assign]
    return model


class SettingUp(SingleDeviceStrategy):
    """Adds to how model and optimizers are set up, and hears of backward."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.heard: list[Any] = []

    def setup(self, trainer: Any) -> None:
        self.heard.append(("setup", trainer.state.fn.value, self.model is self.module))
        super().setup(trainer)
        self.heard.append(("is set up", len(self.optimizers)))

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        self.heard.append(("optimizers", len(self.optimizers)))

    def post_training_step(self) -> None:
        self.heard.append("post_training_step")

    def pre_backward(self, closure_loss: Tensor) -> None:
        self.heard.append(("pre_backward", closure_loss.requires_grad))
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        self.heard.append(("post_backward", closure_loss.requires_grad))


class ByHand(Evaluated):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def test_strategy_adds_to_setting_up_and_hears_of_backward() -> None:
    around = [("pre_backward", True), ("post_backward", False)]
    for model, expected in ((Evaluated(), ["post_training_step", *around]), (ByHand(), [*around, "post_training_step"])):
        strategy = SettingUp()
        trainer = quiet(strategy=strategy)
        trainer.fit(model, batches(1), batches(1))
        assert strategy.heard == [("setup", "fit", True), ("optimizers", 1), ("is set up", 1), *expected]
        strategy.heard.clear()
        trainer.test(model, batches(1), verbose=False)
        assert strategy.heard[0][:2] == ("setup", "test")


class Parallel(DDPStrategy):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def on_train_start(self) -> None:
        self.heard.append("on_train_start")

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.heard.append("step")
        return super().training_step(*args, **kwargs)


def in_processes(rank: int, size: int) -> list[Any]:
    strategy, model = Parallel(), Evaluated()
    joined(strategy=strategy).fit(model, batches(4), batches(2))
    return [strategy.heard, model.weight.item()]


def test_hooks_of_a_strategy_of_several_processes_run_in_each_and_gradients_are_averaged() -> None:
    first, second = run(in_processes, 2)
    assert first == second
    assert first[0] == ["on_train_start", "step", "step"]
    assert first[1] == -3.0


def test_model_and_optimizers_are_moved_and_loaded_by_name() -> None:
    trainer = quiet()
    trainer.fit(_with_momentum(), batches(2), batches(1))
    strategy = trainer.strategy
    state = strategy.optimizers[0].state_dict()
    strategy.optimizers[0].state.clear()
    strategy.load_optimizer_state_dict({"optimizer_states": [state]})
    assert strategy.optimizers[0].state
    strategy.model_to_device()
    assert {parameter.device for parameter in strategy.model.parameters()} == {strategy.root_device}
