"""One process, one device: the strategy by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.checkpoint.io import CheckpointIO, TorchCheckpointIO
from lightning.fabric.precision import DoublePrecision, HalfPrecision, Precision
from lightning.fabric.runtime import resolve
from lightning.fabric.strategies import SingleDeviceStrategy, Strategy

CPU = torch.device("cpu")


# ---- parts and place -------------------------------------------------------------------------------------------------


def test_a_new_one_is_alone_on_the_cpu_in_full_precision() -> None:
    strategy = SingleDeviceStrategy()
    assert strategy.root_device == CPU
    assert (strategy.world_size, strategy.global_rank, strategy.local_rank, strategy.node_rank) == (1, 0, 0, 0)
    assert strategy.is_global_zero
    assert type(strategy.precision) is Precision
    assert strategy.precision is strategy.precision_plugin
    assert type(strategy.checkpoint_io) is TorchCheckpointIO
    assert strategy.checkpoint_io is strategy.checkpoint_io
    assert (strategy.accelerator, strategy.module, strategy.model, strategy.lightning_module) == (None, None, None, None)
    assert (strategy.optimizers, strategy.lr_scheduler_configs) == ([], [])
    assert strategy.strategy_name == "single_device"


def test_parts_can_be_given_and_replaced() -> None:
    accelerator, io, precision = CPUAccelerator(), TorchCheckpointIO(), DoublePrecision()
    strategy = SingleDeviceStrategy("meta", accelerator, io, precision)
    assert (strategy.root_device.type, strategy.accelerator, strategy.checkpoint_io, strategy.precision) == (
        "meta",
        accelerator,
        io,
        precision,
    )
    strategy.accelerator, strategy.checkpoint_io, strategy.precision = None, None, None  # type: ignore[assignment]
    assert strategy.accelerator is None
    assert strategy.checkpoint_io is not io
    assert type(strategy.precision) is Precision


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(RuntimeError, match="abacus"):
        SingleDeviceStrategy("abacus")


def test_the_device_is_made_ready_by_its_accelerator() -> None:
    with pytest.raises(ValueError, match="CPUAccelerator sets up CPU devices; got meta"):
        SingleDeviceStrategy("meta", CPUAccelerator()).setup_environment()
    SingleDeviceStrategy("cpu", CPUAccelerator()).setup_environment()


# ---- modules and batches ---------------------------------------------------------------------------------------------


def test_a_module_is_converted_and_moved() -> None:
    module = nn.Linear(1, 1)
    strategy = SingleDeviceStrategy("meta", precision=HalfPrecision("bf16-true"))
    assert strategy.setup_module(module) is module
    assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.bfloat16)


def test_what_runs_is_the_users_module_and_its_methods() -> None:
    module = nn.Linear(1, 1)
    strategy = SingleDeviceStrategy()
    strategy.connect(module)
    assert strategy.module is strategy.model is strategy.lightning_module is module
    assert strategy.bind("forward") == module.forward


def test_modules_and_tensors_are_made_on_the_device_and_in_the_precision() -> None:
    strategy = SingleDeviceStrategy("meta", precision=DoublePrecision())
    with strategy.module_init_context():
        module = nn.Linear(1, 1)
    with strategy.tensor_init_context():
        tensor = torch.ones(1)
    for found in (module.weight, tensor):
        assert (found.device.type, found.dtype) == ("meta", torch.float64)
    assert (torch.ones(1).device, torch.ones(1).dtype) == (CPU, torch.float32)


@pytest.mark.parametrize(("empty", "draws"), [(True, False), (False, True), (None, True)])
def test_weights_that_will_be_loaded_are_not_initialised(empty: bool | None, draws: bool) -> None:
    before = torch.get_rng_state()
    with SingleDeviceStrategy().module_init_context(empty_init=empty):
        module = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(1, 2, 3), nn.BatchNorm1d(4), nn.Embedding(3, 2, padding_idx=0))
    assert torch.equal(torch.get_rng_state(), before) is not draws
    assert module[0].weight.shape == (4, 3)
    assert module[0].weight.requires_grad


def test_outside_of_the_context_weights_are_initialised_again() -> None:
    with SingleDeviceStrategy().module_init_context(empty_init=True):
        pass
    with pytest.raises(ZeroDivisionError), SingleDeviceStrategy().module_init_context(empty_init=True):
        1 / 0  # noqa: B018
    before = torch.get_rng_state()
    nn.Linear(1, 1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_batches_move_to_the_device_or_to_another() -> None:
    strategy = SingleDeviceStrategy("meta")
    assert strategy.batch_to_device({"x": [torch.ones(1)]})["x"][0].device.type == "meta"
    assert strategy.batch_to_device(torch.ones(1), CPU).device == CPU


# ---- stepping --------------------------------------------------------------------------------------------------------


def trained(strategy: Strategy) -> tuple[nn.Parameter, SGD]:
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=0.5)
    assert strategy.setup_optimizer(optimizer) is optimizer
    return weight, optimizer


def test_backward_and_step_train() -> None:
    strategy = SingleDeviceStrategy()
    weight, optimizer = trained(strategy)

    def closure() -> torch.Tensor:
        loss = (2 * weight).sum()
        with strategy.no_backward_sync():
            strategy.backward(loss)
        return loss

    assert strategy.optimizer_step(optimizer, closure).item() == 2
    assert weight.item() == 0


@pytest.mark.parametrize(("algorithm", "expected"), [("norm", [0.6, 0.8]), ("value", [1.0, 1.0])])
def test_gradients_are_clipped(algorithm: str, expected: list[float]) -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    SingleDeviceStrategy().clip_gradients(SGD([weight], lr=1.0), 1.0, algorithm)
    assert weight.grad.tolist() == pytest.approx(expected, rel=1e-5)


# ---- processes -------------------------------------------------------------------------------------------------------


def test_with_one_process_collectives_give_back_what_they_got() -> None:
    strategy = SingleDeviceStrategy()
    tensor, thing = torch.ones(2), object()
    assert strategy.reduce(tensor) is strategy.all_reduce(tensor, reduce_op="sum") is strategy.all_gather(tensor) is tensor
    assert strategy.broadcast(thing) is thing
    assert [strategy.reduce_boolean_decision(x, all=y) for x in (True, False) for y in (True, False)] == [True, True, False, False]
    strategy.barrier("here")
    assert strategy.process_dataloader(thing) is thing


# ---- state -----------------------------------------------------------------------------------------------------------


def test_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    strategy = SingleDeviceStrategy()
    strategy.connect(nn.Linear(1, 1))
    path = tmp_path / "a" / "b.ckpt"
    strategy.save_checkpoint({"state_dict": strategy.lightning_module_state_dict()}, path)
    other = SingleDeviceStrategy()
    other.connect(nn.Linear(1, 1))
    other.load_model_state_dict(strategy.load_checkpoint(path))
    assert torch.equal(other.model.weight, strategy.model.weight)
    strategy.remove_checkpoint(path)
    assert not path.exists()


def test_weights_that_do_not_fit_are_refused_where_that_is_asked_for() -> None:
    strategy = SingleDeviceStrategy()
    strategy.connect(nn.Linear(1, 1))
    weights = {"weight": torch.zeros(1, 1), "other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="other"):
        strategy.load_model_state_dict({"state_dict": weights})
    strategy.load_model_state_dict({"state_dict": weights}, strict=False)
    assert strategy.model.weight.item() == 0


def test_the_state_of_an_optimizer_is_saved_and_loaded() -> None:
    strategy = SingleDeviceStrategy()
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = Adam([weight], lr=0.1)
    optimizer.step()
    other = Adam([nn.Parameter(torch.ones(1))], lr=0.5)
    strategy.load_optimizer_state(other, strategy.optimizer_state(optimizer))
    assert other.param_groups[0]["lr"] == 0.1
    assert len(other.state) == 1


def test_teardown_brings_weights_and_optimizers_to_the_cpu_and_tears_down_the_parts() -> None:
    torn: list[str] = []

    class Io(TorchCheckpointIO):
        def teardown(self) -> None:
            torn.append("io")

    class Cpu(CPUAccelerator):
        def teardown(self) -> None:
            torn.append("accelerator")

    class Torn(Precision):
        def teardown(self) -> None:
            torn.append("precision")

    moved: list[Any] = []

    class Module(nn.Linear):
        def cpu(self) -> Any:
            moved.append("module")
            return super().cpu()

    class State(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

        def cpu(self, *args: Any, **kwargs: Any) -> Any:
            return "on the cpu"

    strategy = SingleDeviceStrategy("cpu", Cpu(), Io(), Torn())
    strategy.connect(Module(1, 1))
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"far": torch.ones(1).as_subclass(State), "near": 3}
    strategy.optimizers = [optimizer]
    strategy.teardown()
    assert sorted(torn) == ["accelerator", "io", "precision"]
    assert moved == ["module"]
    assert next(iter(optimizer.state.values())) == {"far": "on the cpu", "near": 3}


def test_a_checkpoint_io_of_ones_own_writes_and_reads() -> None:
    class Memory(CheckpointIO):
        files: dict[str, Any] = {}

        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            self.files[str(path)] = (checkpoint, storage_options)

        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
            return {"from": str(path), "map_location": map_location, "weights_only": weights_only}

        def remove_checkpoint(self, path: Any) -> None:
            del self.files[str(path)]

    strategy = SingleDeviceStrategy(checkpoint_io=Memory())
    strategy.save_checkpoint({"a": 1}, "x", storage_options={"b": 2})
    assert Memory.files == {"x": ({"a": 1}, {"b": 2})}
    assert strategy.load_checkpoint("x", weights_only=False) == {"from": "x", "map_location": "cpu", "weights_only": False}
    strategy.remove_checkpoint("x")
    assert Memory.files == {}


# ---- where a cluster has started several processes ------------------------------------------------------------------------

SLURM = {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "12", "SLURM_NODELIST": "localhost", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
SLURM = {**SLURM, "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "said"), [(SLURM, "Set devices=2"), (TORCHRUN, "torchrun has started 2 processes")], ids=["SLURM", "torchrun"]
)
@pytest.mark.parametrize("devices", ["auto", 1])
def test_processes_of_a_cluster_do_not_train_alone_unasked(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str, devices: Any
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    unasked = resolve(accelerator="cpu", devices=devices).strategy
    with pytest.raises(ValueError, match=f"{said}.*pass strategy='single_device'"):
        unasked.setup_environment()
    resolve(accelerator="cpu", strategy="single_device", devices=devices).strategy.setup_environment()
    SingleDeviceStrategy().setup_environment()


@pytest.mark.parametrize("changed", [{"SLURM_JOB_NAME": "bash"}, {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0"}])
def test_one_task_or_an_interactive_job_trains_alone(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str]) -> None:
    for name, value in {**SLURM, **changed}.items():
        monkeypatch.setenv(name, value)
    resolve(accelerator="cpu").strategy.setup_environment()
