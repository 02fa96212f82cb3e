"""Training with DDPStrategy in several real processes gives what one process gives on all of the data."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from training import SAMPLES, Net, batches, largest_difference, part, plain, train

from lightning.fabric.precision import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy, through_ddp
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

TOLERANCE = 1e-6


def ddp(size: int, **kwargs: Any) -> DDPStrategy:
    return DDPStrategy(parallel_devices=[torch.device("cpu")] * size, **kwargs)


def alone(count: int = 4, **net: Any) -> dict[str, Any]:
    return train(SingleDeviceStrategy(), Net(**net), batches(count))


# ---- the same weights -------------------------------------------------------------------------------------------------


def trained(rank: int, size: int, net: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    module = Net(**net)
    if rank > 0:  # weights that start out different become those of rank 0
        nn.init.normal_(module.first.weight)
    return train(ddp(size, **kwargs), module, [part(batch, rank, size) for batch in batches()])


@pytest.mark.parametrize(
    ("size", "net", "kwargs"),
    [
        (2, {}, {}),
        (3, {}, {}),
        (2, {}, {"gradient_as_bucket_view": False}),
        (2, {}, {"static_graph": True}),
        (2, {}, {"bucket_cap_mb": 0.0001}),
        (2, {"skips": True}, {"find_unused_parameters": True}),
        (2, {"skips": True}, {"find_unused_parameters": True, "gradient_as_bucket_view": False}),
    ],
)
def test_weights_are_those_of_one_process(size: int, net: dict[str, Any], kwargs: dict[str, Any]) -> None:
    weights = run(trained, size, net, kwargs)
    assert all(each == weights[0] for each in weights)
    assert largest_difference(weights[0], alone(**net)) < TOLERANCE


def trained_with_accumulation(rank: int, size: int, kwargs: dict[str, Any]) -> list[Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    reduced = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, and these would be strings
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    pieces = [piece for batch in batches() for piece in part(batch, rank, size).split(1)]
    return [train(ddp(size, ddp_comm_hook=counting, **kwargs), Net(), pieces, accumulate=3), len(reduced)]


@pytest.mark.parametrize("kwargs", [{}, {"static_graph": True}, {"gradient_as_bucket_view": False}])
def test_accumulation_gives_the_same_weights_and_reduces_once_a_window(kwargs: dict[str, Any]) -> None:
    for weights, reductions in run(trained_with_accumulation, 2, kwargs):
        assert largest_difference(weights, alone()) < TOLERANCE
        assert reductions == 4 + ("static_graph" in kwargs)  # a static graph is recorded in the first backward pass


def unused_without_asking(rank: int, size: int) -> str:
    with pytest.raises(RuntimeError) as raised:
        train(ddp(size), Net(skips=True), [part(batch, rank, size) for batch in batches()])
    return str(raised.value)


def test_unused_parameters_are_an_error_unless_they_are_looked_for() -> None:
    assert all("find_unused_parameters=True" in message for message in run(unused_without_asking, 2))


def scaled(rank: int, size: int) -> list[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)  # type: ignore[attr-defined]
    strategy = ddp(size, precision_plugin=MixedPrecision("16-mixed", "cpu", scaler))
    data = [part(batch, rank, size) for batch in batches()]
    if rank == 1:
        data[1] = data[1] * float("inf")  # one process alone overflows, and all have to leave the step out
    weights = train(strategy, Net(), data)
    return [weights, scaler.get_scale()]


def test_scaler_leaves_out_a_step_in_all_processes_when_one_overflows() -> None:
    results = run(scaled, 2)
    assert results[0] == results[1]
    assert results[0][1] == 2.0**9
    assert all(torch.tensor(value).isfinite().all() for value in results[0][0].values())
    data = batches()
    expected = train(SingleDeviceStrategy(), Net(), [data[0], data[2], data[3]])
    assert largest_difference(results[0][0], expected) < 1e-2  # what float16 leaves


def in_bfloat16(rank: int, size: int) -> dict[str, Any]:
    strategy = ddp(size, precision=MixedPrecision("bf16-mixed", "cpu"))
    return train(strategy, Net(), [part(batch, rank, size) for batch in batches()])


def test_bfloat16_autocast_reaches_the_step() -> None:
    weights = run(in_bfloat16, 2)
    assert weights[0] == weights[1]
    assert 1e-6 < largest_difference(weights[0], alone()) < 5e-2


# ---- the module and its wrapper ---------------------------------------------------------------------------------------


class Logged(Net):
    """Counts calls, and has a forward hook that only a call of the module itself may run."""

    def __init__(self) -> None:
        super().__init__()
        self.hooked = 0
        self.register_forward_hook(lambda *_: setattr(self, "hooked", self.hooked + 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert type(batch) is list  # as it was passed
        return super().training_step(batch[0], batch_idx)


def wrapped(rank: int, size: int) -> dict[str, Any]:
    strategy, module = ddp(size), Logged()
    strategy.connect(module)
    model = strategy.setup_module(module)
    strategy.model = model
    step = strategy.bind("training_step")
    loss = step([part(batches()[0], rank, size)], batch_idx=0)
    strategy.backward(loss)
    hooked_by_step = module.hooked
    output = model(batches()[0])
    keys = list(strategy.lightning_module_state_dict())
    strategy.load_model_state_dict({"state_dict": {name: torch.zeros_like(value) for name, value in module.state_dict().items()}})
    facts = {
        "wrapped": type(model).__name__,
        "views": model.gradient_as_bucket_view,  # type: ignore[union-attr]
        "signature": list(inspect.signature(step).parameters),
        "hooked": (hooked_by_step, module.hooked),
        "output": list(output.shape),
        "attribute": model.module.skips,  # type: ignore[union-attr]
        "clean": keys == list(Net().state_dict()),
        "zeroed": module.last.weight.abs().sum().item(),
        "evaluates": strategy.bind("validation_step") == module.validation_step,
        "trained": module.first.weight.grad is not None,
    }
    strategy.teardown()
    facts["torn_down"] = strategy.model is module
    return facts


def test_step_runs_through_ddp_and_the_module_stays_as_the_user_wrote_it() -> None:
    expected = {
        "wrapped": "DistributedDataParallel", "views": True, "signature": ["batch", "batch_idx"], "hooked": (0, 1), "output": [SAMPLES, 1],
        "attribute": False, "clean": True, "zeroed": 0.0, "evaluates": True, "trained": True, "torn_down": True,
    }  # fmt: skip
    assert run(wrapped, 2) == [expected] * 2


class Recursive(nn.Module):
    """A step that calls the wrapped module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1)
        self.wrapper: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.wrapper[0].module(batch).mean()  # type: ignore[no-any-return]


