from __future__ import annotations

from typing import Any

import pytest

from lightning.fabric.utilities.device_parser import parse_device_count, parse_devices
from lightning.fabric.utilities.exceptions import MisconfigurationException


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("auto", [0, 1, 2, 3]),
        (-1, [0, 1, 2, 3]),
        ("-1", [0, 1, 2, 3]),
        (2, [0, 1]),
        ("2", [0, 1]),
        (" 3 ", [0, 1, 2]),
        ([3, 1], [3, 1]),
        ((0, 2), [0, 2]),
        ("0,2", [0, 2]),
        ("2,", [2]),
        ("0, 3", [0, 3]),
        ([0], [0]),
    ],
)
def test_parse_devices_returns_indices_for_every_form(devices: Any, expected: list[int]) -> None:
    assert parse_devices(devices, range(4), "cuda") == expected


@pytest.mark.parametrize("devices", [0, "0", [], (), ","])
def test_parse_devices_refuses_a_request_for_nothing(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="asks for no cuda device"):
        parse_devices(devices, range(4), "cuda")


@pytest.mark.parametrize("devices", [None, 1.5, True, False, ["0"], [0, True], {0}, object()])
def test_parse_devices_refuses_other_types(devices: Any) -> None:
    with pytest.raises(TypeError, match="Accepted for cuda"):
        parse_devices(devices, range(4), "cuda")


@pytest.mark.parametrize("devices", ["", "a", "1.5", "0,x", "all"])
def test_parse_devices_refuses_other_strings(devices: str) -> None:
    with pytest.raises(ValueError, match=r"can't be read. Accepted for cuda"):
        parse_devices(devices, range(4), "cuda")


@pytest.mark.parametrize("devices", [5, "5", [4], [0, -1], "1,7"])
def test_parse_devices_names_request_and_supply_when_there_are_too_few(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"asks for the cuda devices .* this machine offers \[0, 1, 2, 3\]") as error:
        parse_devices(devices, range(4), "cuda")
    assert repr(devices) in str(error.value)


@pytest.mark.parametrize("devices", [-1, "auto", 1, [0]])
def test_parse_devices_says_that_there_are_none(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r'this machine offers none.*accelerator="cpu"'):
        parse_devices(devices, [], "cuda")


def test_parse_devices_refuses_repetition() -> None:
    with pytest.raises(MisconfigurationException, match="more than once"):
        parse_devices("1,1", range(4), "cuda")


def test_parse_devices_refuses_other_negative_counts() -> None:
    with pytest.raises(MisconfigurationException, match="-2 is negative"):
        parse_devices(-2, range(4), "cuda")


@pytest.mark.parametrize(("devices", "expected"), [(1, 1), (3, 3), ("2", 2), (" 2 ", 2), ("auto", 1)])
def test_parse_device_count_returns_the_number_of_processes(devices: Any, expected: int) -> None:
    assert parse_device_count(devices) == expected


@pytest.mark.parametrize("devices", [-1, "-1", [0], [0, 1], "0,1", "1,", None, "", "a", 1.5, True, False, (0,)])
def test_parse_device_count_refuses_what_is_no_count(devices: Any) -> None:
    with pytest.raises(TypeError, match="takes the number of processes"):
        parse_device_count(devices)


@pytest.mark.parametrize("devices", [0, "0", []])
def test_parse_device_count_refuses_a_request_for_nothing(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="asks for no cpu device"):
        parse_device_count(devices)
