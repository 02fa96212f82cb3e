"""Training with FSDPStrategy in several real processes gives what one process gives on all of the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from sharded import fit, fsdp, optimizer_state, set_up, weights
from training import Net, batches, largest_difference, part

from lightning.fabric.plugins.layer_sync import TorchSyncBatchNorm
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.precision import DoublePrecision, HalfPrecision, MixedPrecision
from lightning.fabric.strategies.fsdp_module import root_of
from lightning.fabric.strategies.sharding import full_tensor, total_norm
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

TOLERANCE = 1e-6


class Odd(Net):
    """With a number, a weight in two places, a weight that is frozen, and one row for all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(1))
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.optional.weight
        self.first.bias.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = torch.tanh(self.first(batch))
        hidden = self.tied(hidden + self.optional(hidden))
        return (self.last(hidden) * self.scale + self.shift - batch.sum(1, keepdim=True)).square().mean()


class Calling(Net):
    """A step that calls the module itself, twice, the second time with what needs a gradient; and gives back a view."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        once = self(batch)
        twice = self(batch + once)
        return {"loss": (twice - batch.sum(1, keepdim=True)).square().mean().view(1)[0], "seen": once.view(-1)}


MODULES = {"net": Net, "skips": lambda: Net(skips=True), "odd": Odd, "calling": Calling, "normalises": lambda: Net(normalises=True)}
OPTIMIZERS: dict[str, Any] = {
    "sgd": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
}


def trained(rank: int, size: int, module: str, kwargs: dict[str, Any], optimizer: str, run_kwargs: dict[str, Any]) -> list[Any]:
    model = MODULES[module]()
    if rank > 0:  # weights that start out different become those of rank 0
        nn.init.normal_(model.first.weight)
    strategy = fsdp(size, **kwargs)
    kind, options = OPTIMIZERS[optimizer]
    prepared = set_up(strategy, model, kind, **options)
    data = [part(batch, rank, size) for batch in batches()]
    if "accumulate" in run_kwargs:
        data = [piece for batch in data for piece in batch.split(len(batch) // run_kwargs["accumulate"])]
    losses = fit(strategy, prepared, data, **run_kwargs)
    return [weights(strategy), optimizer_state(prepared), losses]


def alone(module: str, optimizer: str, run_kwargs: dict[str, Any]) -> list[Any]:
    strategy = SingleDeviceStrategy()
    kind, options = OPTIMIZERS[optimizer]
    prepared = set_up(strategy, MODULES[module](), kind, **options)
    losses = fit(strategy, prepared, batches(), **{**run_kwargs, "accumulate": 1})
    return [weights(strategy), optimizer_state(prepared), losses]


@pytest.mark.parametrize(
    ("size", "module", "kwargs", "optimizer"),
    [
        (2, "net", {}, "sgd"),
        (3, "net", {}, "adamw"),  # over which 7 rows are divided unevenly
        (2, "net", {}, "fused"),
        (2, "skips", {}, "sgd"),
        (2, "odd", {}, "adamw"),
        (2, "calling", {}, "sgd"),
        (2, "net", {"cpu_offload": True}, "adamw"),
        (2, "odd", {"sharding_strategy": "SHARD_GRAD_OP"}, "sgd"),
        (2, "odd", {"sharding_strategy": "NO_SHARD"}, "sgd"),
        (2, "net", {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 1)}, "sgd"),
        (2, "odd", {"sharding_strategy": "_HYBRID_SHARD_ZERO2", "device_mesh": (1, 2)}, "sgd"),
        (2, "odd", {"activation_checkpointing_policy": {nn.Linear}}, "sgd"),
        (2, "net", {"forward_prefetch": True, "use_orig_params": True, "limit_all_gathers": True}, "sgd"),
        (2, "net", {"reshard_after_forward": True}, "sgd"),
    ],
)
def test_losses_weights_and_states_are_those_of_one_process(size: int, module: str, kwargs: dict[str, Any], optimizer: str) -> None:
    results = run(trained, size, module, kwargs, optimizer, {})
    expected = alone(module, optimizer, {})
    for found, states, _ in results:
        assert largest_difference(found, expected[0]) < TOLERANCE
        assert largest_difference(states, expected[1]) < TOLERANCE
    mean = torch.tensor([losses for *_, losses in results]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(expected[2]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "kwargs", "clip"),
    [
        ("net", {}, None),
        ("odd", {}, None),
        ("odd", {}, (0.1, "norm")),
        ("odd", {}, (0.01, "value")),
        ("odd", {"cpu_offload": True}, (0.1, "norm")),
        ("net", {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 1)}, (0.01, "value")),
    ],
)
def test_accumulation_and_clipping_give_the_same_weights(module: str, kwargs: dict[str, Any], clip: Any) -> None:
    for found, *_ in run(trained, 2, module, kwargs, "sgd", {"accumulate": 3, "clip": clip}):
        assert largest_difference(found, alone(module, "sgd", {"clip": clip})[0]) < TOLERANCE


def norms(rank: int, size: int, kwargs: dict[str, Any]) -> list[Any]:
    strategy = fsdp(size, **kwargs)
    optimizer = set_up(strategy, Odd(), lr=0.1)
    strategy.backward(strategy.bind("training_step")(part(batches()[0], rank, size), 0))
    grads = [parameter.grad for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
    found = [total_norm(grads, kind).item() for kind in (2.0, 1.0, 3.0, float("inf"))]
    clipped = strategy.clip_gradients_norm(strategy.model, optimizer, 0.5)
    return [found, clipped.item(), total_norm(grads).item()]


@pytest.mark.parametrize(("size", "kwargs"), [(2, {}), (3, {}), (2, {"sharding_strategy": "NO_SHARD"}), (2, {"cpu_offload": True})])
def test_norm_of_the_gradients_is_that_of_one_process(size: int, kwargs: dict[str, Any]) -> None:
    module = Odd()
    module.training_step(batches()[0], 0).backward()
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in module.parameters() if parameter.grad is not None])
    expected = [torch.linalg.vector_norm(flat, kind).item() for kind in (2.0, 1.0, 3.0, float("inf"))]
    for found, before, after in run(norms, size, kwargs):
        assert found == pytest.approx(expected, rel=1e-6)
        assert before == pytest.approx(expected[0], rel=1e-6)
        assert after == pytest.approx(0.5, rel=1e-5)


# ---- precision --------------------------------------------------------------------------------------------------------

PRECISIONS: dict[str, Any] = {
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
    "16-mixed": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10)),  # type: ignore[attr-defined]
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
    "64-true": DoublePrecision,
    "FSDPPrecision bf16-true": lambda: FSDPPrecision("bf16-true"),
    "FSDPPrecision 16-mixed": lambda: FSDPPrecision("16-mixed", torch.amp.GradScaler("cpu", init_scale=2.0**10)),  # type: ignore[attr-defined]
}
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def in_precision(rank: int, size: int, name: str, module: str, policy: Any) -> list[Any]:
    from torch.distributed.fsdp import MixedPrecision as Old
    from torch.distributed.fsdp import MixedPrecisionPolicy

    bf16 = torch.bfloat16
    kwargs = {
        None: {},
        "new": {"mixed_precision": MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)},
        "old": {"mixed_precision": Old(param_dtype=bf16, reduce_dtype=torch.float32, buffer_dtype=bf16)},
    }[policy]
    if name != "32-true":
        kwargs["precision"] = PRECISIONS[name]()
    strategy = fsdp(size, **kwargs)
    model = MODULES[module]()
    model.register_buffer("offset", torch.zeros(3))
    optimizer = set_up(strategy, model, lr=0.1)
    convert = strategy.precision.convert_input
    losses = fit(strategy, optimizer, [convert(part(batch, rank, size)) for batch in batches()], clip=(5.0, "norm"))
    dtypes = {str(parameter.dtype) for parameter in strategy.module.parameters()}  # type: ignore[union-attr]
    saved = strategy.lightning_module_state_dict()
    return [weights(strategy), losses, sorted(dtypes), [str(model.offset.dtype), str(saved["offset"].dtype)]]


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_trains_the_same_weights(name: str) -> None:
    reference = SingleDeviceStrategy(precision=PRECISIONS[name]())
    optimizer = set_up(reference, Net(), lr=0.1)
    fit(reference, optimizer, [reference.precision.convert_input(batch) for batch in batches()], clip=(5.0, "norm"))
    expected, tolerance = weights(reference), 1e-12 if name == "64-true" else 2e-2
    for found, losses, dtypes, _ in run(in_precision, 2, name, "net", None):
        assert dtypes == [str(DTYPES.get(name.split()[-1], torch.float32))]
        found.pop("offset")
        assert largest_difference(found, expected) < tolerance
        assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize("policy", ["new", "old"])
def test_policy_of_mixed_precision_computes_in_it_and_keeps_float32(policy: str) -> None:
    expected = alone("normalises", "sgd", {})[0]
    for found, _, dtypes, buffers in run(in_precision, 2, "32-true", "normalises", policy):
        found.pop("offset")
        assert dtypes == ["torch.float32"]
        assert buffers == ["torch.bfloat16" if policy == "old" else "torch.float32", "torch.float32"]
        assert largest_difference(found, expected) > 1e-6


def scaled(rank: int, size: int, module: str, optimizer: str, clip: bool) -> list[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)  # type: ignore[attr-defined]
    strategy = fsdp(size, precision=MixedPrecision("16-mixed", "cpu", scaler))
    kind, options = OPTIMIZERS[optimizer]
    prepared = set_up(strategy, MODULES[module](), kind, **options)
    before = weights(strategy)
    data = [part(batch, rank, size) for batch in batches()]
    if rank == 1:
        data[1] = data[1] * float("inf")  # one process alone overflows, and all have to leave the step out
    fit(strategy, prepared, data[1:2], clip=(1e3, "norm") if clip else None)
    skipped = weights(strategy) == before
    fit(strategy, prepared, [data[0], data[2], data[3]], clip=(1e3, "norm") if clip else None)
    return [weights(strategy), scaler.get_scale(), skipped]


@pytest.mark.parametrize(("module", "optimizer", "clip"), [("net", "sgd", False), ("odd", "sgd", True), ("odd", "fused", False)])
def test_scaler_leaves_out_a_step_in_all_processes_when_one_overflows(module: str, optimizer: str, clip: bool) -> None:
    results = run(scaled, 2, module, optimizer, clip)
    assert results[0] == results[1]
    assert results[0][1:] == [2.0**9, True]
    strategy = SingleDeviceStrategy()
    kind, options = OPTIMIZERS[optimizer]
    prepared = set_up(strategy, MODULES[module](), kind, **options)
    data = batches()
    fit(strategy, prepared, [data[0], data[2], data[3]])
    assert largest_difference(results[0][0], weights(strategy)) < 1e-2  # what float16 leaves


# ---- what a module keeps ------------------------------------------------------------------------------------------------


def synchronised(rank: int, size: int) -> list[Any]:
    strategy = fsdp(size)
    strategy.layer_sync = TorchSyncBatchNorm()
    optimizer = set_up(strategy, Net(normalises=True), lr=0.02, momentum=0.9)
    fit(strategy, optimizer, [part(batch, rank, size) for batch in batches()])
    return [weights(strategy)]


def test_batch_normalisation_over_all_processes_is_that_of_one() -> None:
    expected = alone("normalises", "sgd", {})[0]
    for (found,) in run(synchronised, 2):
        assert largest_difference(found, expected) < 5e-6


def unfrozen(rank: int, size: int) -> list[Any]:
    module = Net()
    module.first.requires_grad_(False)
    strategy = fsdp(size)
    optimizer = set_up(strategy, module, lr=0.1)
    data = [part(batch, rank, size) for batch in batches()]
    fit(strategy, optimizer, data[:2])
    module.first.requires_grad_(True)
    fit(strategy, optimizer, data[2:])
    return [weights(strategy)]


def test_unit_that_is_thawed_later_is_trained() -> None:
    module = Net()
    module.first.requires_grad_(False)
    strategy = SingleDeviceStrategy()
    optimizer = set_up(strategy, module, lr=0.1)
    fit(strategy, optimizer, batches()[:2])
    module.first.requires_grad_(True)
    fit(strategy, optimizer, batches()[2:])
    for (found,) in run(unfrozen, 2):
        assert largest_difference(found, weights(strategy)) < TOLERANCE


def between_steps(rank: int, size: int) -> dict[str, Any]:
    """What holds outside of steps, and what does when parts are called there."""
    strategy = fsdp(size, auto_wrap_policy=lambda module: module is model.optional)
    model: Any = Odd()
    reference = Odd()
    set_up(strategy, model, lr=0.1)
    batch = batches()[0]
    facts: dict[str, Any] = {}
    with torch.no_grad():
        facts["validation"] = torch.equal(strategy.bind("validation_step")(batch, 0), reference(batch))
        facts["called"] = torch.equal(model(batch), reference(batch))
        facts["part"] = torch.equal(model.last(torch.ones(1, 7)), reference.last(torch.ones(1, 7)))
        facts["unit"] = torch.equal(model.optional(torch.ones(1, 7)), reference.optional(torch.ones(1, 7)))
    with torch.inference_mode():
        strategy.bind("validation_step")(batch, 0)
    facts["divided"] = all(hasattr(parameter, "placements") for parameter in model.parameters())
    strategy.backward(strategy.bind("training_step")(batch, 0))
    facts["names"] = list(model.state_dict()) == list(reference.state_dict())
    facts["gradient"] = full_tensor(model.last.weight.grad).shape == (1, 7)
    with pytest.raises(ZeroDivisionError):
        strategy.as_forward(model, lambda: model(batch) / (1 // 0))()
    with torch.no_grad():  # after the error all goes on
        facts["after"] = torch.equal(strategy.bind("validation_step")(batch, 0), reference(batch))
    strategy.teardown()
    again = fsdp(size)
    again.connect(model)
    facts["same"] = again.setup_module(model, training=False) is model
    with torch.no_grad():
        facts["later"] = torch.equal(again.bind("validation_step")(batch, 0), reference(batch))
    return facts


def test_module_is_divided_between_steps_and_can_be_called_there() -> None:
    for facts in run(between_steps, 2):
        assert [name for name, value in facts.items() if value is not True] == []


def divided_by_the_user(rank: int, size: int, whole: bool, precision: str | None) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module: Any = Net()
    mesh = init_device_mesh("cpu", (size,))
    for unit in (module.first, module.last, *((module,) if whole else ())):
        fully_shard(unit, mesh=mesh)
    strategy = fsdp(size, auto_wrap_policy=None, precision=PRECISIONS[precision]() if precision else None)
    optimizer = set_up(strategy, module, lr=0.02, momentum=0.9)
    fit(strategy, optimizer, [strategy.precision.convert_input(part(batch, rank, size)) for batch in batches()])
    root = root_of(module)
    assert root is not None
    return [weights(strategy), len(root.units), str(module.first.weight.dtype)]


@pytest.mark.parametrize(("whole", "precision"), [(True, None), (False, None), (True, "64-true")])
def test_module_that_the_user_has_divided_is_not_divided_twice(whole: bool, precision: str | None) -> None:
    for found, units, dtype in run(divided_by_the_user, 2, whole, precision):
        assert units == 3
        assert dtype == ("torch.float64" if precision else "torch.float32")
        assert largest_difference(found, alone("net", "sgd", {})[0]) < TOLERANCE


def interrupted(rank: int, size: int) -> list[Any]:
    """A run that ends within a window, and another one with the same module."""
    data = [part(batch, rank, size) for batch in batches()]
    module = Odd()
    strategy = fsdp(size)
    set_up(strategy, module, lr=0.1)
    with strategy.no_backward_sync():
        strategy.backward(strategy.bind("training_step")(data[0] * 5, 0))
    strategy.teardown()
    strategy = fsdp(size)
    fit(strategy, set_up(strategy, module, lr=0.02, momentum=0.9), data)
    return [weights(strategy)]


def test_gradients_of_a_window_that_was_not_finished_are_gone_in_the_next_run() -> None:
    for (found,) in run(interrupted, 2):
        assert largest_difference(found, alone("odd", "sgd", {})[0]) < TOLERANCE
