"""Random numbers that stay out of the way."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lightning.pytorch.utilities.seed import isolate_rng


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("include_cuda", [True, False])
def test_isolate_rng_leaves_no_trace(include_cuda: bool) -> None:
    draw()
    with isolate_rng(include_cuda):
        inside = draw()
    assert draw() == inside
    assert draw() != inside


def test_isolate_rng_leaves_no_trace_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolate_rng():
        _ = torch.rand(1) / 0, 1 / 0
    assert torch.equal(torch.get_rng_state(), state)
