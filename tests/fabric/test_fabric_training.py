"""Loops over Fabric on one device give, bit by bit, what the same loops without it give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision
from lightning.fabric.strategies import SingleDeviceStrategy

STEPS = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def loader() -> DataLoader[Any]:
    torch.manual_seed(5)
    inputs = torch.randn(STEPS * 4, 5)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)


def optimizer_of(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


Cast = Callable[[Any], Any]


def by_hand(convert: Cast, context: Callable[[], AbstractContextManager[Any]], accumulate: int = 1) -> tuple[list[float], list[Tensor]]:
    """A loop that does by hand what Fabric is asked for."""
    module = convert(Net())
    optimizer = optimizer_of(module)
    losses = []
    for index, (inputs, target) in enumerate(loader()):
        with context():
            output = module(convert(inputs))
        loss = loss_of(output.float(), target)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, list(module.parameters())


def with_fabric(fabric: Fabric, accumulate: int = 1, compiled: bool = False) -> tuple[list[float], list[Tensor]]:
    module = Net()
    model, optimizer = fabric.setup(torch.compile(module, backend="eager") if compiled else module, optimizer_of(module))
    losses = []
    for index, (inputs, target) in enumerate(fabric.setup_dataloaders(loader())):
        last = (index + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            loss = loss_of(model(inputs), target)
            fabric.backward(loss / accumulate)
        if last:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, list(model.parameters())


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def unchanged(value: Any) -> Any:
    return value


WAYS: dict[str, tuple[Cast, Callable[[], AbstractContextManager[Any]]]] = {
    "32-true": (unchanged, nullcontext),
    "64-true": (lambda value: value.double(), nullcontext),
    "bf16-true": (lambda value: value.bfloat16(), nullcontext),
    "bf16-mixed": (unchanged, autocast),
}


def assert_same(found: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]]) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1]))


@pytest.mark.parametrize("precision", WAYS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_and_weights_are_those_of_the_loop_by_hand(precision: str, accumulate: int) -> None:
    found = with_fabric(Fabric(accelerator="cpu", precision=precision), accumulate)
    assert_same(found, by_hand(*WAYS[precision], accumulate))
    assert len(set(found[0])) == STEPS


def test_compiled_module_is_compiled_again_and_trains_alike() -> None:
    assert_same(with_fabric(Fabric(accelerator="cpu"), compiled=True), by_hand(*WAYS["32-true"]))


def test_callables_that_the_optimizer_calls_train_alike() -> None:
    fabric = Fabric(accelerator="cpu")
    module = Net()
    model, optimizer = fabric.setup(module, torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3))
    losses = []
    for inputs, target in loader():

        def closure(inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(inputs), target)
            fabric.backward(loss)
            return loss

        losses.append(optimizer.step(closure).item())
    expected = []
    module = Net()
    plain = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)
    for inputs, target in loader():

        def by_hand_closure(inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            plain.zero_grad()
            loss = loss_of(module(inputs), target)
            loss.backward()
            return loss

        expected.append(plain.step(by_hand_closure).item())  # type: ignore[attr-defined]
    assert losses == expected


# ---- several modules ----------------------------------------------------------------------------------------------------


def adversaries(module: Callable[[nn.Module, torch.optim.Optimizer], Any], backward: Callable[[Tensor], None]) -> Iterator[float]:
    """A loop over two modules, each with an optimizer of its own, the second of which sees what the first makes."""
    first, second = Net(), nn.Linear(1, 1)
    (maker, maker_optimizer), (critic, critic_optimizer) = (module(each, optimizer_of(each)) for each in (first, second))
    for inputs, target in loader():
        critic_optimizer.zero_grad()
        critic_loss = loss_of(critic(maker(inputs).detach()), target)
        backward(critic_loss)
        critic_optimizer.step()
        maker_optimizer.zero_grad()
        maker_loss = -critic(maker(inputs)).mean()
        backward(maker_loss)
        maker_optimizer.step()
        yield maker_loss.item() + critic_loss.item()


def test_several_modules_and_optimizers_train_alike() -> None:
    fabric = Fabric(accelerator="cpu")
    found = list(adversaries(fabric.setup, fabric.backward))
    assert found == list(adversaries(lambda *pair: pair, lambda loss: loss.backward()))


# ---- clipping -----------------------------------------------------------------------------------------------------------


def gradients(fabric: Fabric) -> tuple[Any, Any, list[Tensor]]:
    module = Net()
    model, optimizer = fabric.setup(module, optimizer_of(module))
    inputs, target = next(iter(loader()))
    fabric.backward(loss_of(model(inputs), target))
    return model, optimizer, [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_by_norm_returns_the_norm_and_scales(norm_type: float) -> None:
    fabric = Fabric(accelerator="cpu")
    model, optimizer, before = gradients(fabric)
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.01, norm_type=norm_type)
    assert norm is not None
    assert norm.item() == pytest.approx(torch.nn.utils.get_total_norm(before, norm_type).item())
    for old, parameter in zip(before, model.parameters()):
        assert torch.allclose(parameter.grad, old * 0.01 / norm, atol=1e-6)


def test_clipping_by_value_limits_each_element() -> None:
    fabric = Fabric(accelerator="cpu")
    model, optimizer, before = gradients(fabric)
    assert fabric.clip_gradients(model.module, optimizer.optimizer, clip_val=0.01) is None
    assert all(torch.equal(p.grad, old.clamp(-0.01, 0.01)) for old, p in zip(before, model.parameters()))


def test_norm_that_is_not_finite_is_an_error_unless_it_is_allowed() -> None:
    fabric = Fabric(accelerator="cpu")
    model, optimizer, _ = gradients(fabric)
    next(model.parameters()).grad.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False).isinf()  # type: ignore[union-attr]


# ---- scaled losses ------------------------------------------------------------------------------------------------------


def scaling() -> Fabric:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)  # type: ignore[attr-defined]
    return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))


def test_scaled_gradients_are_clipped_in_their_true_size() -> None:
    fabric = scaling()
    model, optimizer, before = gradients(fabric)
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.01)
    assert norm is not None
    assert norm.item() == pytest.approx(torch.nn.utils.get_total_norm(before).item() / 2**8)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)
    optimizer.step()


def test_backward_past_fabric_is_an_error_where_the_loss_is_scaled() -> None:
    fabric = scaling()
    model = fabric.setup(Net())
    inputs, target = next(iter(loader()))
    with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
        loss_of(model(inputs), target).backward()
    fabric.backward(loss_of(model(inputs), target))


def test_backward_past_fabric_is_fine_where_it_is_the_same() -> None:
    model = Fabric(accelerator="cpu", precision="bf16-mixed").setup(Net())
    model(torch.ones(1, 5)).sum().backward()


class Own(Precision):
    """A precision of the user's own."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def backward(self, tensor: Tensor, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        self.seen.append((model, args, kwargs))
        super().backward(tensor, model, *args, **kwargs)


def test_precision_of_ones_own_gets_what_backward_was_given() -> None:
    precision = Own()
    fabric = Fabric(accelerator="cpu", plugins=precision)
    model = fabric.setup(Net())
    fabric.backward(model(torch.ones(1, 5)).sum(), retain_graph=True)
    fabric.backward(model(torch.ones(2, 5)), torch.ones(2, 1), model=model)
    (none, no_args, kwargs), (module, args, _) = precision.seen
    assert none is None
    assert no_args == ()
    assert kwargs == {"retain_graph": True}
    assert module is model.module
    assert torch.equal(args[0], torch.ones(2, 1))
    with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
        model(torch.ones(1, 5)).sum().backward()


class Stepping(SingleDeviceStrategy):
    """A strategy of the user's own, which counts."""

    steps = 0

    def optimizer_step(self, optimizer: Any, closure: Any = None, **kwargs: Any) -> Any:
        self.steps += 1
        return super().optimizer_step(optimizer, closure, **kwargs)


def test_strategy_of_ones_own_steps_the_optimizers() -> None:
    strategy = Stepping()
    with_fabric(Fabric(accelerator="cpu", strategy=strategy), accumulate=2)
    assert strategy.steps == STEPS // 2
