"""Clipped gradients and other precisions are what torch alone makes of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

EPOCHS = 3


def loop(
    clip: Callable[[Any], Any] | None = None, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[[Any, Any, Any], list[Tensor]]:
    """A hand-written loop with clipping, and with a context around the forward pass."""

    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        losses = []
        for _ in range(EPOCHS):
            for batch in loader:
                with context():
                    loss = net.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                if clip is not None:
                    clip(net.parameters())
                optimizer.step()
                losses.append(loss.detach())
        return losses

    return by_hand


def adamw(net: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.02, **options)


autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
@pytest.mark.parametrize("optimizer", [adamw, lambda net: torch.optim.SGD(net.parameters(), lr=0.2)], ids=["AdamW", "SGD"])
def test_parity_of_clipping(parity: Any, optimizer: Any, algorithm: str | None) -> None:
    value = 0.01 if algorithm == "value" else 0.1
    clip = partial(clip_grad_value_, clip_value=value) if algorithm == "value" else partial(clip_grad_norm_, max_norm=value)
    parity(loop(clip), optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm, max_epochs=EPOCHS)


def test_parity_of_clipping_in_the_hook(parity: Any, Trained: Any) -> None:
    class ClipsItself(Trained):  # type: ignore[misc, valid-type]
        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    parity(loop(partial(clip_grad_norm_, max_norm=0.1)), adamw, module=ClipsItself, max_epochs=EPOCHS)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("clip", [None, 0.1], ids=["", "clipped"])
def test_parity_of_bf16_mixed(parity: Any, clip: float | None, fused: bool) -> None:
    by_hand = loop(None if clip is None else partial(clip_grad_norm_, max_norm=clip), autocast)
    parity(by_hand, partial(adamw, fused=fused), precision="bf16-mixed", gradient_clip_val=clip, max_epochs=EPOCHS)


def test_parity_of_bf16_mixed_with_dropout_and_accumulation(parity: Any, Net: Any) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        losses = []
        for _ in range(EPOCHS):
            for index, batch in enumerate(loader):
                with autocast():
                    loss = net.loss(batch)
                if index % 3 == 0:
                    optimizer.zero_grad()
                (loss / (3 if index < 9 else 2)).backward()
                if index % 3 == 2 or index == 10:
                    optimizer.step()
                losses.append(loss.detach())
        return losses

    parity(by_hand, adamw, net=lambda: Net(dropout=0.3), precision="bf16-mixed", accumulate_grad_batches=3, max_epochs=EPOCHS)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("16-true", torch.float16), ("bf16-true", torch.bfloat16)])
def test_parity_of_true_precision(parity: Any, precision: str, dtype: torch.dtype) -> None:
    def by_hand(net: Any, loader: Any, optimizer: Any) -> list[Tensor]:
        net.to(dtype)  # in place, so that the optimizer goes on with the same parameters
        outer = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            converted = ([(x.to(dtype), y) for x, y in loader] for _ in range(EPOCHS))
            losses = []
            for epoch in converted:
                for batch in epoch:
                    loss = net.loss(batch)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
        finally:
            torch.set_default_dtype(outer)
        assert all(loss.dtype == dtype for loss in losses)
        return losses

    parity(by_hand, lambda net: torch.optim.SGD(net.parameters(), lr=0.1), precision=precision, max_epochs=EPOCHS)
    assert torch.get_default_dtype() == torch.float32
