"""What Fabric gives back: modules, optimizers and loaders that are those of the user in all but how they run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning.fabric.precision import Precision, build_precision
from lightning.fabric.strategies import Strategy
from lightning.fabric.utilities.device_dtype_mixin import DeviceDtypeMixin
from lightning.fabric.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer, _unwrap_objects, is_wrapped


class Net(nn.Module):
    KIND = "net"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.number = 5

    @property
    def doubled(self) -> int:
        return 2 * self.number

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        return {"y": [self.layer(x) * scale], "autocast": torch.is_autocast_enabled("cpu")}

    def training_step(self, x: Tensor, batch_idx: int) -> dict[str, Any]:
        return self.forward(x)

    def generate(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def total(self) -> Tensor:
        return self.layer.weight.sum()

    def grow(self) -> int:
        self.number += 1
        return self.number


class Wrapper(nn.Module):
    """What a strategy might put around a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.passes = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        return self.module(*args, **kwargs)


class Wrapping(Strategy):
    """Runs methods through its wrapper, and counts."""

    def as_forward(self, module: Any, method: Any) -> Any:
        def through(*args: Any, **kwargs: Any) -> Any:
            module.passes += 1
            return method(*args, **kwargs)

        return through


def strategy(precision: str = "32-true", kind: type[Strategy] = Strategy) -> Strategy:
    return kind(precision=build_precision(precision, "cpu"))


def wrapped() -> tuple[Net, Wrapper, _FabricModule]:
    net = Net()
    wrapper = Wrapper(net)
    return net, wrapper, _FabricModule(wrapper, strategy(kind=Wrapping), net)


# ---- modules: attributes ------------------------------------------------------------------------------------------------


def test_attributes_are_read_and_set_in_the_module() -> None:
    net, _, model = wrapped()
    assert (model.number, model.doubled, model.KIND, model.layer) == (5, 10, "net", net.layer)
    model.number = 6
    model.fresh = 7
    model.other = nn.Linear(1, 1)
    assert (net.number, net.fresh, net.other) == (6, 7, model.other)
    assert "fresh" not in vars(model)
    del model.fresh
    assert not hasattr(net, "fresh")
    assert model.grow() == 7
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'missing'"):
        _ = model.missing


def test_methods_of_torch_reach_the_parameters_once() -> None:
    net, _, model = wrapped()
    assert list(model.parameters()) == list(net.parameters())
    model.eval()
    assert not net.training
    model.train().requires_grad_(False)
    assert net.training
    assert not net.layer.weight.requires_grad
    assert model.to(torch.float64).dtype == torch.float64
    assert net.layer.weight.dtype == torch.float64
    assert model.device == torch.device("cpu")
    assert isinstance(model, DeviceDtypeMixin)


def test_weights_have_the_names_of_the_module() -> None:
    net, _, model = wrapped()
    assert list(model.state_dict()) == list(net.state_dict())
    assert list(model.state_dict(prefix="x.")) == ["x.layer.weight", "x.layer.bias"]
    result = model.load_state_dict({"layer.weight": torch.zeros(3, 2)}, strict=False)
    assert result.missing_keys == ["layer.bias"]
    assert net.layer.weight.abs().sum() == 0
    with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict for Net"):
        model.load_state_dict({})


def test_copies_are_independent_and_share_the_strategy() -> None:
    _, wrapper, model = wrapped()
    x = torch.ones(1, 2)
    model.training_step(x, 0)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.layer.weight.zero_()
        clone.layer.bias.zero_()
    assert clone._strategy is model._strategy
    assert clone.training_step(x, 0)["y"][0].abs().sum() == 0
    assert model.training_step(x, 0)["y"][0].abs().sum() > 0
    assert wrapper.passes == 2
    loaded = pickle.loads(pickle.dumps(_FabricModule(nn.Linear(1, 1), Strategy())))
    assert loaded(torch.ones(1, 1)).shape == (1, 1)


# ---- modules: calls -----------------------------------------------------------------------------------------------------


def test_call_takes_and_gives_any_structure() -> None:
    _, wrapper, model = wrapped()
    x = torch.ones(1, 2)
    assert torch.equal(model(x, scale=2.0)["y"][0], 2 * model(x)["y"][0])
    assert wrapper.passes == 2


