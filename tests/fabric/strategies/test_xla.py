"""Two XLA devices, which are CPU devices of torch_xla and threads of one process: the same weights as of one device."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from training import Net, batches, largest_difference, part, plain, train
from xla_devices import IS_MISSING, REASON, run

from lightning.fabric.strategies import STRATEGY_REGISTRY, SingleDeviceStrategy, XLAStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

needs_xla = pytest.mark.skipif(IS_MISSING, reason=REASON)
TOLERANCE = 1e-6


def made(**options: Any) -> XLAStrategy:
    strategy = XLAStrategy(parallel_devices=[torch.device("xla", index) for index in range(2)], **options)
    strategy.set_world_ranks()
    strategy.configure_launcher()
    return strategy


def launched(function: Any, *arguments: Any) -> Any:
    """What the function returns on the first of two devices; modules are made before, since threads share random numbers."""
    return made().launcher.launch(function, *arguments)


# ---- collectives --------------------------------------------------------------------------------------------------------


def talking() -> list[dict[str, Any]]:
    strategy = made()
    strategy.setup_environment()
    rank, device = strategy.global_rank, strategy.root_device
    found: dict[str, Any] = {"rank": (rank, strategy.world_size, strategy.local_rank, strategy.node_rank, str(device))}
    reduced = strategy.reduce(torch.tensor([1.0, rank]), reduce_op="sum")
    found["sum"] = (reduced.tolist(), str(reduced.device))
    found["mean of integers"] = strategy.reduce(torch.tensor(rank).to(device)).item()
    found["others"] = [strategy.reduce(torch.tensor(rank + 2.0), reduce_op=op).item() for op in ("min", "max", "product")]
    found["bool"] = strategy.reduce(torch.tensor(rank == 0), reduce_op="sum").item()
    found["text"] = strategy.reduce("text")
    gathered = strategy.all_gather(torch.tensor([rank, 10.0]).to(device))
    found["gathered"] = (gathered.tolist(), str(gathered.device) == str(device))
    found["gathered bool"] = strategy.all_gather(torch.tensor(rank == 1)).tolist()
    value = torch.full((2,), float(rank + 1)).to(device).requires_grad_()
    (strategy.all_gather(value, sync_grads=True) * torch.tensor([[1.0], [2.0]]).to(device)).sum().backward()
    strategy.barrier("after backward")
    assert value.grad is not None
    found["gradient"] = value.grad.tolist()
    told = strategy.broadcast({"rank": rank, "tensor": torch.full((2,), float(rank)).to(device)}, src=1)
    found["told"] = (told["rank"], told["tensor"].tolist(), str(told["tensor"].device) == str(device))
    found["decisions"] = [strategy.reduce_boolean_decision(rank == 0, all=every) for every in (True, False)]
    found["same"] = (strategy.compare({"a": "1"}), strategy.compare({"a": str(rank)}, rank))
    values = {"loss": (torch.tensor(rank + 1.0), "mean"), "count": (torch.tensor([rank, 5]).to(device), "sum")}
    found["named"] = {name: tensor.tolist() for name, tensor in strategy.reduce_named(values).items()}
    try:
        strategy.reduce_named({"a" if rank else "b": (torch.ones(1), "sum")})
    except MisconfigurationException as error:
        found["difference"] = str(error)
    try:
        strategy.reduce(torch.ones(1), group="some")
    except ValueError as error:
        found["group"] = str(error)
    found["sampler"] = strategy.distributed_sampler_kwargs
    return strategy.broadcast([found]) + strategy.broadcast([found], src=1)


def talked() -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = launched(talking)
    return result


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each rank has found."""
    if IS_MISSING:
        pytest.skip(REASON)
    found: list[dict[str, Any]] = run(talked, devices=2)
    return found


