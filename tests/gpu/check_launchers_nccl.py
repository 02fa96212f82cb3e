"""Check on two GPUs that a failing rank ends a run that stands in a collective of NCCL: ``python tests/gpu/check_launchers_nccl.py``.

A plain script that needs torch only. ``--device cpu`` runs it with gloo. Each check asserts and prints a line.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
import torch.distributed as dist

from lightning.fabric.launchers import MultiprocessingLauncher, ScriptLauncher
from lightning.fabric.plugins.environments import LightningEnvironment

SHUTDOWN = 8.0
EXPECTED = {
    "raise": "rank 1 raised ValueError: bad batch",
    "kill": "rank 1 was killed by SIGKILL",
    "exit": "rank 1 ended with exit code 3",
    "leave": "rank 1 left with exit code 0",
}


def work(deed: str, device: str) -> float:
    """Rank 1 does the deed while rank 0 stands in a collective; without one both meet twice."""
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(rank)
    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=size)
    value = torch.ones(1, device=place)
    dist.all_reduce(value)
    sys.stdout.write(f"ready {rank} {float(value)} {time.time()}\n")  # one write: the ranks share the terminal
    sys.stdout.flush()
    if rank == 1:
        if deed == "raise":
            raise ValueError("bad batch")
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed in ("exit", "leave"):
            os._exit(3 if deed == "exit" else 0)
    dist.all_reduce(value)
    result = float(value)  # the host waits here for the device
    dist.destroy_process_group()
    return result


def left(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def check(launcher: str, deed: str, device: str) -> None:
    mark = uuid.uuid4().hex
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), __file__]  # type: ignore[attr-defined]
    run = subprocess.run(
        [*command, "--device", device, "--launcher", launcher, "--deed", deed],
        env={**os.environ, "CHECK_MARK": mark},
        capture_output=True,
        text=True,
        timeout=120,
    )
    ended = time.time()
    began = max(float(line.split()[3]) for line in run.stdout.splitlines() if line.startswith("ready"))
    time.sleep(0.5)
    said = run.stdout + run.stderr
    assert left(mark) == [], said
    if deed == "none":
        assert run.returncode == 0, said
        assert "result 4.0" in run.stdout, said
    else:
        assert run.returncode != 0, said
        assert EXPECTED[deed] in run.stderr, said
        assert ended - began < SHUTDOWN + 4, f"{ended - began:.1f} s\n{said}"
    print(f"ok  {launcher:6} {deed:6} exit code {run.returncode:3}, {ended - began:4.1f} s after it", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--launcher")
    parser.add_argument("--deed")
    arguments = parser.parse_args()
    if arguments.deed:
        environment = LightningEnvironment()
        launcher: ScriptLauncher | MultiprocessingLauncher
        if arguments.launcher == "script":
            launcher = ScriptLauncher(environment, 2, shutdown_timeout=SHUTDOWN)
        else:
            launcher = MultiprocessingLauncher(environment, 2, arguments.launcher, shutdown_timeout=SHUTDOWN)
        print("result", launcher.launch(work, arguments.deed, arguments.device), flush=True)
        return 0
    runs = [(launcher, deed, arguments.device) for launcher in ("script", "fork", "spawn") for deed in ("none", *EXPECTED)]
    with ThreadPoolExecutor(5) as pool:  # most of the time is spent waiting
        for done in [pool.submit(check, *each) for each in runs]:
            done.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
