"""Trainings on two machines: two network namespaces with a cable between them, each with its own address."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import free_port

Start = Callable[..., Any]
SCRIPT = str(Path(__file__).parent / "program.py")


@dataclass
class Node:
    """A machine, or what stands for one.

    Args:
        rank: its number.
        address: under which the other one reaches it.
        interface: of its network.
        prefix: of commands that are to run there.
        folder: in which they run.
    """

    rank: int
    address: str
    interface: str
    prefix: list[str]
    folder: Path


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """Two machines with a network between them; where that is not permitted, two addresses of this machine."""
    name = f"node{os.getpid()}"
    found = []
    try:
        if shutil.which("ip") is None:
            raise OSError("iproute2 is not installed")
        for rank in range(2):
            ip("netns", "add", f"{name}-{rank}")
        ip("link", "add", "cable0", "netns", f"{name}-0", "type", "veth", "peer", "name", "cable1", "netns", f"{name}-1")
        for rank in range(2):
            inside = ("-n", f"{name}-{rank}")
            ip(*inside, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"cable{rank}")
            ip(*inside, "link", "set", f"cable{rank}", "up")
            ip(*inside, "link", "set", "lo", "up")
            prefix = ["ip", "netns", "exec", f"{name}-{rank}"]
            found.append(Node(rank, f"10.77.0.{rank + 1}", f"cable{rank}", prefix, tmp_path / f"node-{rank}"))
    except (OSError, subprocess.CalledProcessError):
        found = [Node(rank, f"127.0.0.{rank + 1}", "lo", [], tmp_path / f"node-{rank}") for rank in range(2)]
    for node in found:
        node.folder.mkdir()
    yield found
    for rank in range(2):
        if shutil.which("ip") is not None:
            subprocess.run(["ip", "netns", "delete", f"{name}-{rank}"], check=False, capture_output=True)


def run_on(nodes: list[Node], start: Start, *arguments: str, torchrun: bool = False, timeout: float = 100) -> list[Any]:
    """Run the script on each, to its end."""
    port = str(free_port())
    started = []
    for node in nodes:
        command = [*node.prefix, sys.executable]
        variables = {"GLOO_SOCKET_IFNAME": node.interface, "OMP_NUM_THREADS": "1"}
        if torchrun:
            place = ["--nnodes=2", f"--node-rank={node.rank}", "--nproc-per-node=1", f"--master-addr={nodes[0].address}"]
            command += ["-m", "torch.distributed.run", *place, f"--master-port={port}"]
        else:
            variables |= {"MASTER_ADDR": nodes[0].address, "MASTER_PORT": port, "NODE_RANK": str(node.rank)}
        shell = ["sh", "-c", 'cd "$0" && exec "$@"', str(node.folder)]
        started.append(start(*arguments, command=[*shell, *command, SCRIPT], **variables))
    done = [each.finish(timeout) for each in started]
    assert [each.left() for each in done] == [[], []]
    return done


def prepared(nodes: list[Node]) -> list[list[str]]:
    return [sorted(path.name for path in node.folder.glob("prepared-by-*")) for node in nodes]


def check_reports(done: list[Any], devices: int) -> None:
    assert [each.code for each in done] == [0, 0], done[0].error + done[1].error
    reports = sorted((report for each in done for report in each.results), key=lambda report: report["ranks"])
    assert [report["ranks"] for report in reports] == [[rank, rank // devices, rank % devices] for rank in range(2 * devices)]
    assert {report["world_size"] for report in reports} == {2 * devices}
    assert {report["steps"] for report in reports} == {32 // 2 // (2 * devices)}
    assert all(report["weights"] == reports[0]["weights"] for report in reports)
    assert len({report["seen"] for report in reports}) == 2 * devices  # each has data of its own


@pytest.mark.slow
def test_two_machines_train_one_model(nodes: list[Node], start: Start) -> None:
    done = run_on(nodes, start, "--devices", "2", "--per-node")
    check_reports(done, 2)
    assert prepared(nodes) == [["prepared-by-0"], ["prepared-by-2"]]


@pytest.mark.slow
def test_torchrun_on_two_machines_prepares_data_once(nodes: list[Node], start: Start) -> None:
    done = run_on(nodes, start, torchrun=True)
    check_reports(done, 1)
    assert prepared(nodes) == [["prepared-by-0"], []]


@pytest.mark.slow
@pytest.mark.parametrize(("deed", "cause"), [("raise", "rank 3 raised ValueError: bad batch"), ("kill", "rank 3 was killed by SIGKILL")])
def test_failure_on_one_machine_is_told_on_both(nodes: list[Node], start: Start, deed: str, cause: str) -> None:
    done = run_on(nodes, start, "--devices", "2", "--deed", deed)
    assert [each.code for each in done] == [1, 1]
    for each in done:
        assert f"PeerFailure: The run failed: {cause}" in each.error


def test_machine_without_address_of_the_first_is_told_before_any_process_starts(start: Start) -> None:
    done = start("--devices", "2", command=[sys.executable, SCRIPT], NODE_RANK="1", MASTER_PORT=str(free_port())).finish()
    assert done.code == 1
    assert "needs MASTER_ADDR in the environment" in done.error
    assert done.left() == []