def calling_its_wrapper(rank: int, size: int) -> list[float]:
    strategy, module = ddp(size), Recursive()
    strategy.connect(module)
    strategy.model = strategy.setup_module(module)
    module.wrapper.append(strategy.model)
    strategy.backward(strategy.bind("training_step")(torch.full((2, 5), float(rank)), 0))
    assert module.layer.weight.grad is not None
    return module.layer.weight.grad[0].tolist()


def test_step_may_call_what_wraps_it() -> None:
    assert run(calling_its_wrapper, 2) == [[0.5] * 5] * 2


def evaluated(rank: int, size: int) -> list[Any]:
    module = Net(normalises=True)
    for parameter in module.parameters():
        nn.init.constant_(parameter, float(rank + 1))
    strategy = ddp(size)
    strategy.connect(module)
    strategy.model = strategy.setup_module(module, training=False)
    unwrapped = strategy.model is module
    assert isinstance(module.norm, nn.BatchNorm1d)
    assert module.norm.running_mean is not None
    module.norm.running_mean.fill_(float(rank + 5))
    strategy.sync_buffers()
    frozen = Net().requires_grad_(False)
    with strategy.no_backward_sync(strategy.setup_module(frozen)):
        pass
    return [unwrapped, module.last.bias.item(), module.norm.running_mean[0].item(), not isinstance(strategy.model, DistributedDataParallel)]


def test_evaluation_needs_no_wrapper_and_sees_the_same_model_everywhere() -> None:
    assert run(evaluated, 3) == [[True, 1.0, 5.0, True]] * 3


def with_ignored_parameters(rank: int, size: int) -> list[Any]:
    module = Net()
    module._ddp_params_and_buffers_to_ignore = ["optional.weight", "optional.bias"]  # type: ignore[assignment]
    module.optional.requires_grad_(True)
    train(ddp(size), module, [part(batch, rank, size) for batch in batches()])
    return plain(module.state_dict())["optional.bias"]  # type: ignore[no-any-return]


def test_parameters_that_ddp_is_told_to_ignore_stay_local() -> None:
    first, second = run(with_ignored_parameters, 2)
    assert first != second


def functions_of_two_modules(rank: int, size: int) -> list[Any]:
    strategy = ddp(size)
    one, other = strategy.setup_module(Net()), strategy.setup_module(Net())
    assert isinstance(one, DistributedDataParallel)
    assert isinstance(other, DistributedDataParallel)
    batch = part(batches()[0], rank, size)
    strategy.backward(through_ddp(one, one.module.training_step)(batch, 0))
    with strategy.no_backward_sync(other):
        strategy.backward(through_ddp(other, other.module.training_step)(batch, 0))
    return [model.module.last.bias.grad.item() for model in (one, other)]


def test_several_modules_are_wrapped_and_held_back_one_by_one() -> None:
    (averaged, local), (same, other) = run(functions_of_two_modules, 2)
    assert averaged == same == pytest.approx((local + other) / 2)
    assert local != other


# ---- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"find_unused": True}, TypeError, "'find_unused', which neither"),
        ({"start_method": "thread"}, ValueError, "start_method='thread' is not known"),
        ({"ddp_comm_wrapper": print}, ValueError, "without the ddp_comm_hook"),
        ({"model_averaging_period": 3}, ValueError, "needs ddp_comm_hook=post_localSGD_hook"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(kwargs: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        DDPStrategy(**kwargs)


def test_every_name_is_entered_into_a_registry() -> None:
    class Registry(dict[str, Any]):
        def register(self, name: str, strategy: type, description: str, **kwargs: Any) -> None:
            self[name] = strategy(**kwargs)

    registry = Registry()
    DDPStrategy.register_strategies(registry)
    assert len(registry) == 12
    assert registry["ddp_notebook_find_unused_parameters_true"].start_method == "fork"
    assert registry["ddp_find_unused_parameters_true"]._ddp_kwargs["find_unused_parameters"] is True