def test_ranks_are_those_of_the_devices(told: list[dict[str, Any]]) -> None:
    assert [each["rank"] for each in told] == [(0, 2, 0, 0, "xla:0"), (1, 2, 1, 0, "xla:1")]
    assert [each["sampler"] for each in told] == [{"num_replicas": 2, "rank": rank} for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_collectives_give_the_same_on_all_devices(told: list[dict[str, Any]], rank: int) -> None:
    found = told[rank]
    assert found["sum"] == ([2.0, 1.0], "cpu")
    assert found["mean of integers"] == 0.5
    assert found["others"] == [2.0, 3.0, 6.0]
    assert found["bool"] == 1
    assert found["text"] == "text"
    assert found["gathered"] == ([[0.0, 10.0], [1.0, 10.0]], True)
    assert found["gathered bool"] == [False, True]
    assert found["told"] == (1, [1.0, 1.0], True)
    assert found["decisions"] == [False, True]
    assert found["same"] == (None, [0, 1])
    assert found["named"] == {"loss": 1.5, "count": [1, 10]}
    assert "rank 0 has no 'a'; rank 1 has no 'b'" in found["difference"]
    assert "talks to all processes at once" in found["group"]


def test_gradients_flow_back_to_the_device_of_each_part(told: list[dict[str, Any]]) -> None:
    assert [each["gradient"] for each in told] == [[2.0, 2.0], [4.0, 4.0]]


# ---- training -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A module with buffers that begin differently on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("garbage", torch.tensor([1.0, 2.0]))


def differ(module: nn.Module, rank: int) -> nn.Module:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if rank:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return module


def training(nets: dict[str, nn.Module], counting: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    strategy = made()
    strategy.setup_environment()
    rank = strategy.global_rank
    data = [part(batch.to(strategy.root_device), rank, 2) for batch in batches()]
    found["weights"] = train(made(), differ(nets["plain"], rank), data)
    found["accumulated"] = train(made(), differ(nets["accumulating"], rank), data, accumulate=2)

    strategy = made()
    strategy.setup_module(differ(counting, rank))
    found["buffers"] = strategy.all_gather(torch.stack([b.sum().float() for b in counting.buffers()])).tolist()

    strategy, module = made(), nets["clipped"]
    strategy.connect(module)
    strategy.setup_module(module)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)

    def closure() -> Any:
        loss = module.training_step(data[0], 0)
        loss.backward()  # past the strategy
        strategy.clip_gradients(sgd, 0.05)
        return loss

    strategy.optimizer_step(sgd, closure)
    found["clipped"] = plain(strategy.lightning_module_state_dict())

    alone = made(sync_module_states=False)
    alone.setup_module(nets["alone"].fill_(rank))  # type: ignore[operator]
    found["not synchronised"] = strategy.all_gather(nets["alone"].weight.detach()).tolist()  # type: ignore[union-attr, arg-type]
    strategy.on_exception(ValueError())
    strategy.teardown()
    found["after an error"] = str(next(module.parameters()).device)
    return found


class Filled(nn.Linear):
    def fill_(self, value: float) -> nn.Module:
        nn.init.constant_(self.weight, value)
        return self


def trained() -> dict[str, Any]:
    nets = {"plain": Net(), "accumulating": Net(), "clipped": Net(), "alone": Filled(1, 1)}
    result: dict[str, Any] = launched(training, nets, Counting())
    return result


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What rank 0 has found."""
    if IS_MISSING:
        pytest.skip(REASON)
    result: dict[str, Any] = run(trained, devices=2)
    return result


@pytest.mark.parametrize(("key", "accumulate"), [("weights", 1), ("accumulated", 2)])
def test_weights_equal_those_of_one_device(found: dict[str, Any], key: str, accumulate: int) -> None:
    expected = train(SingleDeviceStrategy(), Net(), batches(), accumulate=accumulate)
    assert largest_difference(found[key], expected) < TOLERANCE


def test_buffers_begin_as_those_of_rank_0(found: dict[str, Any]) -> None:
    assert found["buffers"] == [[3.0, 1.0, 3.0], [3.0, 1.0, 3.0]]


def test_sync_module_states_false_leaves_weights_as_they_are(found: dict[str, Any]) -> None:
    assert found["not synchronised"] == [[[0.0]], [[1.0]]]


def test_gradients_are_averaged_before_they_are_clipped_however_backward_is_run(found: dict[str, Any]) -> None:
    module = Net()
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    module.training_step(batches()[0], 0).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
    sgd.step()
    assert largest_difference(found["clipped"], plain(module.state_dict())) < TOLERANCE


def test_after_an_error_nothing_is_fetched_from_the_device(found: dict[str, Any]) -> None:
    assert found["after an error"] == "xla:0"


# ---- data ---------------------------------------------------------------------------------------------------------------


class Numbers(Dataset[Any]):
    """Samples that are dicts; the one at ``broken`` can't be read."""

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.broken:
            raise OSError(f"sample {index} can't be read")
        return {"x": torch.tensor([float(index)]), "name": f"sample {index}"}


class Custom:
    """A batch of a kind of its own."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def to(self, device: torch.device) -> Custom:
        return Custom(self.tensor.to(device))


def loading() -> dict[str, Any]:
    found: dict[str, Any] = {}
    strategy = XLAStrategy(parallel_devices=[torch.device("xla", 0)])
    strategy.setup_environment()
    before = threading.active_count()
    loader = strategy.process_dataloader(DataLoader(Numbers(), batch_size=4))
    first = list(loader)
    found["numbers"] = [batch["x"].flatten().tolist() for batch in first] == [list(map(float, range(i, i + 4))) for i in range(0, 40, 4)]
    found["names"] = first[0]["name"]
    found["device"] = {str(batch["x"].device) for batch in first}
    found["again"] = len(list(loader))
    found["length"] = (len(loader), loader.batch_size, type(loader.sampler).__name__)
    for index, _ in enumerate(loader):
        if index == 2:
            break
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    found["threads left"] = threading.active_count() - before
    found["read before it"] = 0
    try:
        for _ in strategy.process_dataloader(DataLoader(Numbers(broken=30), batch_size=4)):
            found["read before it"] += 1
    except OSError as error:
        found["error"] = str(error)
    custom = next(iter(strategy.process_dataloader([Custom(torch.ones(2))])))
    found["custom"] = (type(custom) is Custom, str(custom.tensor.device))
    found["none"] = list(strategy.process_dataloader([None, 3]))
    return found


@needs_xla
def test_loader_uploads_in_the_background_and_hands_on_errors() -> None:
    found = run(loading)
    assert found["numbers"]
    assert found["names"] == [f"sample {index}" for index in range(4)]
    assert found["device"] == {"xla:0"}
    assert found["again"] == 10
    assert found["length"] == (10, 4, "SequentialSampler")
    assert found["threads left"] == 0
    assert found["error"] == "sample 30 can't be read"
    assert found["read before it"] == 7
    assert found["custom"] == (True, "xla:0")
    assert found["none"] == [None, 3]


# ---- without torch_xla --------------------------------------------------------------------------------------------------


def test_names_are_registered_with_what_they_stand_for() -> None:
    assert STRATEGY_REGISTRY["xla"]["init_params"] == {}
    assert STRATEGY_REGISTRY["xla_debug"]["init_params"] == {"debug": True}
    assert STRATEGY_REGISTRY["xla_debug"]["strategy"] is XLAStrategy


@pytest.mark.skipif(not IS_MISSING, reason="says what happens without torch_xla")
def test_it_says_what_to_install() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"XLAStrategy needs the package torch_xla: `pip install"):
        XLAStrategy()