@pytest.mark.parametrize(("precision", "inner"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_steps_and_marked_methods_run_in_the_precision_of_a_forward_pass(precision: str, inner: torch.dtype) -> None:
    chosen = strategy(precision)
    model = _FabricModule(chosen.precision.convert_module(Net()), chosen)
    assert model.dtype == inner
    x = torch.ones(1, 2)
    expected = model(x)
    found = model.training_step(x, 0)
    assert found["autocast"] is expected["autocast"] is (precision == "bf16-mixed")
    assert found["y"][0].dtype == torch.float32
    assert torch.equal(found["y"][0], expected["y"][0])
    model.mark_forward_method("generate")
    model.mark_forward_method(model.module.total)
    assert torch.equal(model.generate(x), expected["y"][0])
    assert model.total().dtype == torch.float32
    assert model.generate.__name__ == "generate"


def test_steps_and_marked_methods_run_under_the_strategy() -> None:
    _, wrapper, model = wrapped()
    x = torch.ones(1, 2)
    model.training_step(x, batch_idx=0)
    model.mark_forward_method("generate")
    model.generate(x)
    assert wrapper.passes == 2
    model.module.__dict__["generate"] = lambda x: x  # replaced on the instance: no method of the class any more
    assert model.generate(x) is x


def test_unmarked_methods_that_compute_are_refused_where_the_strategy_would_not_see_them() -> None:
    net, _, model = wrapped()
    x = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match=r"call `model.mark_forward_method\('generate'\)`"):
        model.generate(x)
    assert torch.equal(model.total(), net.total())  # no submodule is called
    with torch.no_grad():
        assert model.generate(x).shape == (1, 3)
    model._strategy.forward_is_collective = True
    with torch.no_grad(), pytest.raises(RuntimeError, match="mark_forward_method"):
        model.generate(x)
    net.generate(x)  # the refusal ends with the call


def test_unmarked_methods_run_as_they_are_without_a_wrapper() -> None:
    net = Net()
    model = _FabricModule(net, Strategy())
    assert model.generate == net.generate
    assert model.training_step == net.training_step


@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        ("missing", AttributeError, "Net has no method of that name"),
        ("number", AttributeError, "Net has no method of that name"),
        ("forward", ValueError, "needs no mark"),
        (3, TypeError, "got 3, a int"),
    ],
)
def test_marks_are_for_methods(method: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        _FabricModule(Net(), Strategy()).mark_forward_method(method)


def test_steps_of_a_compiled_module_are_compiled_too() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    net = Net()
    optimized = torch.compile(net, backend=backend)
    model = _FabricModule(optimized, Strategy(), net)
    x = torch.ones(1, 2)
    model(x)
    assert len(compiled) == 1
    for _ in range(3):
        assert torch.equal(model.training_step(x, 0)["y"][0], net(x)["y"][0])
    assert len(compiled) == 2
    assert model.generate(x).shape == (1, 3)


class Raising(Strategy):
    """An engine that runs backward in its own way."""

    def backward(self, tensor: Tensor, module: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("kind", "refused"), [(Strategy, False), (Raising, True)])
def test_direct_backward_is_refused_where_the_strategy_has_its_own(kind: type[Strategy], refused: bool) -> None:
    loss = _FabricModule(Net(), kind())(torch.ones(1, 2))["y"][0].sum()
    if refused:
        with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
            loss.backward()
    else:
        loss.backward()


# ---- optimizers ---------------------------------------------------------------------------------------------------------


class Counting(Strategy):
    def optimizer_step(self, optimizer: Any, closure: Any = None, **kwargs: Any) -> Any:
        self.stepped = [*getattr(self, "stepped", []), optimizer]
        return super().optimizer_step(optimizer, closure, **kwargs)


def optimizer(kind: type[Strategy] = Counting) -> tuple[torch.optim.Adam, _FabricOptimizer, Any]:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    inner = torch.optim.Adam([parameter], lr=0.1)
    chosen = kind()
    return inner, _FabricOptimizer(inner, chosen), chosen


def test_optimizer_is_that_of_the_user_but_for_its_step() -> None:
    inner, outer, chosen = optimizer()
    assert isinstance(outer, torch.optim.Adam)
    assert type(outer).__name__ == "FabricAdam"
    assert repr(outer) == "Fabric" + repr(inner)
    assert outer.step() is None
    assert chosen.stepped == [inner]
    assert outer.step(lambda: 3.0) == 3.0
    assert outer.state is inner.state
    outer.param_groups[0]["lr"] = 0.5
    outer.note = "here"
    assert inner.param_groups[0]["lr"] == 0.5
    assert inner.note == "here"  # type: ignore[attr-defined]
    del outer.note
    assert not hasattr(inner, "note")
    outer.zero_grad()
    assert inner.param_groups[0]["params"][0].grad is None


def test_state_of_an_optimizer_goes_through_the_strategy() -> None:
    inner, outer, _ = optimizer()
    outer.step()
    state = outer.state_dict()
    assert state["state"][0]["step"] == 1
    other, wrapped_other, _ = optimizer()
    wrapped_other.load_state_dict(state)
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], inner.state_dict()["state"][0]["exp_avg"])


