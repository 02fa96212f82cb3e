"""``Trainer(compile=...)`` by ``torch.compile``: the same numbers as without, in fewer pieces."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from sharded import fsdp, weights
from trainers import joined, quiet

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

pytestmark = [  # of torch, while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
TRACED = {"backend": "aot_eager"}  # everything but the generated code, which takes long to make


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Model(LightningModule):
    """Logs a tensor, a number that changes in each step, and the loss of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Dropout(0.1), nn.Linear(6, 1))
        self.seen: list[dict[str, float]] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("now", float(self.global_step))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])  # type: ignore[no-any-return]

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def data(count: int = 44) -> DataLoader[Any]:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=made)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)  # the last batch is smaller


def fitted(**arguments: Any) -> Model:
    model = Model()
    quiet(max_epochs=3, **arguments).fit(model, data(), data(16))
    return model


def test_weights_and_what_is_logged_are_those_of_eager_mode() -> None:
    eager, compiled = fitted(), fitted(compile=TRACED)
    assert counters["stats"]["unique_graphs"] >= 2
    assert compiled.seen == eager.seen
    assert len(eager.seen) == 18
    for name, value in eager.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name
    assert list(compiled.state_dict()) == list(eager.state_dict())


@pytest.mark.slow  # C++ is compiled
def test_generated_code_gives_the_weights_of_eager_mode() -> None:
    class Plain(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()  # instead of dropout, whose random numbers generated code draws in another way

    def trained(**arguments: Any) -> Model:
        model = Plain()
        quiet(max_epochs=2, **arguments).fit(model, data(), data(16))
        return model

    eager, compiled = trained(), trained(compile="default")
    assert counters["inductor"]
    for ours, theirs in zip(compiled.parameters(), eager.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class NoMore(Callback):
    """From the second epoch on, it is an error to compile anything."""

    def __init__(self) -> None:
        self.before = torch._dynamo.config.error_on_recompile

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.frames = counters["frames"]["total"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            assert counters["frames"]["total"] == self.frames


def test_nothing_is_compiled_after_the_first_epoch() -> None:
    callback = NoMore()
    fitted(compile=TRACED, callbacks=callback)
    assert callback.frames > 0


def test_prediction_is_compiled_too() -> None:
    model = Model()
    expected = quiet().predict(model, data())
    assert not counters["stats"]
    found = quiet(compile=TRACED).predict(model, data())
    assert counters["stats"]["unique_graphs"] >= 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected))  # type: ignore[arg-type]


def test_module_is_left_as_it_was() -> None:
    model = Model()
    before = set(vars(model))
    quiet(compile=TRACED).fit(model, data(), data(16))
    assert set(vars(model)) == before
    frames = counters["frames"]["total"]
    quiet().fit(model, data(), data(16))
    assert counters["frames"]["total"] == frames


def test_module_is_left_as_it_was_after_an_error() -> None:
    class Failing(Model):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ZeroDivisionError

    model = Failing()
    before = set(vars(model))
    with pytest.raises(ZeroDivisionError):
        quiet(compile=TRACED).fit(model, data(), data(16))
    assert set(vars(model)) == before


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss)


def test_manual_optimization_is_compiled_around_its_steps() -> None:
    eager = Manual()
    quiet(max_epochs=2).fit(eager, data(), data(16))
    compiled = Manual()  # which sets the seed again
    quiet(max_epochs=2, compile=TRACED).fit(compiled, data(), data(16))
    assert counters["stats"]["unique_graphs"] >= 1
    for ours, theirs in zip(compiled.parameters(), eager.parameters()):
        assert torch.equal(ours, theirs)


def test_checkpoint_of_a_compiled_run_is_that_of_a_plain_one(tmp_path: Path) -> None:
    model = Model()
    trainer = quiet(max_epochs=1, compile=TRACED)
    trainer.fit(model, data(), data(16))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Model()
    quiet(max_epochs=3).fit(resumed, data(), data(16), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(resumed.net[0].weight, fitted().net[0].weight)


@pytest.mark.parametrize("given", ["fast", 3, {"speed": 1}, {"step": "yes"}])
def test_other_values_are_errors_that_name_the_accepted_ones(given: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"compile=.*'default'.*'step'"):
        quiet(compile=given)


# ---- several processes ----------------------------------------------------------------------------------------------


def tracing() -> None:
    """What ``pytestmark`` and ``fresh`` are to the tests, in the processes that they start."""
    torch._dynamo.reset()
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor")
    warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated")


def with_ddp(rank: int, size: int, compile: Any) -> dict[str, Any]:
    tracing()
    model = Model()
    joined(max_epochs=2, compile=compile).fit(model, data(64), data(16))
    return {"graphs": counters["stats"]["unique_graphs"], "weights": {name: value.tolist() for name, value in model.state_dict().items()}}


def test_step_is_compiled_within_ddp() -> None:
    eager, compiled = run(with_ddp, 2, None), run(with_ddp, 2, TRACED)
    assert [each["weights"] for each in compiled] == [each["weights"] for each in eager]
    assert eager[0]["graphs"] == 0
    assert compiled[0]["graphs"] >= 1


def with_fsdp(rank: int, size: int, compile: Any) -> dict[str, Any]:
    tracing()
    model = Model()
    trainer = quiet(strategy=fsdp(size, auto_wrap_policy={Block}), devices=size, max_epochs=2, compile=compile)
    trainer.fit(model, data(64), data(16))
    before = [vars(each).get("forward") for each in model.modules()]
    return {"graphs": counters["stats"]["unique_graphs"], "weights": weights(trainer.strategy), "left": [each for each in before if each]}


def test_units_are_compiled_within_fsdp() -> None:
    eager, compiled = run(with_fsdp, 2, None), run(with_fsdp, 2, TRACED)
    for ours, theirs in zip(compiled, eager):
        assert ours["weights"] == theirs["weights"]
        assert ours["left"] == []
    assert eager[0]["graphs"] == 0
    assert compiled[0]["graphs"] == 1 or compiled[0]["graphs"] == 2  # of blocks, whether or not their hooks are told apart
