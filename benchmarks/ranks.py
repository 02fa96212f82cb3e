"""What a run of many processes costs rank 0, and each of them, as far as one machine can tell: modelled for 10, 100, 1,000 and 10,000.

- *store*: the store of rank 0, and what the threads of that many processes ask of it in a second.
- *watchdog*: rank 0's look at all processes, from a store that holds their statuses.
- *checkpoint*: the states of all processes (random numbers, places in the data, running values) in one file: bytes, seconds to write and
  to read, in memory; and what a list of them would take, as it does with fewer than 64 processes.
- *compare*, *gather*: what the processes tell each other about names they log, and their states, in real gloo processes.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --processes 2 4 8        fewer
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

RANKS = (10, 100, 1_000, 10_000)
LISTED = 1_000  # states that are written as a list; more are extrapolated


def timed(function: Callable[[], Any], times: int = 5) -> float:
    """Seconds of CPU time of the thread, the best of some times."""
    found = []
    for _ in range(times):
        begun = time.thread_time()
        function()
        found.append(time.thread_time() - begun)
    return min(found)


# ---- the store ------------------------------------------------------------------------------------------------------------


def store() -> dict[str, Any]:
    """How many requests a second the store answers, and how much of rank 0's CPU time one takes."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    code = (
        "import sys, torch, time\n"
        "client = torch.distributed.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=False)\n"
        "end, count = time.time() + 2, 0\n"
        "while time.time() < end:\n"
        "    client.check(['keraunos/1/alarm']); count += 1\n"
        "print(count / 2)\n"
    )
    begun = time.process_time(), time.perf_counter()
    clients = [subprocess.Popen([sys.executable, "-c", code, str(server.port)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    rates = [float(client.communicate()[0]) for client in clients]
    spent = time.process_time() - begun[0]
    return {"requests_per_second": round(sum(rates)), "cpu_per_request": spent / (2 * sum(rates))}


def asked_per_second(ranks: int) -> float:
    """Requests that the threads of so many processes send: for alarms, halts, signals, and statuses."""
    from lightning.fabric.side_channel import POLL, SideChannel
    from lightning.fabric.watchdog import LOOK
    from lightning.pytorch.trainer.signals import LISTEN

    channel = SideChannel(0, ranks, None)
    each = 2 / channel.paced(POLL) + 1 / channel.paced(LISTEN) + 2 / channel.paced(LOOK)
    return ranks * each


def watching(ranks: int) -> dict[str, float]:
    """One look of rank 0 at all processes, and the part of its time that such looks take."""
    from lightning.fabric.side_channel import SideChannel
    from lightning.fabric.watchdog import DEFAULT_LIMIT, Status, Watchdog

    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    channel = SideChannel(0, ranks, server)
    channel._copy = server
    watchdog = Watchdog(channel, DEFAULT_LIMIT, lambda: 0)
    for rank in range(ranks):
        channel.put(f"watch/{rank}", asdict(Status(position=[1, 2, 3], where="epoch 1, batch 2", dump="/proc/1/fd/3")))
    seconds = timed(watchdog._watch)
    return {"seconds": seconds, "every": watchdog.every, "share": seconds / watchdog.every}


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


def state_of_one() -> dict[str, Any]:
    """What a checkpoint of a small run holds for one process."""
    from torch.utils.data import DataLoader

    from lightning.pytorch import LightningModule, Trainer

    class Small(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.layer(batch).sum()
            self.log_dict({"loss": loss, "error": loss * 2, "rate": 0.1}, on_step=True, on_epoch=True)
            if batch_idx == 3:
                found.append(states(self.trainer)[0])
            return loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    from lightning.pytorch.resume import states

    found: list[Any] = []
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, **options)
    trainer.fit(Small(), DataLoader([torch.ones(8)] * 40, batch_size=4, shuffle=True))  # type: ignore[arg-type]
    return found[0]  # type: ignore[no-any-return]


def checkpoint(state: dict[str, Any], ranks: int) -> dict[str, float]:
    """The states of so many processes in one file: seconds of rank 0 to write them, and of each process to read its own."""
    from lightning.fabric.checkpoint.format import encode
    from lightning.pytorch.packed import MANY, opened

    packed = saved(encode(state))
    listed = [torch.load(io.BytesIO(packed), weights_only=True) for _ in range(min(ranks, LISTED))]
    as_list = timed(lambda: saved({"processes": encode(listed)}), 1) * ranks / len(listed)
    if ranks < MANY:
        file = saved({"processes": encode(listed)})
        read = timed(lambda: torch.load(io.BytesIO(file), weights_only=True))
        return {"bytes": len(file), "own": 0.0, "write": as_list, "read": read, "as_list": as_list}
    one = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    content = {"packed": one.repeat(ranks), "ends": torch.full((ranks,), one.numel()).cumsum(0)}
    file = saved({"processes": content})

    def read_own() -> None:
        opened(torch.load(io.BytesIO(file), weights_only=True)["processes"])[ranks // 2]

    own, write, read = timed(lambda: saved(encode(state))), timed(lambda: saved({"processes": encode(content)})), timed(read_own)
    return {"bytes": len(file), "own": own, "write": write, "read": read, "as_list": as_list}


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# ---- processes ------------------------------------------------------------------------------------------------------------


def in_process(rank: int, size: int, port: int) -> None:
    """One of several gloo processes: time what they tell each other, by the clock, on rank 0."""
    from lightning.fabric import collectives
    from lightning.pytorch.packed import gather_packed

    torch.set_num_threads(1)
    begun = time.perf_counter()
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    collectives.barrier()
    results = {"meet": time.perf_counter() - begun}
    state = {f"tensor_{index}": torch.zeros(5056, dtype=torch.uint8) for index in range(7)}  # of the size of a process's state
    names = {f"name_{index}": "mean" for index in range(10)}
    for name, call in {
        "compare": lambda: collectives.compare(names),
        "gather": lambda: collectives.gather_object(state),
        "gather_packed": lambda: gather_packed(state),
        "broadcast": lambda: collectives.broadcast(state),
    }.items():
        times, cpu = [], []
        for _ in range(10):
            collectives.barrier()
            started, used = time.perf_counter(), time.process_time()
            call()
            times.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        results[name], results[f"{name}_cpu"] = statistics.median(times), statistics.median(cpu)
    if rank == 0:
        print(json.dumps(results))
    collectives.barrier()


def processes(size: int) -> dict[str, float]:
    """The same in processes of their own; seconds on rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen([*command, str(rank), str(size), str(port)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(size)
    ]
    outputs = [process.communicate()[0] for process in started]
    return json.loads(outputs[0].splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="numbers of gloo processes")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="numbers of processes that are modelled")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "ranks.json", help="where the figures go")
    parser.add_argument("--rank", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        in_process(*args.rank)
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine['date']}, {machine['cpu']}, load {machine['load']}, torch {torch.__version__}\n")
    of_store, state = store(), state_of_one()
    results: dict[str, Any] = {**machine, "store": of_store, "modelled": {}, "processes": {}}
    rate, cost = of_store["requests_per_second"], of_store["cpu_per_request"] * 1e6
    print(f"The store answers {rate:,} requests a second, each for {cost:.1f} us of rank 0.\n")
    head = f"{'states, MB':>12}{'own, ms':>9}{'write, s':>10}{'read, s':>9}{'as a list':>11}"
    print(f"{'ranks':>7}{'asked a second':>16}{'of a core':>11}{'a look, ms':>12}{'of rank 0':>11}{head}")
    for ranks in args.ranks:
        asked, look, file = asked_per_second(ranks), watching(ranks), checkpoint(state, ranks)
        share = asked * of_store["cpu_per_request"]
        results["modelled"][ranks] = {"asked_per_second": asked, "of_a_core": share, "watching": look, "checkpoint": file}
        print(
            f"{ranks:>7,}{asked:>16,.0f}{share:>11.1%}{look['seconds'] * 1e3:>12.1f}{look['share']:>11.2%}"
            f"{file['bytes'] / 1e6:>12.2f}{file['own'] * 1e3:>9.1f}{file['write']:>10.3f}{file['read']:>9.3f}{file['as_list']:>11.2f}",
            flush=True,
        )
    shown = ("compare", "broadcast", "gather_packed", "gather")
    print(f"\nMilliseconds of CPU time of rank 0\n{'processes':>9}{'meet, s':>9}{''.join(f'{name:>15}' for name in shown)}")
    for size in args.processes:
        found = results["processes"][size] = processes(size)
        times = "".join(f"{found[f'{name}_cpu'] * 1e3:>15.2f}" for name in shown)
        print(f"{size:>9}{found['meet']:>9.2f}{times}", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
