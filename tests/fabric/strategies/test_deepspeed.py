"""DeepSpeed's engine in two real processes, on its CPU accelerator: it computes what one process computes on all of the data.

Needs the package deepspeed: ``make test-deepspeed``; offloading to a disk needs the library libaio as well. All runs happen in one
pair of processes, since DeepSpeed takes seconds to get ready in each.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from training import Net, batches, largest_difference, part, plain

from lightning.fabric.precision import build_precision
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed: make test-deepspeed")

TOLERANCE = 1e-6
DATA = batches(6)
RUNS: dict[str, dict[str, Any]] = {  # arguments of the strategy and of `train`
    "zero 1": {"stage": 1},
    "zero 2": {"stage": 2},
    "zero 3": {"stage": 3},
    "no zero": {"zero_optimization": False},
    "zero 1, window": {"stage": 1, "accumulate": 4},
    "zero 2, window": {"stage": 2, "accumulate": 4},
    "zero 3, window": {"stage": 3, "accumulate": 4},
    "zero 1, clipped": {"stage": 1, "accumulate": 2, "clip": 0.3},
    "zero 2, clipped": {"stage": 2, "accumulate": 2, "clip": 0.3},
    "zero 3, clipped": {"stage": 3, "accumulate": 2, "clip": 0.3},
    "no zero, clipped": {"zero_optimization": False, "clip": 0.3},
    "zero 1, offload": {"stage": 1, "offload_optimizer": True, "accumulate": 2, "clip": 0.3, "optimizer": "cpu_adam"},
    "zero 2, offload": {"stage": 2, "offload_optimizer": True, "accumulate": 2, "clip": 0.3, "optimizer": "cpu_adam"},
    "zero 3, offload": {
        "stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
        "accumulate": 2,
        "clip": 0.3,
        "optimizer": "cpu_adam",
    },
    "zero 1, other scale": {"stage": 1, "accumulate": 2, "scale": 0.25},
    "zero 2, other scale": {"stage": 2, "accumulate": 2, "scale": 0.25},
    "zero 3, other scale": {"stage": 3, "accumulate": 2, "scale": 0.25},
    "zero 2, bf16": {"stage": 2, "precision": "bf16-mixed", "clip": 0.3},
    "zero 3, bf16": {"stage": 3, "precision": "bf16-mixed", "clip": 0.3},
}

NVME = {"offload_optimizer": True, "offload_optimizer_device": "nvme", "offload_parameters": True, "offload_params_device": "nvme"}
if find_library("aio") is not None:  # DeepSpeed reaches disks through it
    RUNS["zero 3, nvme"] = {"stage": 3, **NVME, "params_buffer_size": 10000, "accumulate": 2, "clip": 0.3, "optimizer": "cpu_adam"}


def make_optimizer(kind: str, module: nn.Module) -> torch.optim.Optimizer:
    if kind == "cpu_adam" and find_spec("deepspeed") is not None and torch.distributed.is_initialized():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(module.parameters(), lr=0.05, adamw_mode=True)  # type: ignore[no-any-return]
    if kind == "cpu_adam":
        return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.0)
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def train(
    strategy: Strategy,
    data: list[Tensor],
    accumulate: int = 1,
    clip: float | None = None,
    optimizer: str = "sgd",
    scale: float = 1.0,
    precision: str = "32-true",
) -> tuple[list[float], dict[str, Any]]:
    """Train as the loop of a trainer does, whose last window may be smaller than the others; return losses and weights."""
    strategy.precision = build_precision(precision, "cpu")
    module = Net()
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    strategy.prepare_training(accumulate, clip, "norm")
    strategy.optimizers = strategy.wrap_optimizers([make_optimizer(optimizer, module)], [])
    (steps,) = strategy.optimizers
    step = strategy.bind("training_step")
    losses = []
    for index, batch in enumerate(data):
        first = index - index % accumulate
        window = min(accumulate, len(data) - first)
        last = index == first + window - 1

        def closure(batch: Tensor = batch, index: int = index, window: int = window, last: bool = last) -> Tensor:
            with strategy.precision.forward_context():
                loss: Tensor = step(strategy.precision.convert_input(batch), index)
            if index % accumulate == 0:
                steps.zero_grad()
            strategy.backward(loss / window)
            losses.append(loss.item())
            if last and scale != 1:
                rescale(strategy, steps, scale)
            if last and clip is not None:
                strategy.clip_gradients(steps, clip)
            return loss

        if last:
            strategy.optimizer_step(steps, closure)
        else:
            with strategy.no_backward_sync():
                closure()
    weights = strategy.get_module_state_dict(module)
    return losses, plain({name: value.float() for name, value in weights.items()})


def rescale(strategy: Strategy, optimizer: Any, factor: float) -> None:
    if isinstance(strategy, DeepSpeedStrategy):
        strategy.scale_gradients(optimizer, factor)
    else:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(factor)


def deepspeed_strategy(size: int, **arguments: Any) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy(parallel_devices=[torch.device("cpu")] * size, **arguments)
    zero = strategy.config.get("zero_optimization")
    if zero is not None:  # else weights as small as these stay whole everywhere
        zero["stage3_param_persistence_threshold"] = 0
    strategy.setup_environment()
    return strategy


def split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = ("accumulate", "clip", "optimizer", "scale", "precision")
    return {k: v for k, v in arguments.items() if k not in own}, {k: v for k, v in arguments.items() if k in own}


def prepare() -> None:
    """Let pass what DeepSpeed's imports warn of."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def train_all(rank: int, size: int, folder: str) -> dict[str, Any]:
    prepare()
    outcome = {}
    for name, arguments in RUNS.items():
        of_strategy, of_training = split(arguments)
        strategy = deepspeed_strategy(size, nvme_path=folder, **of_strategy)
        outcome[name] = train(strategy, [part(batch, rank, size) for batch in DATA], **of_training)
    return outcome


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of all runs, in each process."""
    return run(train_all, 2, str(tmp_path_factory.mktemp("disk")), timeout=240)


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" not in name])
def test_losses_and_weights_are_those_of_one_process(name: str, outcomes: list[dict[str, Any]]) -> None:
    losses, weights = train(SingleDeviceStrategy(), DATA, **split(RUNS[name])[1])
    ours = torch.tensor([each[name][0] for each in outcomes]).mean(0)
    torch.testing.assert_close(ours, torch.tensor(losses), rtol=0, atol=TOLERANCE * 10)  # they are of the order of 10
    assert largest_difference(outcomes[0][name][1], weights) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" in name])
def test_bf16_is_near(name: str, outcomes: list[dict[str, Any]]) -> None:
    _, weights = train(SingleDeviceStrategy(), DATA, clip=0.3)
    difference = largest_difference(outcomes[0][name][1], weights)
    assert 1e-5 < difference < 0.02


# ---- a loop of the user's own -------------------------------------------------------------------------------------------


def by_hand(rank: int, size: int, stage: int) -> dict[str, Any]:
    """A loop that knows nothing of windows: each step ends one."""
    prepare()
    strategy = deepspeed_strategy(size, stage=stage)
    module = Net()
    engine, (optimizer,), _ = strategy.setup_module_and_optimizers(module, [torch.optim.SGD(module.parameters(), lr=0.1)])
    step = strategy.as_forward(engine, module.training_step)
    for index, batch in enumerate(DATA):
        strategy.backward(step(part(batch, rank, size), index) / 2, engine)
        if index % 2 == 1:
            strategy.optimizer_step(optimizer)
            optimizer.zero_grad()
    return plain(strategy.get_module_state_dict(module))


def failures(rank: int, size: int) -> list[str]:
    """The messages of what can't be."""
    prepare()
    module = Net()
    strategy = deepspeed_strategy(size)
    strategy.connect(module)
    strategy.setup_module(module)
    two = [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]
    attempts: list[Callable[[], Any]] = [
        lambda: strategy.wrap_optimizers(two, []),
        lambda: strategy.wrap_optimizers([], []),
        lambda: strategy.clip_gradients_norm(None, None, 1.0),
        lambda: deepspeed_strategy(size, precision=build_precision("16-true", "cpu")),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(Exception) as error:
            attempt()
        messages.append(f"{type(error.value).__name__}: {error.value}")
    return messages


def by_hand_and_failures(rank: int, size: int) -> Any:
    return [by_hand(rank, size, stage) for stage in (1, 2, 3)], failures(rank, size)


@pytest.fixture(scope="module")
def more_outcomes() -> Any:
    return run(by_hand_and_failures, 2, timeout=240)[0]


def test_steps_of_ones_own_loop_end_its_windows(more_outcomes: Any) -> None:
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for index, batch in enumerate(DATA):
        (module.training_step(batch, index) / 2).backward()
        if index % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    for weights in more_outcomes[0]:
        assert largest_difference(weights, plain(module.state_dict())) < TOLERANCE


def test_errors_say_what_to_do(more_outcomes: Any) -> None:
    several, none, clipping, half = more_outcomes[1]
    assert several.startswith("MisconfigurationException: `configure_optimizers` returned 2 optimizers, and DeepSpeed steps one")
    assert none.startswith("MisconfigurationException: `configure_optimizers` returned no optimizer, and the DeepSpeed configuration")
    assert "Set 'gradient_clipping' in its configuration" in clipping
    assert "DeepSpeed can't compute in float16 on this 'cpu' device. Use 'bf16-true', or '32-true'" in half
