"""Errors of memory: what they say. The allocator's own error comes from asking it for more than any machine has."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import quiet

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loops.memory_report import explained


@pytest.fixture(autouse=True)
def no_garbage() -> None:
    """What other tests have left behind would be among the largest tensors."""
    gc.collect()


def exhaust() -> None:
    torch.empty(2**46)


class Exhausting(torch.autograd.Function):
    """The identity, whose backward pass needs too much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        exhaust()
        return gradient


class Adam(torch.optim.Adam):
    """An optimizer whose third step needs too much."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        return loss

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        if self.steps == 2:
            exhaust()
        return super()._init_group(*args, **kwargs)


class Net(LightningModule):
    """Runs out of memory in one place, at batch 2."""

    def __init__(self, place: str, automatic: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4000), nn.Linear(4000, 1))
        self.register_buffer("table", torch.zeros(300_000))
        self.place = place
        self.automatic_optimization = automatic

    def fail_in(self, place: str, batch_idx: int) -> None:
        if self.place == place and batch_idx == 2:
            exhaust()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch["x"])
        self.fail_in("forward", batch_idx)
        if self.place == "backward" and batch_idx == 2:
            output = Exhausting.apply(output)
        loss = output.square().mean()
        if not self.automatic_optimization:
            self.optimizers().zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
        return loss

    def on_after_backward(self) -> None:
        self.fail_in("hook", self.trainer.fit_loop.progress.batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch["x"])
        self.fail_in("validation", batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        self.fail_in("prediction", batch_idx)
        return batch_idx

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.place == "transfer" and batch["number"][0] == 2:
            exhaust()
        return batch

    def configure_optimizers(self) -> Any:
        return (Adam if self.place == "optimizer" else torch.optim.Adam)(self.parameters())


def batches(place: str = "") -> DataLoader[Any]:
    class Data(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if place == "loader" and index == 2:
                exhaust()
            return super().__getitem__(index)

    data = Data({"x": torch.ones(5, 3), "number": torch.full((5,), index)} for index in range(4))
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


AT = "training (epoch 0, batch 2, global step 2)"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("forward", f"Out of memory in the forward pass (`training_step`) of {AT}."),
        ("backward", f"Out of memory in the backward pass of {AT}."),
        ("hook", f"Out of memory in a hook of the step of {AT}."),
        ("optimizer", f"Out of memory in the optimizer step of {AT}."),
        ("transfer", f"Out of memory in moving a batch to its device of {AT}."),
        ("loader", f"Out of memory in fetching a batch of {AT}."),
        ("validation", "Out of memory in the forward pass (`validation_step`) of validation (epoch 0, batch 2, global step 4)."),
    ],
)
def test_error_names_the_phase_and_the_first_cause(place: str, said: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        quiet().fit(Net(place), batches(place), batches())
    assert str(caught.value).startswith(said)
    assert "can't allocate memory: you tried to allocate" in str(caught.value)
    assert type(caught.value) is RuntimeError
    assert "can't allocate memory" in str(caught.value.__cause__)
    assert not str(caught.value.__cause__).startswith("Out of memory")


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_error_names_the_phase_in_manual_optimization(place: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        quiet().fit(Net(place, automatic=False), batches(), batches())
    assert ("the optimizer step" if place == "optimizer" else f"the {place} pass") in str(caught.value).splitlines()[0]


def test_error_in_prediction_names_the_batch() -> None:
    with pytest.raises(RuntimeError, match=r"the forward pass \(`predict_step`\) of prediction \(batch 2\)"):
        quiet().predict(Net("prediction"), batches())


def test_error_describes_the_batch_and_who_holds_the_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        quiet().fit(Net("forward"), batches(), batches())
    text = str(caught.value)
    assert "The batch: ['x']: float32 [5, 3], 0.0 MiB; ['number']: int64 [5], 0.0 MiB." in text
    held = next(line for line in text.splitlines() if line.startswith("Held in tensors"))
    # 20,001 numbers in weights, twice as many in Adam's moments; 300,000 in the buffer.
    assert "parameters 0.1 MiB" in held
    assert "optimizer states 0.2 MiB" in held
    assert "buffers 1.1 MiB" in held
    assert "others (activations and the like)" in held
    largest = text[text.index("The largest of them:") :].splitlines()[1:]
    assert any("1.1 MiB  buffer `table`: float32 [300000]" in line for line in largest)
    assert any("`exp_avg` of `net.0.weight` in Adam: float32 [4000, 3]" in line for line in largest)
    assert 'on_out_of_memory="split_batch"' in text


def test_error_names_gradients_and_activations() -> None:
    with pytest.raises(RuntimeError) as caught:
        quiet().fit(Net("hook"), batches(), batches())
    text = str(caught.value)
    assert "gradient of `net.0.weight`: float32 [4000, 3]" in text
    assert "gradients 0.1 MiB" in text

    class Wide(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            hidden = torch.zeros(1000, 1000)  # held by this frame
            loss = super().training_step(batch, batch_idx)
            return loss + hidden.sum()

    with pytest.raises(RuntimeError, match=r"3\.8 MiB  other: float32 \[1000, 1000\]"):
        quiet().fit(Wide("forward"), batches(), batches())


def test_callbacks_get_the_error_that_says_more() -> None:
    seen: list[BaseException] = []

    class Hearing(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append(exception)

    with pytest.raises(RuntimeError) as caught:
        quiet(callbacks=Hearing()).fit(Net("forward"), batches(), batches())
    assert seen == [caught.value]


def test_error_of_cuda_keeps_its_type() -> None:
    class Other(Net):
        def fail_in(self, place: str, batch_idx: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Out of memory in .*CUDA out of memory. Tried to allocate 20.00 GiB.\n"):
        quiet().fit(Other("forward"), batches(), batches())


def test_other_errors_stay_as_they_are() -> None:
    trainer, error = quiet(), RuntimeError("shapes differ")
    assert explained(trainer, error) is error
    interrupt = KeyboardInterrupt()
    assert explained(trainer, interrupt) is interrupt


PROGRAM = """
import resource, sys
sys.path.insert(0, {helpers!r})
import torch
from trainers import quiet
from lightning.pytorch import LightningModule
torch.set_num_threads(1)

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(100, 1)

    def training_step(self, batch, batch_idx):
        hidden = self.layer(batch)
        if batch_idx == 1:
            layers = []
            for i in range(400):  # 3 GB
                layers.append(hidden.expand(-1, 2000) * i)
        return hidden.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

loader = torch.utils.data.DataLoader(torch.ones(4000, 100), batch_size=1000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
quiet().fit(Net(), loader)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are kept by Linux")
def test_real_limit_of_memory_is_explained() -> None:
    helpers = str(Path(__file__).resolve().parents[2] / "helpers")
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(helpers=helpers)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "RuntimeError: Out of memory in the forward pass (`training_step`) of training (epoch 0, batch 1, global step 1)." in done.stderr
    assert "The batch: float32 [1000, 100], 0.4 MiB." in done.stderr
    assert "other: float32 [1000, 2000]" in done.stderr
