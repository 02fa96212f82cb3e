"""Environments that ask a library: MPI and XLA, as they really run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
MPIEXEC = shutil.which("mpiexec", path=BIN)

ASK = """
import json, socket, sys
if sys.argv[1:]:  # two machines, as one
    from mpi4py import MPI
    socket.gethostname = lambda: "baba"[MPI.COMM_WORLD.Get_rank()]
from lightning.fabric.plugins.environments import {name}, detect_environment
e = {name}()
told = [e.creates_processes_externally, e.world_size(), e.global_rank(), e.local_rank(), e.node_rank()]
"""


@pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py and an MPI library: pip install mpi4py mpich"
)
@pytest.mark.parametrize(
    ("hosts", "local", "node"), [([], [0, 1, 2, 3], [0, 0, 0, 0]), (["two"], [0, 0, 1, 1], [0, 1, 0, 1])], ids=["one", "two"]
)
def test_mpi_tells_ranks_and_agrees_on_a_port(hosts: list[str], local: list[int], node: list[int]) -> None:
    code = ASK.format(name="MPIEnvironment") + (
        "assert type(detect_environment()) is MPIEnvironment\n"
        "e.validate_settings(4, 1)\n"
        "try: e.validate_settings(2, 1)\n"
        "except ValueError as error: assert 'mpirun has started 4 processes' in str(error)\n"
        "else: raise AssertionError\n"
        "sys.stdout.write(json.dumps([*told, e.main_port, e.main_address]) + '\\n')\n"
    )
    assert MPIEXEC is not None
    run = subprocess.run([MPIEXEC, "-n", "4", sys.executable, "-c", code, *hosts], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    told = sorted((json.loads(line) for line in run.stdout.splitlines()), key=lambda line: line[2])
    assert [line[:3] for line in told] == [[True, 4, rank] for rank in range(4)]
    assert [line[3] for line in told] == local
    assert [line[4] for line in told] == node
    assert len({tuple(line[5:]) for line in told}) == 1


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")
def test_xla_tells_ranks() -> None:
    code = ASK.format(name="XLAEnvironment") + "print(json.dumps(told))\n"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "PJRT_DEVICE": "CPU"}
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [False, 1, 0, 0, 0]
