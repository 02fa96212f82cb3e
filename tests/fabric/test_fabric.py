"""Fabric on one device: what it is made of, what it sets up, and what it refuses."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

import lightning
from lightning.fabric import Fabric, is_wrapped
from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import LightningDeprecationWarning
from lightning.fabric.utilities.warnings import PossibleUserWarning


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def pair(out: int = 1) -> tuple[nn.Linear, torch.optim.SGD]:
    module = nn.Linear(2, out)
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


# ---- what it is made of -----------------------------------------------------------------------------------------------


def test_properties_are_those_of_the_strategy(fabric: Fabric) -> None:
    assert isinstance(fabric.accelerator, CPUAccelerator)
    assert isinstance(fabric.strategy, SingleDeviceStrategy)
    assert fabric.device == torch.device("cpu")
    assert (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size) == (0, 0, 0, 1)
    assert fabric.is_global_zero
    assert fabric.loggers == []
    with pytest.raises(IndexError, match="no logger was given"):
        _ = fabric.logger


def test_fabric_is_a_name_of_both_packages() -> None:
    assert lightning.Fabric is Fabric
    assert lightning.fabric.Fabric is Fabric
    with pytest.raises(AttributeError, match="no attribute 'Fabrik'"):
        _ = lightning.fabric.Fabrik


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"strategy": "nope"}, ValueError, "strategy='nope' is not known"),
        ({"precision": "nope"}, ValueError, "precision='nope' is not known"),
        ({"devices": 0}, MisconfigurationException, "devices=0"),
        ({"num_nodes": 0}, ValueError, "num_nodes=0"),
        ({"plugins": "nope"}, MisconfigurationException, "plugins got 'nope'"),
        ({"loggers": [3]}, TypeError, "loggers got 3, which has no method `log_metrics`"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Fabric(**{"accelerator": "cpu", "devices": 1, **arguments})


def test_one_process_of_a_distributed_strategy_needs_no_launch() -> None:
    code = (
        "from lightning.fabric import Fabric; import torch\n"
        "fabric = Fabric(accelerator='cpu', devices=1, strategy='ddp')\n"
        "model = fabric.setup(torch.nn.Linear(1, 1))\n"
        "print(fabric.world_size, fabric.broadcast(3), fabric.all_reduce(torch.ones(1)).item())\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3", "1.0"]


# ---- what the command line sets -----------------------------------------------------------------------------------------


def test_environment_fills_in_what_the_code_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ACCELERATOR": "cpu", "DEVICES": "2", "STRATEGY": "ddp", "NUM_NODES": "1", "PRECISION": "64-true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"LT_{name}", value)
    for arguments in ({}, {"devices": 2, "precision": 64, "strategy": "ddp"}):
        fabric = Fabric(**arguments)  # type: ignore[arg-type]
        assert isinstance(fabric.strategy, DDPStrategy)
        assert (fabric.world_size, fabric.strategy.precision.precision) == (2, "64-true")


def test_environment_that_contradicts_the_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_PRECISION", "64-true")
    with pytest.raises(ValueError, match=r"Fabric\(precision='32-true'\).*LT_PRECISION=64-true"):
        Fabric(accelerator="cpu", precision="32-true")


class Running(Fabric):
    def run(self, first: int, second: int = 2) -> tuple[int, int, bool]:
        return first, second, self._launched


def test_under_the_command_line_nothing_is_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_CLI_USED", "1")
    fabric = Fabric(accelerator="cpu", devices=1)
    assert is_wrapped(fabric.setup(nn.Linear(1, 1)))
    for arguments in ((), (lambda fabric: None,)):
        with pytest.raises(RuntimeError, match="started from the command line"):
            fabric.launch(*arguments)
    with pytest.raises(TypeError, match="Running defines `run`"):
        Running(accelerator="cpu", devices=1)


# ---- starting -----------------------------------------------------------------------------------------------------------


def test_launch_calls_the_function_with_the_fabric(fabric: Fabric) -> None:
    assert fabric.launch(lambda *args, **kwargs: (args, kwargs), 1, two=2) == ((fabric, 1), {"two": 2})
    assert fabric.launch() is None
    assert fabric.launch(lambda fabric: fabric.launch(lambda fabric: "inner")) == "inner"


def test_run_of_a_subclass_is_launched() -> None:
    assert Running(accelerator="cpu", devices=1).run(1, second=3) == (1, 3, True)


class RunningMore(Running):
    def run(self, first: int, second: int = 2) -> Any:
        return "more", super().run(first, second)


def test_run_may_call_that_of_its_base() -> None:
    assert RunningMore(accelerator="cpu", devices=1).run(1) == ("more", (1, 2, True))


@pytest.mark.parametrize(("function", "said"), [(3, "a function is needed"), (lambda: None, "gets the Fabric as its first argument")])
def test_launch_refuses_what_it_cannot_call(fabric: Fabric, function: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        fabric.launch(function)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_launch_without_a_function_is_refused_where_one_is_needed(strategy: str) -> None:
    with pytest.raises(TypeError, match="runs a function in new processes"):
        Fabric(accelerator="cpu", devices=2, strategy=strategy).launch()


@pytest.mark.parametrize(
    "call",
    [
        lambda fabric: fabric.setup(nn.Linear(1, 1)),
        lambda fabric: fabric.setup_module(nn.Linear(1, 1)),
        lambda fabric: fabric.setup_optimizers(pair()[1]),
        lambda fabric: fabric.setup_dataloaders(DataLoader([1])),
        lambda fabric: fabric.broadcast(1),
        lambda fabric: fabric.all_gather(torch.ones(1)),
        lambda fabric: fabric.all_reduce(torch.ones(1)),
        lambda fabric: fabric.barrier(),
        lambda fabric: fabric.init_module(),
        lambda fabric: fabric.save("x.ckpt", {}),
        lambda fabric: fabric.load("x.ckpt"),
    ],
)
def test_what_needs_the_other_processes_is_refused_before_they_are_launched(call: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    with pytest.raises(RuntimeError, match=r"2 processes were asked for.*call `fabric.launch"):
        call(fabric)


# ---- setting up ---------------------------------------------------------------------------------------------------------


def test_setup_returns_as_much_as_it_gets(fabric: Fabric) -> None:
    assert is_wrapped(fabric.setup(nn.Linear(1, 1)))
    module, first = pair()
    second = torch.optim.SGD([module.weight], lr=0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(first, 1)
    *wrapped, same = fabric.setup(module, first, second, scheduler=scheduler)
    assert [type(each).__name__ for each in wrapped] == ["_FabricModule", "FabricSGD", "FabricSGD"]
    assert same is scheduler
    module, optimizer = pair()
    model = fabric.setup_module(module)
    assert model.module is module
    one = fabric.setup_optimizers(optimizer)
    assert one.optimizer is optimizer
    two = fabric.setup_optimizers(*(pair()[1] for _ in range(2)))
    assert isinstance(two, tuple)
    assert all(map(is_wrapped, two))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda f: f.setup(f.setup(nn.Linear(1, 1))), ValueError, "`setup` got a module that was set up already"),
        (lambda f: f.setup_module(f.setup(nn.Linear(1, 1))), ValueError, "`setup_module` got a module that was set up already"),
        (lambda f: f.setup("module"), TypeError, "got 'module', a str; a torch.nn.Module"),
        (lambda f: f.setup(nn.Linear(1, 1), "optimizer"), TypeError, "got 'optimizer', a str; a torch.optim.Optimizer"),
        (lambda f: f.setup_optimizers(), ValueError, "without an optimizer"),
        (lambda f: f.setup_optimizers(f.setup_optimizers(pair()[1])), ValueError, "optimizer that was set up already"),
        (lambda f: f.setup_optimizers(torch.optim.SGD(nn.Linear(1, 1, device="meta").parameters())), RuntimeError, "on the meta device"),
        (lambda f: f.setup_dataloaders(), ValueError, "without a loader"),
        (lambda f: f.setup_dataloaders([1, 2]), TypeError, "a list; a torch.utils.data.DataLoader"),
        (lambda f: f.setup_dataloaders(f.setup_dataloaders(DataLoader([1]))), ValueError, "loader that was set up already"),
        (lambda f: f.no_backward_sync(nn.Linear(1, 1)), TypeError, "`no_backward_sync` got a Linear that was not set up"),
        (lambda f: f.backward(torch.ones(1), model=nn.Linear(1, 1)), TypeError, "got a Linear that was not set up"),
        (lambda f: f.clip_gradients(*pair()), ValueError, "got neither"),
        (lambda f: f.clip_gradients(*pair(), clip_val=1.0, max_norm=1.0), ValueError, "got both"),
    ],
)
def test_misuse_is_refused_by_name(fabric: Fabric, call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(fabric)


def test_optimizer_of_another_module_warns(fabric: Fabric) -> None:
    with pytest.warns(PossibleUserWarning, match="SGD that holds none of the parameters of the Linear"):
        fabric.setup(nn.Linear(2, 2), pair()[1])


def test_module_on_several_devices_warns_unless_it_is_left_there(fabric: Fabric) -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    model = fabric.setup_module(module, move_to_device=False)
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    with pytest.warns(PossibleUserWarning, match="lie on 2 devices"), pytest.raises(NotImplementedError, match="meta"):
        fabric.setup(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta")))
    assert "module_to_device" not in vars(fabric.strategy)


class Replacing(SingleDeviceStrategy):
    """As strategies do that divide parameters: the module has others afterwards."""

    def setup_module(self, module: nn.Module, training: bool = True) -> nn.Module:
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.detach().clone())
        return module


def test_optimizers_get_the_parameters_that_setting_up_has_made() -> None:
    fabric = Fabric(accelerator="cpu", strategy=Replacing())
    module, optimizer = pair()
    model, optimizer = fabric.setup(module, optimizer)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))
    before = model.weight.detach().clone()
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_optimizers_whose_parameters_are_gone_are_refused() -> None:
    fabric = Fabric(accelerator="cpu", strategy=Replacing())
    module, optimizer = pair()
    fabric.setup_module(module)
    with pytest.raises(RuntimeError, match=r"Make it after `model = fabric.setup_module\(model\)`"):
        fabric.setup_optimizers(optimizer)
    module, optimizer = pair()
    module(torch.ones(1, 2)).sum().backward()
    momentum = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    momentum.step()
    with pytest.raises(RuntimeError, match="SGD was made of parameters that setting up the module has replaced"):
        fabric.setup(module, momentum)


# ---- data and contexts --------------------------------------------------------------------------------------------------


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_loaders_of_one_process_keep_their_samplers(fabric: Fabric) -> None:
    batch_sampler = BatchSampler(SequentialSampler(range(5)), 2, drop_last=False)
    loader, other, stream = fabric.setup_dataloaders(
        DataLoader(torch.arange(5), batch_size=2), DataLoader(torch.arange(5), batch_sampler=batch_sampler), DataLoader(Stream())
    )
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in other] == [[0, 1], [2, 3], [4]]
    assert [batch.item() for batch in stream] == [0, 1, 2]
    assert isinstance(loader.sampler, SequentialSampler)
    assert loader.device == fabric.device
    assert fabric.setup_dataloaders(DataLoader([1]), move_to_device=False).device is None


def test_workers_are_seeded_if_that_was_asked_for(fabric: Fabric) -> None:
    fabric.seed_everything(3, verbose=False)
    assert fabric.setup_dataloaders(DataLoader([1])).worker_init_fn is not None
    fabric.seed_everything(3, workers=False, verbose=False)
    assert fabric.setup_dataloaders(DataLoader([1])).worker_init_fn is None
    assert os.environ["PL_GLOBAL_SEED"] == "3"


def test_things_are_built_in_the_precision_of_the_run() -> None:
    fabric = Fabric(accelerator="cpu", precision="bf16-true")
    with fabric.init_module():
        assert nn.Linear(1, 1).weight.dtype == torch.bfloat16
    with fabric.init_module(empty_init=True):
        assert nn.Linear(1, 1).weight.dtype == torch.bfloat16
    with fabric.init_tensor():
        assert torch.ones(1).dtype == torch.bfloat16
    with pytest.warns(LightningDeprecationWarning, match="init_module"), fabric.sharded_model():
        pass
    with Fabric(accelerator="cpu", precision="bf16-mixed").autocast():
        assert torch.is_autocast_enabled("cpu")


def test_to_device_takes_modules_and_collections(fabric: Fabric) -> None:
    module = nn.Linear(1, 1)
    assert fabric.to_device(module) is module
    moved = fabric.to_device({"x": [torch.ones(1), "text"]})
    assert moved["x"][0].device == fabric.device
    assert moved["x"][1] == "text"


def test_communication_of_one_process_returns_what_it_gets(fabric: Fabric, capsys: pytest.CaptureFixture[str]) -> None:
    tensor = torch.ones(2)
    assert fabric.all_gather({"a": tensor, "b": 2, "c": "text"}) == {"a": tensor, "b": torch.tensor(2), "c": "text"}
    assert fabric.all_reduce(tensor, reduce_op="sum") is tensor
    assert fabric.broadcast("text") == "text"
    fabric.barrier("here")
    with fabric.rank_zero_first():
        fabric.print("once", 3, sep="-")
    assert capsys.readouterr().out == "once-3\n"


def test_messages_of_fabric_can_be_heard(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.fabric"):
        Fabric.seed_everything(4)
    assert "Seed set to 4" in caplog.text
