"""Scripts that launch Fabric, run as a user runs them: with processes that run the script again, with new ones, and with forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = r'''
import sys

import torch

from lightning.fabric import Fabric


def train(fabric, text, end="."):
    """Each process adds its rank; what they come to is the same in all of them."""
    seed = torch.initial_seed()
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 1)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    fabric.backward(model(torch.full((1, 2), float(fabric.global_rank))).sum())
    total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum")
    return [text + end, fabric.world_size, total.item(), module.weight.grad[0, 0].item(), seed]


class Running(Fabric):
    def run(self, text):
        return train(self, text)


def main(how):
    if how == "again":
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", num_nodes=1)
        fabric.launch()
        fabric.launch()
        fabric.print("launched", fabric.world_size)
        for result in (train(fabric, "after"), fabric.launch(train, "within", end="!")):
            sys.stdout.write(f"rank {fabric.global_rank}: {result}\n")  # in one piece
            sys.stdout.flush()
    elif how == "copies":
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
        fabric.seed_everything(3)
        print("result", fabric.launch(train, "spawned"))
        print("result", Running(accelerator="cpu", devices=2, strategy="ddp_fork").run("forked"))
        try:
            fabric.setup(torch.nn.Linear(1, 1))
        except RuntimeError as error:
            print(error)
    elif how == "failing":
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        if fabric.global_rank == 1:
            raise ValueError("on purpose")
        fabric.barrier()
        print("not reached")


if __name__ == "__main__":
    main(sys.argv[1])
'''


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "error", str(script), how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_script_runs_again_in_the_other_process_and_both_go_on(tmp_path: Path) -> None:
    done = run(tmp_path, "again")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("launched 2") == 1
    for text in ("after.", "within!"):
        expected = [f"rank {rank}: ['{text}', 2, 3.0, 0.5, 0]" for rank in range(2)]
        assert sorted(line for line in lines if text in line) == expected


def test_functions_run_in_new_processes_and_the_result_of_the_first_comes_back(tmp_path: Path) -> None:
    done = run(tmp_path, "copies")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [f"result ['{how}.', 2, 3.0, 0.5, 3]" for how in ("spawned", "forked")]
    assert "2 processes were asked for, and this one has not been launched" in done.stdout
    assert "Seed set to 3" in done.stderr


def test_process_that_fails_ends_the_other_one(tmp_path: Path) -> None:
    done = run(tmp_path, "failing")
    assert done.returncode != 0
    assert "not reached" not in done.stdout
    assert "ValueError: on purpose" in done.stderr
