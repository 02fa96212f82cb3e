"""The extremes by which checkpoints are looked through for what is no number."""

from __future__ import annotations

import pytest
import torch

from lightning.pytorch.utilities import finite


@pytest.mark.parametrize("least", [0, 2**40])  # with a second thread, and without
def test_extremes_are_those_of_each_tensor_in_order(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "WORTH_A_THREAD", least)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    tensors = [torch.arange(index, index + 1000, dtype=torch.float32) for index in range(50)]
    tensors[7][3] = float("nan")
    tensors[8][3] = float("inf")
    found = [each.tolist() for each in finite._extremes(tensors)]
    assert found[:7] == [[index, index + 999] for index in range(7)]
    assert all(value != value for value in found[7])
    assert found[8] == [8, float("inf")]
    assert found[9:] == [[index, index + 999] for index in range(9, 50)]
