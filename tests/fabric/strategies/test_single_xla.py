"""One XLA device, which is a CPU device of torch_xla: what it computes, and what comes back from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from training import Net, batches, largest_difference, plain, train
from xla_devices import IS_MISSING, REASON, run

from lightning.fabric.strategies import STRATEGY_REGISTRY, SingleDeviceStrategy, SingleDeviceXLAStrategy, SingleTPUStrategy
from lightning.fabric.utilities.rank_zero import LightningDeprecationWarning

needs_xla = pytest.mark.skipif(IS_MISSING, reason=REASON)
TOLERANCE = 1e-6


# ---- what one process with a device does; the tests below look at it ----------------------------------------------------


def on_device(strategy: Any) -> list[Tensor]:
    return [batch.to(strategy.root_device) for batch in batches()]


def made(**options: Any) -> SingleDeviceXLAStrategy:
    strategy = SingleDeviceXLAStrategy(0, **options)
    strategy.setup_environment()
    return strategy


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.second(torch.tanh(self.first(batch))) * self.scale).square().mean()


def everything(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    strategy = made()
    found["device"] = str(strategy.root_device)
    found["weights"] = train(strategy, Net(), on_device(strategy))
    found["accumulated"] = train(made(), Net(), on_device(strategy), accumulate=2)

    strategy, module = made(), Tied()
    weight = module.first.weight
    found["tied weights"] = train(strategy, module, on_device(strategy))
    found["on device"] = [str(tensor.device) for tensor in (*module.parameters(), *module.buffers())]
    optimizer = strategy.optimizers[0]
    held = optimizer.param_groups[0]["params"]
    found["same objects"] = module.first.weight is module.second.weight is weight is held[0]
    strategy.save_checkpoint(
        {"state_dict": strategy.lightning_module_state_dict(), "optimizer_states": [optimizer.state_dict()]}, f"{folder}/file"
    )
    strategy.teardown()
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    found["back"] = sorted({str(tensor.device) for tensor in (*module.parameters(), *module.buffers(), *held, *momenta)})
    found["same objects at the end"] = module.first.weight is module.second.weight is weight is held[0]

    strategy, module = made(), Net()
    strategy.connect(module)
    strategy.setup_module(module)
    strategy.load_model_state_dict({"state_dict": {name: torch.ones(p.shape) for name, p in module.named_parameters()}})
    found["loaded"] = sorted({(str(p.device), float(p.detach().min()), float(p.detach().max())) for p in module.parameters()})
    module.training_step(on_device(strategy)[0], 0).backward()
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    strategy.clip_gradients(sgd, 0.5)
    found["norm"] = float(torch.stack([p.grad.norm() for p in module.parameters()]).norm())  # type: ignore[union-attr]

    moved = made().batch_to_device({"x": (torch.ones(2), "text")})
    found["moved"] = (str(moved["x"][0].device), moved["x"][1])
    with made().module_init_context():
        found["built"] = str(nn.Linear(2, 2).weight.device)
    strategy = made(debug=True)
    found["debug"] = os.environ.get("PT_XLA_DEBUG")
    strategy.teardown()
    found["debug at the end"] = os.environ.get("PT_XLA_DEBUG")
    found["processes"] = (strategy.world_size, strategy.global_rank, strategy.is_distributed, strategy.launcher)
    found["spellings"] = spellings()
    found["random"] = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        strategy = made()
        found["random"].append(torch.rand(3, device=strategy.root_device).tolist())
    strategy.setup_environment()
    found["random"].append(torch.rand(3, device=strategy.root_device).tolist())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if IS_MISSING:
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("xla")
    return {**run(everything, str(folder)), "folder": folder}


# ---- what it did --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "accumulate"), [("weights", 1), ("accumulated", 2)])
def test_weights_equal_those_of_the_cpu(found: dict[str, Any], key: str, accumulate: int) -> None:
    expected = train(SingleDeviceStrategy(), Net(), batches(), accumulate=accumulate)
    assert largest_difference(found[key], expected) < TOLERANCE
    assert found["device"] == "xla:0"


def test_shared_weights_stay_shared_and_their_optimizer_keeps_them(found: dict[str, Any]) -> None:
    assert largest_difference(found["tied weights"], train(SingleDeviceStrategy(), Tied(), batches())) < TOLERANCE
    assert set(found["on device"]) == {"xla:0"}
    assert found["same objects"]
    assert found["same objects at the end"]


def test_teardown_brings_weights_and_optimizer_back(found: dict[str, Any]) -> None:
    assert found["back"] == ["cpu"]


def test_checkpoint_holds_cpu_tensors_that_load_without_torch_xla(found: dict[str, Any]) -> None:
    checkpoint = torch.load(found["folder"] / "file", weights_only=True)
    assert {tensor.device.type for tensor in checkpoint["state_dict"].values()} == {"cpu"}
    assert plain(checkpoint["state_dict"]) == found["tied weights"]
    assert {state["momentum_buffer"].device.type for state in checkpoint["optimizer_states"][0]["state"].values()} == {"cpu"}


def test_weights_are_loaded_onto_the_device(found: dict[str, Any]) -> None:
    assert found["loaded"] == [("xla:0", 1.0, 1.0)]


def test_gradients_are_clipped_by_their_norm(found: dict[str, Any]) -> None:
    assert found["norm"] == pytest.approx(0.5, abs=1e-5)


def test_batches_and_modules_get_to_the_device(found: dict[str, Any]) -> None:
    assert found["moved"] == ("xla:0", "text")
    assert found["built"] == "xla:0"


def test_debug_sets_torch_xlas_variable_until_teardown(found: dict[str, Any]) -> None:
    assert found["debug"] == "1"
    assert found["debug at the end"] is None


def test_random_numbers_of_the_device_follow_the_seed(found: dict[str, Any]) -> None:
    first, second, third, fourth = found["random"]
    assert first == third != second
    assert fourth not in (first, second), "a further run of the same strategy goes on"


def test_there_is_one_process(found: dict[str, Any]) -> None:
    assert found["processes"] == (1, 0, False, None)


def after_the_cpu() -> str:
    torch.ones(1, requires_grad=True).sum().backward()
    strategy = made()
    try:
        strategy.backward(torch.ones(1, device=strategy.root_device, requires_grad=True).sum())
    except RuntimeError as error:
        return str(error)
    return ""


@needs_xla
def test_gradients_on_the_cpu_before_are_explained() -> None:
    assert "no XLA device in use" in run(after_the_cpu)


def spellings() -> list[Any]:
    found: list[Any] = [str(SingleDeviceXLAStrategy(device).root_device) for device in (0, "xla:0", "xla", torch.device("xla", 1))]
    try:
        SingleDeviceXLAStrategy("cpu")
    except ValueError as error:
        found.append(str(error))
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = SingleTPUStrategy(device=0)
    found.append((isinstance(strategy, SingleDeviceXLAStrategy), [warning.category for warning in caught] == [LightningDeprecationWarning]))
    return found


def test_device_is_an_index_a_name_or_a_torch_device(found: dict[str, Any]) -> None:
    *names, refusal, old = found["spellings"]
    assert names == ["xla:0", "xla:0", "xla:0", "xla:1"]
    assert "takes XLA devices" in refusal
    assert old == (True, True)


# ---- without torch_xla ------------------------------------------------------------------------------------------------


def test_names_are_registered_without_importing_torch_xla() -> None:
    assert STRATEGY_REGISTRY["single_xla"]["strategy"] is SingleDeviceXLAStrategy
    assert STRATEGY_REGISTRY["single_tpu"]["strategy"] is SingleTPUStrategy
    assert "torch_xla" not in sys.modules


@pytest.mark.skipif(not IS_MISSING, reason="says what happens without torch_xla")
def test_it_says_what_to_install() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"SingleDeviceXLAStrategy needs the package torch_xla: `pip install"):
        SingleDeviceXLAStrategy(0)
