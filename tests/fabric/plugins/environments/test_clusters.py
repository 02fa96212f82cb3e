"""torchrun, LSF, Kubeflow, and the choice among all environments."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning.pytorch.plugins.environments as documented
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    XLAEnvironment,
    detect_environment,
)

Set = Callable[..., None]
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "MASTER_ADDR": "host",
    "MASTER_PORT": 99,
    "WORLD_SIZE": 4,
    "RANK": 3,
    "LOCAL_RANK": 1,
    "GROUP_RANK": 1,
}
SLURM = {"SLURM_NTASKS": 4, "SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_NAME": "train"}


def lsf(tmp_path: Path, *hosts: str) -> dict[str, object]:
    file = tmp_path / "hosts"
    file.write_text("".join(f"{host}\n" for host in hosts))
    return {
        "LSB_JOBID": 98765,
        "LSB_DJOB_RANKFILE": file,
        "JSM_NAMESPACE_LOCAL_RANK": 1,
        "JSM_NAMESPACE_SIZE": 4,
        "JSM_NAMESPACE_RANK": 3,
    }


def ranks(environment: ClusterEnvironment) -> tuple[int, int, int, int]:
    return environment.world_size(), environment.global_rank(), environment.local_rank(), environment.node_rank()


class TestTorchElastic:
    def test_variables_are_read_and_can_not_be_set(self, setenv: Set) -> None:
        setenv(**TORCHRUN)
        environment = TorchElasticEnvironment()
        environment.set_world_size(100)
        environment.set_global_rank(100)
        assert environment.creates_processes_externally
        assert (environment.main_address, environment.main_port) == ("host", 99)
        assert ranks(environment) == (4, 3, 1, 1)

    def test_missing_address_is_set_with_a_warning(self) -> None:
        environment = TorchElasticEnvironment()
        with pytest.warns(UserWarning, match="MASTER_ADDR is not set"):
            assert environment.main_address == "127.0.0.1"
        with pytest.warns(UserWarning, match="MASTER_PORT is not set"):
            assert environment.main_port == 12910
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "12910")

    def test_missing_rank_says_how_to_start(self) -> None:
        with pytest.raises(KeyError, match=r"^The environment variable RANK is not set. torchrun sets it"):
            TorchElasticEnvironment().global_rank()
        assert TorchElasticEnvironment().node_rank() == 0

    @pytest.mark.parametrize(("devices", "nodes"), [(2, 2), (4, 1), (1, 4)])
    def test_validation_accepts_the_same_number_of_processes(self, setenv: Set, devices: int, nodes: int) -> None:
        setenv(**TORCHRUN)
        TorchElasticEnvironment().validate_settings(devices, nodes)

    def test_validation_refuses_another_number(self, setenv: Set) -> None:
        setenv(**TORCHRUN)
        with pytest.raises(ValueError, match="torchrun has started 4 processes, while devices=3 and num_nodes=2 make 6"):
            TorchElasticEnvironment().validate_settings(3, 2)


class TestLSF:
    def test_first_machine_that_computes_is_the_main_one(self, setenv: Set, tmp_path: Path) -> None:
        here = socket.gethostname()
        setenv(**lsf(tmp_path, "login", "other", "other", here, here))
        environment = LSFEnvironment()
        assert environment.creates_processes_externally
        assert (environment.main_address, environment.main_port) == ("other", 10765)
        assert ranks(environment) == (4, 3, 1, 1)
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("other", "10765")

    def test_first_line_is_not_counted_even_if_it_computes(self, setenv: Set, tmp_path: Path) -> None:
        here = socket.gethostname()
        setenv(**lsf(tmp_path, "batch", here, "batch", here))
        assert LSFEnvironment().node_rank() == 0

    def test_port_can_be_given(self, setenv: Set, tmp_path: Path) -> None:
        setenv(**lsf(tmp_path, "login", socket.gethostname()), MASTER_PORT=4444, MASTER_ADDR="ignored")
        environment = LSFEnvironment()
        assert (environment.main_address, environment.main_port) == (socket.gethostname(), 4444)

    def test_machine_without_a_place_is_refused(self, setenv: Set, tmp_path: Path) -> None:
        setenv(**lsf(tmp_path, "login", "a", "b"))
        with pytest.raises(KeyError, match=r"is not among those of LSB_DJOB_RANKFILE: a, b"):
            LSFEnvironment()

    def test_file_without_machines_is_refused(self, setenv: Set, tmp_path: Path) -> None:
        setenv(**lsf(tmp_path, "login"))
        with pytest.raises(ValueError, match="lists 1 machines"):
            LSFEnvironment()

    @pytest.mark.parametrize("name", ["LSB_DJOB_RANKFILE", "LSB_JOBID"])
    def test_missing_variable_is_named(self, setenv: Set, tmp_path: Path, name: str) -> None:
        setenv(**{**lsf(tmp_path, "login", socket.gethostname()), name: None})
        with pytest.raises(ValueError, match=f"{name} is not set"):
            LSFEnvironment()
        assert not LSFEnvironment.detect()

    def test_missing_rank_says_how_to_start(self, setenv: Set, tmp_path: Path) -> None:
        setenv(**{**lsf(tmp_path, "login", socket.gethostname()), "JSM_NAMESPACE_RANK": None})
        environment = LSFEnvironment()
        with pytest.raises(ValueError, match=r"JSM_NAMESPACE_RANK is not set. `jsrun` sets it"):
            environment.global_rank()

    def test_validation_compares_the_number_of_processes(self, setenv: Set, tmp_path: Path) -> None:
        setenv(**lsf(tmp_path, "login", socket.gethostname()))
        LSFEnvironment().validate_settings(2, 2)
        with pytest.raises(ValueError, match=r"jsrun has started 4 processes, while devices=2 and num_nodes=1 make 2. Let devices be"):
            LSFEnvironment().validate_settings(2, 1)


class TestKubeflow:
    def test_each_pod_is_a_machine(self, setenv: Set) -> None:
        setenv(MASTER_ADDR="pod-0", MASTER_PORT=23456, WORLD_SIZE=3, RANK=2, LOCAL_RANK=1)
        environment = KubeflowEnvironment()
        assert environment.creates_processes_externally
        assert (environment.main_address, environment.main_port) == ("pod-0", 23456)
        assert ranks(environment) == (3, 2, 0, 2)

    def test_validation_compares_the_number_of_pods(self, setenv: Set) -> None:
        setenv(MASTER_ADDR="pod-0", MASTER_PORT=23456, WORLD_SIZE=3, RANK=2)
        KubeflowEnvironment().validate_settings(1, 3)
        with pytest.raises(ValueError, match="The PyTorchJob has started 3 processes, while devices=3 and num_nodes=3 make 9"):
            KubeflowEnvironment().validate_settings(3, 3)

    def test_is_never_detected(self) -> None:
        with pytest.raises(NotImplementedError, match=r"plugins=\[KubeflowEnvironment\(\)\]"):
            KubeflowEnvironment.detect()

    def test_missing_variable_is_named(self) -> None:
        with pytest.raises(KeyError, match="MASTER_PORT is not set"):
            _ = KubeflowEnvironment().main_port


class TestChoice:
    def test_nothing_set_gives_our_own(self) -> None:
        assert type(detect_environment()) is LightningEnvironment

    def test_torchrun_comes_before_slurm_and_slurm_before_lsf(self, setenv: Set, tmp_path: Path) -> None:
        setenv(**lsf(tmp_path, "login", socket.gethostname()))
        assert type(detect_environment()) is LSFEnvironment
        setenv(**SLURM)
        assert type(detect_environment()) is SLURMEnvironment
        setenv(**TORCHRUN)
        assert type(detect_environment()) is TorchElasticEnvironment

    def test_variables_of_kubeflow_alone_give_our_own(self, setenv: Set) -> None:
        setenv(KUBERNETES_PORT="tcp://1.2.3.4:443", MASTER_ADDR="pod-0", MASTER_PORT=23456, WORLD_SIZE=3, RANK=2)
        assert type(detect_environment()) is LightningEnvironment

    def test_packages_that_are_missing_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for package in ("mpi4py", "torch_xla"):
            monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        assert not MPIEnvironment.detect()
        with pytest.raises(ModuleNotFoundError, match="pip install mpi4py"):
            MPIEnvironment()
        assert not XLAEnvironment.detect()
        with pytest.raises(ModuleNotFoundError, match="torch_xla"):
            XLAEnvironment()

    def test_documented_path_holds_the_same_classes(self) -> None:
        assert documented.SLURMEnvironment is SLURMEnvironment
        assert "ClusterEnvironment" in documented.__all__


def test_custom_environment_needs_ranks_and_addresses_only() -> None:
    class Mine(ClusterEnvironment):
        creates_processes_externally = True
        main_address = "a"
        main_port = 1

        def world_size(self) -> int:
            return 2

        def global_rank(self) -> int:
            return 1

        def local_rank(self) -> int:
            return 0

        def node_rank(self) -> int:
            return 1

    environment = Mine()
    environment.set_world_size(5)
    environment.set_global_rank(4)
    environment.validate_settings(1, 2)
    environment.teardown()
    assert ranks(environment) == (2, 1, 0, 1)
    assert not Mine.detect()
    with pytest.raises(TypeError, match="abstract"):
        ClusterEnvironment()  # type: ignore[abstract]
