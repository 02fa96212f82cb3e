"""Check random state, memory and batch helpers on a CUDA machine: ``python tests/gpu/check_utilities_cuda.py``.

A plain script that needs torch and numpy only, so that it runs where nothing can be installed. Each check asserts and prints a line.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch

from lightning.fabric.utilities.seed import collect_rng_states, seed_everything, set_rng_states
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.grads import grad_norm
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_cuda_out_of_memory, is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng

CUDA = torch.device("cuda")


def check_nothing_wakes_cuda() -> None:
    seed_everything(3, verbose=False)
    assert collect_rng_states()["torch.cuda"] == []
    garbage_collection_cuda()
    assert not torch.cuda.is_initialized()


def check_first_use_inside_isolate_rng() -> None:
    with isolate_rng():
        inside = torch.rand(4, device=CUDA)
    assert torch.equal(torch.rand(4, device=CUDA), inside)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device=CUDA), inside)


def check_states_survive_a_file() -> None:
    torch.rand(10, device=CUDA)
    file = io.BytesIO()
    torch.save(collect_rng_states(), file)
    drawn = torch.rand(4, device=CUDA)
    file.seek(0)
    set_rng_states(torch.load(file, weights_only=True, map_location=CUDA))
    assert torch.equal(torch.rand(4, device=CUDA), drawn)
    with isolate_rng():
        drawn = torch.rand(4, device=CUDA)
    assert torch.equal(torch.rand(4, device=CUDA), drawn)


def check_states_of_more_devices_than_there_are() -> None:
    states = collect_rng_states()
    states["torch.cuda"] *= torch.cuda.device_count() + 1
    set_rng_states(states)


def check_no_sync() -> None:
    model = torch.nn.Linear(8, 8).to(CUDA)
    model(torch.ones(2, 8, device=CUDA)).sum().backward()
    batch = {"x": torch.zeros(5, 3, device=CUDA), "y": torch.zeros(5, device=CUDA)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms = grad_norm(model, 2)
        assert extract_batch_size(batch) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.device.type == "cuda" for value in norms.values())


def check_real_out_of_memory() -> None:
    caught: list[RuntimeError] = []
    try:
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)
    except RuntimeError as error:
        caught.append(error)
    assert is_cuda_out_of_memory(caught[0])
    assert is_oom_error(caught[0])
    garbage_collection_cuda()
    assert torch.cuda.memory_reserved() < 2**30


def check_peak() -> None:
    peak = get_available_flops(CUDA, torch.bfloat16)
    print(f"    {torch.cuda.get_device_name()}: {peak} operations per second in bfloat16")


def main() -> None:
    checks = [check for name, check in globals().items() if name.startswith("check_")]
    for check in checks:
        check()
        print(f"ok  {check.__name__.removeprefix('check_').replace('_', ' ')}")
    print(f"all {len(checks)} checks passed on {torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
