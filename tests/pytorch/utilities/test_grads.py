"""Norms of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning.pytorch.utilities import grad_norm


@pytest.fixture
def module() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    module(torch.ones(1, 2)).sum().backward()
    module[0].bias.grad = None
    return module


@pytest.mark.parametrize(("norm_type", "name"), [(2, "2.0"), ("2", "2.0"), (1, "1.0"), (0.5, "0.5"), ("inf", "inf"), (float("inf"), "inf")])
def test_norm_of_each_gradient_and_of_all(module: nn.Module, norm_type: Any, name: str) -> None:
    norms = grad_norm(module, norm_type)
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert list(norms) == [f"grad_{name}_norm/0.weight", f"grad_{name}_norm/1.weight", f"grad_{name}_norm_total"]
    for key, grad in grads.items():
        torch.testing.assert_close(norms[f"grad_{name}_norm/{key}"], grad.flatten().norm(float(norm_type)))
    everything = torch.cat([grad.flatten() for grad in grads.values()])
    torch.testing.assert_close(norms[f"grad_{name}_norm_total"], everything.norm(float(norm_type)))


def test_separator_stands_before_the_name(module: nn.Module) -> None:
    assert next(iter(grad_norm(module, 2, group_separator="-"))) == "grad_2.0_norm-0.weight"


def test_no_gradients_give_no_norms() -> None:
    assert grad_norm(nn.Linear(2, 2), 2) == {}


@pytest.mark.parametrize("norm_type", [0, -1, "x", None, float("nan")])
def test_wrong_norm_type_raises(norm_type: Any) -> None:
    with pytest.raises(ValueError, match=r"norm_type=.*above 0, or 'inf'"):
        grad_norm(nn.Linear(2, 2), norm_type)
