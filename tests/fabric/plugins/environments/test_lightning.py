"""Processes that we start, or the user one by one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port, require_free_port
from lightning.fabric.utilities.rank_zero import rank_zero_only

Set = Callable[..., None]


def test_defaults_suit_one_process() -> None:
    environment = LightningEnvironment()
    assert not environment.creates_processes_externally
    assert environment.main_address == "127.0.0.1"
    assert (environment.world_size(), environment.global_rank(), environment.local_rank(), environment.node_rank()) == (1, 0, 0, 0)
    assert LightningEnvironment.detect()


def test_port_is_free_and_stays_the_same() -> None:
    environment = LightningEnvironment()
    port = environment.main_port
    assert environment.main_port == port
    with socket.socket() as server:
        server.bind(("", port))


def test_variables_are_read(setenv: Set) -> None:
    setenv(MASTER_ADDR="1.2.3.4", MASTER_PORT=1234, LOCAL_RANK=2, NODE_RANK=3)
    environment = LightningEnvironment()
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.main_port) == ("1.2.3.4", 1234)
    assert (environment.local_rank(), environment.node_rank()) == (2, 3)


def test_group_rank_stands_in_for_node_rank(setenv: Set) -> None:
    setenv(GROUP_RANK=3)
    assert LightningEnvironment().node_rank() == 3
    setenv(NODE_RANK=1)
    assert LightningEnvironment().node_rank() == 1


def test_size_and_rank_can_be_set() -> None:
    environment = LightningEnvironment()
    environment.set_world_size(7)
    environment.set_global_rank(3)
    assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (7, 3, 0)
    assert rank_zero_only.rank == 3  # type: ignore[attr-defined]


def test_teardown_forgets_the_number_of_processes_only(setenv: Set) -> None:
    setenv(WORLD_SIZE=2, MASTER_ADDR="here")
    LightningEnvironment().teardown()
    assert "WORLD_SIZE" not in os.environ
    assert os.environ["MASTER_ADDR"] == "here"


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "one"), ("NODE_RANK", ""), ("MASTER_PORT", "http")])
def test_text_instead_of_a_number_names_the_variable(setenv: Set, name: str, value: str) -> None:
    setenv(**{name: value})
    environment = LightningEnvironment()
    with pytest.raises(ValueError, match=f"{name}='{value}' has to be a whole number"):
        (environment.local_rank(), environment.node_rank(), environment.main_port)


def test_validation_accepts_one_machine_without_variables() -> None:
    LightningEnvironment().validate_settings(num_devices=8, num_nodes=1)


def test_validation_wants_a_meeting_point_for_several_machines(setenv: Set) -> None:
    environment = LightningEnvironment()
    with pytest.raises(ValueError, match="needs MASTER_PORT in the environment"):
        environment.validate_settings(num_devices=1, num_nodes=2)
    setenv(MASTER_PORT=29500)
    environment.validate_settings(num_devices=1, num_nodes=2)
    setenv(NODE_RANK=1)
    with pytest.raises(ValueError, match="needs MASTER_ADDR in the environment"):
        environment.validate_settings(num_devices=1, num_nodes=2)
    setenv(MASTER_ADDR="10.0.0.1")
    environment.validate_settings(num_devices=1, num_nodes=2)


def test_validation_refuses_ranks_beyond_the_request(setenv: Set) -> None:
    setenv(NODE_RANK=2, MASTER_PORT=1, MASTER_ADDR="a")
    with pytest.raises(ValueError, match=r"NODE_RANK=2, and num_nodes=2 was given: it has to be from 0 to 1"):
        LightningEnvironment().validate_settings(num_devices=1, num_nodes=2)
    setenv(NODE_RANK=0, LOCAL_RANK=2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=2, and devices=2 was given"):
        LightningEnvironment().validate_settings(num_devices=2, num_nodes=1)


def test_validation_wants_a_port_if_the_user_starts_the_processes(setenv: Set) -> None:
    setenv(LOCAL_RANK=1)
    with pytest.raises(ValueError, match="needs MASTER_PORT"):
        LightningEnvironment().validate_settings(num_devices=2, num_nodes=1)


def test_free_ports_differ_while_they_are_used() -> None:
    with socket.socket() as server:
        server.bind(("", find_free_network_port()))
        assert find_free_network_port() != server.getsockname()[1]


def test_port_in_use_is_refused() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"MASTER_PORT={port} is used by another process"):
            require_free_port(port)


def test_port_that_has_just_been_used_is_free() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store of torch.distributed does
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        connection, _ = server.accept()
        connection.close()  # this side closes first, so its end lingers in TIME_WAIT
        client.close()
    require_free_port(port)


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 65535"):
        require_free_port(port)