def test_schedulers_take_wrapped_optimizers() -> None:
    inner, outer, _ = optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(outer, step_size=1, gamma=0.1)
    outer.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.01)


def test_copies_of_an_optimizer_are_the_users() -> None:
    _, outer, _ = optimizer()
    assert type(copy.deepcopy(outer)) is torch.optim.Adam
    assert type(pickle.loads(pickle.dumps(outer))) is torch.optim.Adam


# ---- loaders ------------------------------------------------------------------------------------------------------------


class Moved:
    """A batch that notes where it goes."""

    def __init__(self) -> None:
        self.places: list[torch.device] = []

    def to(self, device: torch.device) -> Moved:
        self.places.append(device)
        return self


class Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter([[Moved()], {"x": Moved()}])


def test_batches_go_to_the_device() -> None:
    device = torch.device("meta")
    first, second = _FabricDataLoader(Loader([1, 2]), device)
    assert first[0].places == second["x"].places == [device]
    first, second = _FabricDataLoader(Loader([1, 2]))
    assert first[0].places == []


def test_loader_is_that_of_the_user_otherwise() -> None:
    inner = DataLoader(range(5), batch_size=2)
    loader = _FabricDataLoader(inner)
    assert len(loader) == 3
    assert loader.batch_size == 2
    assert loader.dataset is inner.dataset
    assert copy.copy(loader).sampler is inner.sampler
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'missing'"):
        _ = loader.missing


def sampled() -> tuple[_FabricDataLoader, DistributedSampler[Any]]:
    sampler: DistributedSampler[Any] = DistributedSampler(range(8), num_replicas=2, rank=0)
    return _FabricDataLoader(DataLoader(range(8), sampler=sampler)), sampler


def test_each_pass_is_an_epoch_of_the_sampler() -> None:
    loader, sampler = sampled()
    passes = [[batch.item() for batch in loader] for _ in range(3)]
    assert sampler.epoch == 2
    assert passes[0] != passes[1]
    sampler.set_epoch(0)
    assert list(sampler) == passes[0]


def test_epoch_that_the_user_has_told_counts() -> None:
    loader, sampler = sampled()
    sampler.set_epoch(4)
    list(loader)
    assert sampler.epoch == 4
    list(loader)
    assert sampler.epoch == 5
    sampler.set_epoch(2)
    list(loader)
    assert sampler.epoch == 2


# ---- and back -----------------------------------------------------------------------------------------------------------


def test_wrapped_things_are_told_from_others_and_unwrapped() -> None:
    net, _, model = wrapped()
    inner, outer, _ = optimizer()
    loader = DataLoader([1])
    compiled = torch.compile(model, backend="eager")
    things: dict[str, Any] = {"model": model, "rest": [outer, (_FabricDataLoader(loader), 3)], "compiled": compiled}
    assert all(map(is_wrapped, (model, outer, things["rest"][1][0], compiled)))
    assert not any(map(is_wrapped, (net, inner, loader, 3, torch.compile(net, backend="eager"))))
    assert _unwrap_objects(things) == {"model": net, "rest": [inner, (loader, 3)], "compiled": net}
    assert _unwrap_objects(compiled) is net
    assert isinstance(strategy().precision, Precision)
