"""Directories that processes write together in the background: with hand-written loops, at the end of a program, and on a mesh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import free_port, run

from lightning.fabric import Fabric
from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.checkpoint.io import TorchCheckpointIO, load
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.fsdp import FSDPStrategy

PROGRAM = """
import sys, time, torch
from torch import nn
from lightning.fabric import Fabric
from lightning.fabric.checkpoint import sharded
from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.strategies.fsdp import FSDPStrategy

original = sharded.write_shards

def slow(*args):
    time.sleep(0.5)
    original(*args)

sharded.write_shards = slow
torch.set_num_threads(1)
strategy = FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded")
fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=[AsyncCheckpointIO()])
fabric.launch()
model = fabric.setup_module(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
fabric.save(sys.argv[1], {"model": model, "step": 7})
"""


def test_program_that_ends_waits_for_what_its_processes_save_together(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*launcher, "program.py", "saved.ckpt"], check=True, env=environment, timeout=120)
    assert load("saved.ckpt")["step"] == 7


def cut(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(module, mesh["tensor_parallel"], {"0": ColwiseParallel()})
    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def on_a_mesh(rank: int, size: int, folder: str, data_parallel: int) -> list[Any]:
    strategy = ModelParallelStrategy(
        parallelize_fn=lambda module, mesh: cut(module, mesh), data_parallel_size=data_parallel, tensor_parallel_size=size // data_parallel
    )
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy, plugins=[AsyncCheckpointIO()])
    torch.manual_seed(3)
    model = fabric.setup_module(nn.Sequential(nn.Linear(4, 6), nn.Identity()))
    before = strategy.get_module_state_dict(model.module)
    whole = {name: value.full_tensor().tolist() for name, value in before.items()}
    fabric.save(os.path.join(folder, "saved.ckpt"), {"model": model, "step": 7})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the copy has been made
    writer: Any = strategy.checkpoint_io
    writer.wait()
    return [whole]


@pytest.mark.parametrize("data_parallel", [1, 2])
def test_copies_of_tensors_on_a_mesh_are_saved(tmp_path: Path, data_parallel: int) -> None:
    (first,), (second,) = run(on_a_mesh, 2, str(tmp_path), data_parallel)
    assert first == second
    found = load(tmp_path / "saved.ckpt")
    assert {name: value.tolist() for name, value in found["model"].items()} == first


class Own(TorchCheckpointIO):
    pass


def with_another_writer(rank: int, size: int) -> None:
    strategy = FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded")
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy, plugins=[AsyncCheckpointIO(Own())])
    model = fabric.setup_module(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="Own was given, and checkpoints that are directories are written by all processes, past it"):
        fabric.save("saved.ckpt", {"model": model})


def test_directories_are_not_written_past_a_plugin_of_the_user() -> None:
    run(with_another_writer, 2)
