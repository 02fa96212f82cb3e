"""Batch normalisation over the batches of all processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run

from lightning.fabric.plugins.layer_sync import HostSyncBatchNorm, LayerSync, TorchSyncBatchNorm
from lightning.pytorch.plugins import layer_sync as documented


class Activated(nn.BatchNorm1d):
    """A layer with a forward of its own, as some libraries have."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def model() -> nn.Sequential:
    shared = nn.BatchNorm1d(3)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(shared, nn.BatchNorm3d(4, affine=False)), shared)


def test_layers_are_replaced_and_put_back() -> None:
    sync, module = TorchSyncBatchNorm(), model()
    calls: list[Any] = []
    module[1].register_forward_hook(lambda *_: calls.append(1))
    weight, before = module[1].weight, {name: type(layer) for name, layer in module.named_modules()}
    module.eval()
    synced = sync.apply(module)
    assert synced is module
    assert [type(layer) for layer in (synced[1], synced[2][0], synced[2][1])] == [nn.SyncBatchNorm] * 3  # type: ignore[index]
    assert synced[3] is synced[2][0]  # type: ignore[index]
    assert synced[1].weight is weight
    assert not synced[1].training
    synced[1](torch.ones(1, 2, 4, 4))
    assert calls == [1]
    assert sync.apply(synced)[1] is synced[1]  # type: ignore[index]
    assert {name: type(layer) for name, layer in sync.revert(synced).named_modules()} == before
    assert sync.revert(synced)[1].weight is weight  # type: ignore[index]


def test_state_has_the_same_names_and_values() -> None:
    module = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    after = TorchSyncBatchNorm().apply(module).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_single_layer_is_replaced_too() -> None:
    assert type(TorchSyncBatchNorm().apply(nn.BatchNorm1d(2))) is nn.SyncBatchNorm


def test_layers_that_were_synchronised_before_stay_so() -> None:
    module = nn.Sequential(nn.SyncBatchNorm(2))
    sync = TorchSyncBatchNorm()
    assert type(sync.revert(sync.apply(module))[0]) is nn.SyncBatchNorm  # type: ignore[index]


def test_layer_with_a_forward_of_its_own_stays_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Activated has a `forward` of its own"):
        module = TorchSyncBatchNorm().apply(nn.Sequential(Activated(2)))
    assert type(module[0]) is Activated  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_layer_of_unknown_size_raises() -> None:
    module = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="LazyBatchNorm1d has not seen a batch"):
        TorchSyncBatchNorm().apply(module)


def test_interface_alone_cannot_be_used_and_the_documented_path_is_ours() -> None:
    with pytest.raises(TypeError, match="abstract"):
        LayerSync()  # type: ignore[abstract]
    assert documented.LayerSync is LayerSync
    assert documented.TorchSyncBatchNorm is TorchSyncBatchNorm


# ---- between processes ------------------------------------------------------------------------------------------------

SIZES = [1, 5, 0]  # samples of each process


def everything(*shape: int) -> Tensor:
    return torch.randn(sum(SIZES), *shape, generator=torch.Generator().manual_seed(2)) * 3 + 100  # far from 0


def normalised(layer: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
    data = data.clone().requires_grad_()
    weights = torch.arange(1.0, 4.0).view(1, 3, *[1] * (data.dim() - 2))
    output = layer(data)
    (output.pow(3) * weights).sum().backward()
    assert data.grad is not None
    return output.detach(), data.grad


def in_processes(rank: int, size: int, kwargs: dict[str, Any], shape: list[int]) -> dict[str, Any]:
    layer = TorchSyncBatchNorm().apply(nn.BatchNorm2d(3, **kwargs) if len(shape) > 1 else nn.BatchNorm1d(3, **kwargs))
    assert type(layer) is HostSyncBatchNorm
    mine = everything(*shape).split(SIZES)[rank]
    normalised(layer, mine)
    output, gradient = normalised(layer, mine)
    weight = getattr(layer, "weight", None)
    if weight is not None:  # each process has its part of the gradient of parameters, as DistributedDataParallel expects
        torch.distributed.all_reduce(weight.grad)
    half = layer(mine.to(torch.bfloat16)).dtype
    layer.eval()
    return {
        "output": output.tolist(),
        "gradient": gradient.tolist(),
        "weight": None if weight is None else weight.grad.tolist(),
        "half": str(half),
        "evaluation": layer(everything(*shape)).shape == (sum(SIZES), *shape),
        "class": type(TorchSyncBatchNorm().revert(layer)).__name__,
    }


@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("shape", [[3], [3, 2, 4]])
def test_processes_normalise_like_one_with_all_of_the_data(kwargs: dict[str, Any], shape: list[int]) -> None:
    layer = nn.BatchNorm2d(3, **kwargs) if len(shape) > 1 else nn.BatchNorm1d(3, **kwargs)
    normalised(layer, everything(*shape))
    output, gradient = normalised(layer, everything(*shape))
    results = run(in_processes, len(SIZES), kwargs, shape)
    torch.testing.assert_close(torch.cat([torch.tensor(r["output"]).reshape(-1, *shape) for r in results]), output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.cat([torch.tensor(r["gradient"]).reshape(-1, *shape) for r in results]), gradient, atol=1e-3, rtol=1e-3
    )
    for result in results:
        assert (result["half"], result["evaluation"], result["class"]) == ("torch.bfloat16", True, type(layer).__name__)
        if layer.weight is not None:
            torch.testing.assert_close(torch.tensor(result["weight"]), layer.weight.grad, atol=1e-2, rtol=1e-4)


def running_statistics(rank: int, size: int, momentum: float | None) -> list[Any]:
    layer = TorchSyncBatchNorm().apply(nn.BatchNorm1d(3, momentum=momentum))
    for _ in range(3):
        layer(everything(3).split(SIZES)[rank])
    return [layer.running_mean.tolist(), layer.running_var.tolist(), layer.num_batches_tracked.item()]  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_all_of_the_data(momentum: float | None) -> None:
    layer = nn.BatchNorm1d(3, momentum=momentum)
    for _ in range(3):
        layer(everything(3))
    for mean, variance, count in run(running_statistics, len(SIZES), momentum):
        torch.testing.assert_close(torch.tensor(mean), layer.running_mean)
        torch.testing.assert_close(torch.tensor(variance), layer.running_var)
        assert count == 3


def with_too_little(rank: int, size: int) -> list[str]:
    layer, messages = TorchSyncBatchNorm().apply(nn.BatchNorm1d(3)), []
    for data in (torch.ones(1 - rank, 3), torch.ones(3)):
        with pytest.raises(ValueError) as raised:
            layer(data)
        messages.append(str(raised.value))
    return messages


def test_one_value_in_all_processes_is_too_little() -> None:
    for too_few, too_flat in run(with_too_little, 2):
        assert "expected more than 1 value per channel over all processes" in too_few
        assert "at least 2 dimensions" in too_flat
