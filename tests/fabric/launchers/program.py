"""A script that the tests run: it launches a function whose ranks do what the command line says.

``python program.py [--launcher script|spawn|fork|forkserver] [--ranks N] [--options JSON] DEED...``: each deed is the name
of a function below, and one launch.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning.fabric.launchers import Launcher, MultiprocessingLauncher, PeerFailure, ScriptLauncher
from lightning.fabric.plugins.environments import LightningEnvironment


def rank() -> int:
    return int(os.environ["NODE_RANK"]) * int(os.environ.get("NODE_SIZE", "1")) + int(os.environ["LOCAL_RANK"])


def join() -> None:
    dist.init_process_group("gloo", rank=rank(), world_size=int(os.environ["WORLD_SIZE"]))


def total() -> float:
    value = torch.tensor([float(rank() + 1)])
    dist.all_reduce(value)
    return float(value)


def add() -> dict[str, Any]:
    """Each rank gives its number, from 1."""
    join()
    result = {"rank": rank(), "sum": total(), "argv": sys.argv[1:], "threads": torch.get_num_threads(), "pid": os.getpid()}
    dist.destroy_process_group()
    return result


def alone(deed: Callable[[], object]) -> Callable[[], None]:
    """The last rank does it, the others stand in a collective."""

    def run() -> None:
        join()
        total()
        if rank() == dist.get_world_size() - 1:
            deed()
        total()

    return run


def fail() -> None:
    raise ValueError("bad batch")


def leave_a_child() -> None:
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """The last rank stands still, and the others give up."""
    join()
    total()
    if rank() == dist.get_world_size() - 1:
        time.sleep(300)
    work = dist.all_reduce(torch.ones(1), async_op=True)
    assert work is not None
    work.wait(datetime.timedelta(seconds=1))


def exit_while_others_compute() -> None:
    if rank() > 0:
        sys.exit(3)
    for _ in range(3000):
        time.sleep(0.1)


def leave_while_others_compute() -> None:
    if rank() > 0:
        sys.exit(0)
    for _ in range(3000):
        time.sleep(0.1)


def exit_while_others_are_deaf() -> None:
    if rank() > 0:
        sys.exit(3)
    ctypes.CDLL(None).sleep(300)  # as in a collective: no Python runs until it returns


def fail_on_rank_zero() -> None:
    join()
    if rank() == 0:
        raise KeyError("zero")
    total()


def fail_alike() -> None:
    raise KeyError("alike")


def wait_for_the_end() -> None:
    """Tell the test which processes run, and stay."""
    join()
    total()
    Path(f"pid-{rank()}").write_text(str(os.getpid()))
    time.sleep(300)


def dawdle() -> str:
    """The last rank takes three seconds longer."""
    if rank() == int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(3)
        Path("dawdled").touch()
    return "done"


def return_tensors() -> Any:
    shared = torch.zeros(2)
    many = [torch.full((1,), float(index)) for index in range(300)]
    return {"many": many, "twice": [shared, shared], "learned": torch.nn.Parameter(torch.ones(2)), "text": "x"}


def return_a_function() -> Any:
    return lambda: 0


DEEDS: dict[str, Callable[[], Any]] = {
    "fail": alone(fail),
    "kill": alone(leave_a_child),
    "exit": alone(lambda: sys.exit(3)),
    "quit": lambda: sys.exit(0),
}


def do(deed: str) -> Any:
    return (DEEDS.get(deed) or globals()[deed])()


def make(arguments: argparse.Namespace) -> Launcher:
    options = json.loads(arguments.options)
    if arguments.launcher == "script":
        return ScriptLauncher(LightningEnvironment(), arguments.ranks, **options)
    return MultiprocessingLauncher(LightningEnvironment(), arguments.ranks, arguments.launcher, **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("deeds", nargs="+")
    parser.add_argument("--launcher", default="script")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--options", default="{}")
    parser.add_argument("--catch", action="store_true")
    parser.add_argument("--crash", type=int, default=-1, help="the rank that fails after its work")
    arguments = parser.parse_args()
    for deed in arguments.deeds:
        try:
            result = make(arguments).launch(do, deed)
        except (KeyError, PeerFailure) as error:
            if not arguments.catch:
                raise
            result = f"caught {type(error).__name__}"
        if deed == "return_tensors":
            result = repr(check_tensors(result))
        # One write: the ranks share the terminal.
        sys.stdout.write(f"@{json.dumps(result)}\n")
        sys.stdout.flush()
    if arguments.crash >= 0 and rank() == arguments.crash:
        raise RuntimeError("after the work")


def check_tensors(result: Any) -> list[bool]:
    return [
        torch.equal(torch.cat(result["many"]), torch.arange(300.0)),
        result["twice"][0] is result["twice"][1],
        isinstance(result["learned"], torch.nn.Parameter),
        result["text"] == "x",
    ]


if __name__ == "__main__":
    main()
