"""Check ModelParallelStrategy on two GPUs with NCCL: ``python tests/gpu/check_model_parallel_cuda.py``.

A plain script; ``--device cpu`` runs it with gloo, to test the script itself. Each check asserts and prints a line.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fabric" / "strategies"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
import torch.multiprocessing
from test_model_parallel import Network, by_both, by_data, by_data_in_part, by_tensor, full, train
from torch import Tensor, nn
from training import batches, largest_difference, part

from lightning.fabric.accelerators.cpu import CPUAccelerator
from lightning.fabric.accelerators.cuda import CUDAAccelerator
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.precision import MixedPrecision
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.sharding import full_tensor, local_tensor
from lightning.fabric.strategies.single_device import SingleDeviceStrategy

GRIDS = [((1, 2), by_tensor), ((2, 1), by_data), ((2, 1), by_data_in_part), ((1, 2), by_both)]
TOLERANCE = 2e-6


class Setting:
    """Where the checks run."""

    def __init__(self, device: str, rank: int) -> None:
        self.type, self.rank = device, rank
        self.devices = [torch.device("cuda", index) if device == "cuda" else torch.device("cpu") for index in range(2)]
        self.here = self.devices[rank]

    def strategy(self, grid: tuple[int, int], divide: Any, **kwargs: Any) -> ModelParallelStrategy:
        accelerator = CUDAAccelerator() if self.type == "cuda" else CPUAccelerator()
        return ModelParallelStrategy(
            *grid,
            parallelize_fn=divide,
            accelerator=accelerator,
            parallel_devices=self.devices,
            cluster_environment=LightningEnvironment(),
            timeout=timedelta(seconds=60),
            **kwargs,
        )

    def data(self, grid: tuple[int, int], global_batches: list[Tensor] | None = None) -> list[Tensor]:
        given = batches() if global_batches is None else global_batches
        return [part(batch, self.rank // grid[1], grid[0]).to(self.here) for batch in given]

    def alone(self, clip: float | None = None, data: list[Tensor] | None = None) -> dict[str, Any]:
        model = Network()
        train(SingleDeviceStrategy(self.here), model, [batch.to(self.here) for batch in (data or batches())], 1, clip)
        return full(model)


def check_weights_are_those_of_one_gpu(at: Setting) -> None:
    for grid, divide in GRIDS:
        for accumulate, clip in ((1, None), (3, 0.3)):
            model = Network()
            data = [piece for batch in at.data(grid) for piece in batch.split(len(batch) // accumulate)]
            train(at.strategy(grid, divide), model, data, accumulate, clip)
            difference = largest_difference(full(model), at.alone(clip))
            assert difference < TOLERANCE, (grid, divide.__name__, accumulate, difference)


def check_mixed_precisions(at: Setting) -> None:
    for grid, divide in GRIDS:
        model = Network()
        train(at.strategy(grid, divide, precision=MixedPrecision("bf16-mixed", at.type)), model, at.data(grid))
        assert 1e-6 < largest_difference(full(model), at.alone()) < 5e-2


def check_scaler_leaves_out_a_step_on_all(at: Setting) -> None:
    for grid, divide in GRIDS:
        scaler = torch.amp.GradScaler(at.type, init_scale=2.0**10, growth_interval=100)  # type: ignore[attr-defined]
        overflowing = batches()
        overflowing[1] = overflowing[1].clone()
        overflowing[1][1] = float("inf")  # with two groups of data, one group alone overflows
        model = Network()
        train(at.strategy(grid, divide, precision=MixedPrecision("16-mixed", at.type, scaler)), model, at.data(grid, overflowing))
        assert scaler.get_scale() == 2.0**9, scaler.get_scale()
        expected = at.alone(data=[batch for index, batch in enumerate(batches()) if index != 1])
        assert largest_difference(full(model), expected) < 2e-2


def on_meta(divide: Any) -> Any:
    return lambda model, mesh: divide(model.to("meta"), mesh)


def check_meta_device_gives_the_weights_of_one_gpu(at: Setting) -> None:
    torch.manual_seed(5)
    with at.here:
        plain = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 1))
    expected = [parameter.detach().clone() for parameter in plain.parameters()]
    for grid, divide in GRIDS:
        strategy = at.strategy(grid, on_meta(divide))
        strategy.setup_environment()
        model = Network()
        torch.manual_seed(5)
        strategy.setup_module(model)
        for ours, theirs in zip(model.parameters(), expected):
            assert ours.device == at.here
            assert torch.equal(full_tensor(ours.detach()), theirs)


def check_random_numbers_are_shared(at: Setting) -> None:
    torch.manual_seed(at.rank)
    strategy = at.strategy((1, 2), None)
    strategy.setup_environment()
    drawn = torch.cat([torch.rand(3, device=at.here).cpu(), torch.rand(3)])
    assert len({tuple(each) for each in strategy.all_gather(drawn).tolist()}) == 1


def check_checkpoints_go_from_grid_to_grid(at: Setting) -> None:
    folder = Path(os.environ["CHECK_FOLDER"])
    for saves in (True, False):
        for number, (grid, divide) in enumerate(GRIDS):
            path = folder / f"{saves}-{number}.ckpt"
            strategy, model = at.strategy(grid, divide, save_distributed_checkpoint=saves), Network()
            optimizer = trained(strategy, model, at.data(grid))
            weights = full(model)
            checkpoint = {"state_dict": strategy.lightning_module_state_dict(), "optimizer_states": [strategy.optimizer_state(optimizer)]}
            strategy.save_checkpoint(checkpoint, path)
            strategy.barrier()
            assert path.is_dir() == saves
            for other_grid, other_divide in GRIDS:
                other, copy = at.strategy(other_grid, other_divide), Network()
                again = trained(other, copy, [])
                loaded = other.load_checkpoint(path)
                other.load_model_state_dict(loaded)
                other.load_optimizer_state(again, loaded["optimizer_states"][0])
                assert full(copy) == weights
                for ours, theirs in zip(copy.parameters(), model.parameters()):
                    for key, value in again.state[ours].items():
                        assert torch.equal(full_tensor(value), full_tensor(optimizer.state[theirs][key])), key


def trained(strategy: ModelParallelStrategy, model: Any, data: list[Tensor]) -> torch.optim.Optimizer:
    """With AdamW, fused where it can be: torch has no fused step of divided and plain parameters together."""
    strategy.connect(model)
    strategy.setup_environment()
    strategy.model = strategy.setup_module(model)
    kinds = {type(parameter) is nn.Parameter for parameter in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True if len(kinds) == 1 else None)
    strategy.optimizers = [strategy.setup_optimizer(optimizer)]
    step = strategy.bind("training_step")

    def closure(batch: Tensor, index: int) -> Tensor:
        loss: Tensor = step(batch, index)
        optimizer.zero_grad()
        strategy.backward(loss)
        strategy.clip_gradients(optimizer, 0.3)
        return loss

    for index, batch in enumerate(data):
        if index == 2 and batch.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        strategy.optimizer_step(optimizer, lambda batch=batch, index=index: closure(batch, index))
    if data and data[0].device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return optimizer


def check_steps_read_nothing_from_the_device(at: Setting) -> None:
    for grid, divide in GRIDS:
        trained(at.strategy(grid, divide), Network(), at.data(grid))  # an error if one does, after the first two


def check_second_run_goes_on_after_the_end_of_the_first(at: Setting) -> None:
    for grid, divide in GRIDS:
        strategy, model = at.strategy(grid, divide), Network()
        train(strategy, model, at.data(grid)[:2])
        strategy._parallelize_fn = None  # divided already
        strategy.teardown()
        assert all(local_tensor(parameter).device.type == "cpu" for parameter in model.parameters())
        again = strategy.setup_module(model)
        assert all(local_tensor(parameter).device == at.here for parameter in again.parameters())
        with torch.no_grad() if divide is by_tensor else nullcontext():
            assert torch.isfinite(strategy.as_forward(model, model.training_step)(at.data(grid)[0], 0))


CHECKS: list[Callable[[Setting], None]] = [
    check_weights_are_those_of_one_gpu,
    check_mixed_precisions,
    check_scaler_leaves_out_a_step_on_all,
    check_meta_device_gives_the_weights_of_one_gpu,
    check_random_numbers_are_shared,
    check_checkpoints_go_from_grid_to_grid,
    check_steps_read_nothing_from_the_device,
    check_second_run_goes_on_after_the_end_of_the_first,
]


def main(rank: int, device: str, port: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    for check in CHECKS:
        check(Setting(device, rank))
        if rank == 0:
            print(f"ok {check.__name__}", flush=True)
    faulthandler.dump_traceback_later(30, exit=True)  # where it stands, should it not end
    torch.distributed.destroy_process_group()


def run_script(device: str) -> None:
    """What a user's script does, without an end of its own for the processes' groups."""
    import lightning.pytorch as L

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network()

        def configure_model(self) -> None:
            by_both(self.net, self.device_mesh)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net.training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    trainer = L.Trainer(accelerator=device, devices=2, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.cat(batches()), batch_size=2))


def check_scripts_end_well(device: str) -> None:
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), __file__, "--device", device, "--script"]  # type: ignore[attr-defined]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "terminate called" not in run.stderr, run.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--script", action="store_true")
    chosen = parser.parse_args()
    if chosen.script:
        run_script(chosen.device)
        sys.exit()
    check_scripts_end_well(chosen.device)
    print("ok check_scripts_end_well", flush=True)
    with tempfile.TemporaryDirectory() as checkpoints:
        os.environ["CHECK_FOLDER"] = checkpoints
        torch.multiprocessing.spawn(main, (chosen.device, find_free_network_port()), nprocs=2)  # type: ignore[no-untyped-call]
    print("all is well")
