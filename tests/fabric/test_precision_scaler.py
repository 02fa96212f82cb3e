"""Gradient scaling of 16-mixed, on the CPU, and clipping under every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.precision import MixedPrecision, Precision, build_precision
from lightning.fabric.utilities.exceptions import MisconfigurationException


def make_16_mixed(scale: float = 256.0) -> MixedPrecision:
    """With a scale that the small numbers of these tests don't overflow."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def make_model() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(4, 2)


def train(precision: Precision, fused: bool, clip: float | None, algorithm: str = "norm", steps: int = 5) -> Tensor:
    """Train as the Trainer does and return the weights."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            with precision.forward_context():
                loss = model(torch.full((3, 4), 1.0 + step)).float().pow(2).mean()
            optimizer.zero_grad()
            precision.backward(precision.pre_backward(loss, model), model)
            precision.unscale_gradients(optimizer)
            if clip is not None:
                precision.clip_gradients(optimizer, clip, algorithm)
            return loss

        precision.optimizer_step(optimizer, model=model, closure=closure)
    return model.weight.detach()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_fused_and_plain_optimizer_end_in_the_same_place_in_16_mixed(clip: float | None) -> None:
    plain = train(make_16_mixed(), fused=False, clip=clip)
    fused = train(make_16_mixed(), fused=True, clip=clip)
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_clips_gradients_of_their_true_size(fused: bool, algorithm: str) -> None:
    scaled = train(make_16_mixed(), fused, 0.05, algorithm)
    unscaled = train(make_16_mixed(1.0), fused, 0.05, algorithm)
    torch.testing.assert_close(scaled, unscaled)
    assert not torch.equal(scaled, train(make_16_mixed(), fused, None))


@pytest.mark.parametrize("name", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_may_be_clipped_in(name: str, algorithm: str) -> None:
    fused = train(build_precision(name, "cpu"), True, 0.05, algorithm)
    plain = train(build_precision(name, "cpu"), False, 0.05, algorithm)
    torch.testing.assert_close(fused, plain)
    assert not torch.equal(fused, train(build_precision(name, "cpu"), True, None))


def test_clip_gradients_bounds_norm_and_value() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    precision = Precision()
    precision.clip_gradients(optimizer, 5.0, "value")
    assert {p.grad.max().item() for p in precision.main_params(optimizer)} == {5.0}  # type: ignore[union-attr]
    precision.clip_gradients(optimizer, 0.0)
    precision.clip_gradients(optimizer, 1.0)
    norm = torch.cat([p.grad.flatten() for p in precision.main_params(optimizer)]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="gradient_clip_algorithm='foo'"):
        precision.clip_gradients(optimizer, 1.0, "foo")


def backward(precision: Precision, model: nn.Module, factor: float = 1.0) -> Tensor:
    with precision.forward_context():
        loss = model(torch.ones(1, 4)).float().pow(2).sum() * factor
    precision.backward(precision.pre_backward(loss, model), model)
    return loss


def test_unscale_gradients_may_be_asked_for_twice_and_without_gradients() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = make_16_mixed()
    precision.unscale_gradients(optimizer)
    backward(precision, model)
    scaled = model.weight.grad.clone()  # type: ignore[union-attr]
    precision.unscale_gradients(optimizer)
    once = model.weight.grad.clone()  # type: ignore[union-attr]
    torch.testing.assert_close(once * 256, scaled)
    precision.unscale_gradients(optimizer)
    assert torch.equal(once, model.weight.grad)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_leaves_the_step_out_and_lowers_the_scale(fused: bool, unscale: bool) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    precision = make_16_mixed()
    before = model.weight.detach().clone()
    backward(precision, model, factor=float("inf"))
    if unscale:
        precision.unscale_gradients(optimizer)
    precision.optimizer_step(optimizer)
    assert torch.equal(model.weight, before)
    assert precision.scaler is not None
    assert precision.scaler.get_scale() == 128.0
    optimizer.zero_grad()
    backward(precision, model)
    precision.optimizer_step(optimizer)
    assert not torch.equal(model.weight, before)


def test_two_optimizers_that_are_both_clipped_before_both_step() -> None:
    def run(precision: MixedPrecision) -> list[Tensor]:
        first, second = make_model(), make_model()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second)]
        backward(precision, first)
        backward(precision, second)
        for optimizer in optimizers:
            precision.clip_gradients(optimizer, 0.5)
        for optimizer in optimizers:
            precision.optimizer_step(optimizer)
        return [first.weight.detach(), second.weight.detach()]

    scaled = run(make_16_mixed())
    plain = run(make_16_mixed(1.0))
    torch.testing.assert_close(scaled, plain)
    torch.testing.assert_close(scaled[0], scaled[1])


def test_an_overflow_of_one_optimizer_does_not_change_the_size_of_the_other_ones_gradients() -> None:
    first, second, reference = make_model(), make_model(), make_model()
    precision = make_16_mixed()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second, reference)]
    backward(precision, first, factor=float("inf"))
    backward(precision, second)
    for optimizer in optimizers[:2]:
        precision.optimizer_step(optimizer)
    plain = make_16_mixed(1.0)
    backward(plain, reference)
    plain.optimizer_step(optimizers[2])
    torch.testing.assert_close(second.weight, reference.weight)


def test_one_optimizer_may_step_twice_on_one_backward_pass() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = make_16_mixed()
    backward(precision, model)
    precision.optimizer_step(optimizer)
    precision.optimizer_step(optimizer)


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_a_step_without_gradients_changes_nothing(closure: Any) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = make_16_mixed()
    before = model.weight.detach().clone()
    assert precision.optimizer_step(optimizer, model=model, closure=closure) is None
    assert torch.equal(before, model.weight)


def test_optimizer_step_returns_what_the_closure_returns() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = make_16_mixed()
    loss = precision.optimizer_step(optimizer, model=model, closure=lambda: backward(precision, model))
    assert isinstance(loss, Tensor)
    assert loss < 1000, "the loss, not the scaled loss"


def test_lbfgs_is_refused_with_a_scaler_and_runs_without() -> None:
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        make_16_mixed().optimizer_step(optimizer, closure=lambda: None)
    precision = build_precision("bf16-mixed", "cpu")

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(precision, model)

    before = closure()
    precision.optimizer_step(optimizer, closure=closure)
    assert closure() < before


def test_state_of_the_scaler_is_saved_and_restored() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = make_16_mixed()
    backward(precision, model, factor=float("inf"))
    precision.optimizer_step(optimizer)
    state = precision.state_dict()
    assert state["scale"] == 128.0, "the update that the step made due is in it"
    assert state == torch.amp.GradScaler("cpu", init_scale=128.0).state_dict()
    other = make_16_mixed()
    other.load_state_dict(state)
    assert other.scaler is not None
    assert other.scaler.get_scale() == 128.0


def test_bf16_mixed_has_no_scaler_and_no_state() -> None:
    precision = MixedPrecision("bf16-mixed", "cpu")
    assert precision.scaler is None
    assert precision.state_dict() == {}
    precision.load_state_dict({})
    loss = torch.ones(())
    assert precision.pre_backward(loss, None) is loss


def test_a_scaler_of_ones_own_is_used() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    assert precision.scaler is scaler
    assert precision.pre_backward(torch.ones(()), None) == 8.0
