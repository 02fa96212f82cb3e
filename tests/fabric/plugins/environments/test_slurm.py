"""Processes that srun starts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning

Set = Callable[..., None]
JOB = {
    "SLURM_NTASKS": 4,
    "SLURM_NTASKS_PER_NODE": 2,
    "SLURM_NNODES": 2,
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": 123456,
    "SLURM_PROCID": 3,
    "SLURM_LOCALID": 1,
    "SLURM_NODEID": 1,
    "SLURM_NODELIST": "n[1-2]",
}


@pytest.fixture(autouse=True)
def job(setenv: Set) -> None:
    setenv(**JOB)


def test_variables_are_read_and_can_not_be_set() -> None:
    environment = SLURMEnvironment()
    environment.set_world_size(100)
    environment.set_global_rank(100)
    assert SLURMEnvironment.detect()
    assert environment.creates_processes_externally
    assert (environment.world_size(), environment.global_rank(), environment.local_rank(), environment.node_rank()) == (4, 3, 1, 1)
    assert (environment.job_name(), environment.job_id()) == ("train", 123456)


def test_requeue_is_on_and_signalled_by_sigusr1() -> None:
    environment = SLURMEnvironment()
    assert environment.auto_requeue
    assert environment.requeue_signal is signal.SIGUSR1
    other = SLURMEnvironment(auto_requeue=False, requeue_signal=signal.SIGHUP)
    assert not other.auto_requeue
    assert other.requeue_signal is signal.SIGHUP


@pytest.mark.parametrize(
    ("job_id", "port"), [("123456", 18456), ("98765", 23765), ("7", 15007), ("120000", 15000), ("19999", 24999), (None, 12910)]
)
def test_port_follows_from_the_job(setenv: Set, job_id: str | None, port: int) -> None:
    setenv(SLURM_JOB_ID=job_id)
    assert SLURMEnvironment().main_port == port
    assert os.environ["MASTER_PORT"] == str(port)


def test_address_and_port_can_be_given(setenv: Set) -> None:
    setenv(MASTER_ADDR="given", MASTER_PORT=555)
    environment = SLURMEnvironment()
    assert (environment.main_address, environment.main_port) == ("given", 555)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("alpha,beta,gamma", "alpha"),
        ("n1 n2", "n1"),
        ("1.2.3.4", "1.2.3.4"),
        ("host[1-2,5]", "host1"),
        ("host[22,1-3]", "host22"),
        ("host[001-004]", "host001"),
        ("a[3,5-6],b1", "a3"),
        ("x-y-[0005-0009,12]", "x-y-0005"),
        ("a[1-2].domain", "a1.domain"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("r[12-14]n[7,9]-ib", "r12n7-ib"),
    ],
)
def test_main_address_is_the_first_machine(setenv: Set, nodes: str, first: str) -> None:
    assert SLURMEnvironment.resolve_root_node_address(nodes) == first
    setenv(SLURM_NODELIST=nodes)
    assert SLURMEnvironment().main_address == first
    assert os.environ["MASTER_ADDR"] == first


def test_main_address_without_a_list_is_this_machine(setenv: Set) -> None:
    setenv(SLURM_NODELIST=None)
    assert SLURMEnvironment().main_address == "127.0.0.1"


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_interactive_job_is_ignored(setenv: Set, name: str) -> None:
    setenv(SLURM_JOB_NAME=name)
    assert not SLURMEnvironment.detect()
    assert SLURMEnvironment.job_id() is None
    SLURMEnvironment().validate_settings(num_devices=8, num_nodes=5)


def test_nothing_of_slurm_is_not_detected(setenv: Set) -> None:
    setenv(**dict.fromkeys(JOB))
    assert not SLURMEnvironment.detect()
    assert (SLURMEnvironment.job_id(), SLURMEnvironment.job_name()) == (None, None)
    with pytest.raises(KeyError, match=r"SLURM_PROCID is not set. srun sets it"):
        SLURMEnvironment().global_rank()


def test_tasks_without_their_number_on_a_machine_are_refused(setenv: Set) -> None:
    setenv(SLURM_NTASKS_PER_NODE=None)
    with pytest.raises(RuntimeError, match=r"submitted with --ntasks=4.*#SBATCH --ntasks-per-node=N"):
        SLURMEnvironment()


def test_validation_accepts_what_the_job_has() -> None:
    SLURMEnvironment().validate_settings(num_devices=2, num_nodes=2)


@pytest.mark.parametrize("devices", [1, 3, 4])
def test_validation_refuses_other_devices(devices: int) -> None:
    with pytest.raises(ValueError, match=rf"devices={devices} was given.*--ntasks-per-node=2. Set devices=2, or submit"):
        SLURMEnvironment().validate_settings(num_devices=devices, num_nodes=2)


@pytest.mark.parametrize("nodes", [1, 3])
def test_validation_refuses_other_machines(nodes: int) -> None:
    with pytest.raises(ValueError, match=rf"num_nodes={nodes} was given.*--nodes=2. Set num_nodes=2, or submit"):
        SLURMEnvironment().validate_settings(num_devices=2, num_nodes=nodes)


def test_validation_without_numbers_accepts(setenv: Set) -> None:
    setenv(SLURM_NNODES=None, SLURM_NTASKS=None, SLURM_NTASKS_PER_NODE=None)
    SLURMEnvironment().validate_settings(num_devices=2, num_nodes=3)


def test_validation_refuses_one_task_for_several_devices(setenv: Set) -> None:
    setenv(SLURM_NTASKS_PER_NODE=None, SLURM_NTASKS=1, SLURM_NNODES=1)
    environment = SLURMEnvironment()
    environment.validate_settings(num_devices=1, num_nodes=1)
    with pytest.raises(ValueError, match=r"needs 2 processes, and the SLURM job runs 1 .*--ntasks-per-node=2"):
        environment.validate_settings(num_devices=2, num_nodes=1)


def test_srun_that_was_not_used_is_mentioned(setenv: Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "srun"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    setenv(PATH=tmp_path)
    assert SLURMEnvironment.detect()  # it was used
    setenv(SLURM_NTASKS=None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    with pytest.warns(PossibleUserWarning, match=r"srun python\S* train.py --lr 1$"):
        assert not SLURMEnvironment.detect()
