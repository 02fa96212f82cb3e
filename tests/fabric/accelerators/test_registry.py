from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning.fabric.accelerators import ACCELERATOR_REGISTRY, Accelerator, CPUAccelerator, choose_accelerator
from lightning.fabric.accelerators.registry import AcceleratorRegistry
from lightning.fabric.utilities.exceptions import MisconfigurationException


class Present(CPUAccelerator):
    """A device that every machine has."""

    def __init__(self, note: str = "") -> None:
        self.note = note


class Absent(CPUAccelerator):
    @staticmethod
    def is_available() -> bool:
        return False


@pytest.fixture(autouse=True)
def restored_registry() -> Iterator[None]:
    before = dict(ACCELERATOR_REGISTRY)
    yield
    ACCELERATOR_REGISTRY.clear()
    ACCELERATOR_REGISTRY.update(before)


def test_registry_knows_the_four_kinds() -> None:
    assert ACCELERATOR_REGISTRY.available_accelerators() == {"cpu", "cuda", "mps", "tpu"}


def test_register_and_get_make_an_instance_with_its_parameters() -> None:
    registry = AcceleratorRegistry()
    registry.register("present", Present, description="always there", note="hello")
    assert registry.get("present").note == "hello"
    assert registry["present"]["description"] == "always there"
    assert str(registry) == "Registered accelerators: present"


def test_register_works_as_a_decorator() -> None:
    registry = AcceleratorRegistry()

    @registry.register("mine")
    class Mine(CPUAccelerator):
        pass

    assert isinstance(registry.get("mine"), Mine)


def test_register_refuses_a_taken_name_unless_overridden() -> None:
    registry = AcceleratorRegistry()
    registry.register("cpu", CPUAccelerator)
    with pytest.raises(MisconfigurationException, match="'cpu' is registered already"):
        registry.register("cpu", Present)
    registry.register("cpu", Present, override=True)
    assert isinstance(registry.get("cpu"), Present)


def test_register_refuses_a_name_that_is_no_string() -> None:
    with pytest.raises(TypeError, match="must be a string"):
        AcceleratorRegistry().register(3, CPUAccelerator)  # type: ignore[arg-type]


def test_get_and_remove_refuse_unknown_names() -> None:
    registry = AcceleratorRegistry()
    registry.register("cpu", CPUAccelerator)
    with pytest.raises(KeyError, match=r"'nope'.*cpu"):
        registry.get("nope")
    assert registry.get("nope", "fallback") == "fallback"
    registry.remove("cpu")
    assert "cpu" not in registry
    with pytest.raises(KeyError):
        registry.remove("cpu")


def test_choose_accelerator_passes_instances_through() -> None:
    mine = Present()
    assert choose_accelerator(mine) is mine


def test_choose_accelerator_finds_registered_ones_by_name() -> None:
    ACCELERATOR_REGISTRY.register("mine", Present, note="x")
    assert choose_accelerator("mine").note == "x"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("there", "name", "chosen"),
    [
        ({"cuda", "mps", "tpu"}, "auto", "cuda"),
        ({"mps", "tpu"}, "auto", "mps"),
        ({"tpu"}, "auto", "tpu"),
        (set(), "auto", "cpu"),
        ({"cuda", "mps"}, "gpu", "cuda"),
        ({"mps"}, "gpu", "mps"),
    ],
)
def test_choose_accelerator_takes_the_first_that_is_there(there: set[str], name: str, chosen: str) -> None:
    for kind in ("cuda", "mps", "tpu"):
        ACCELERATOR_REGISTRY.register(kind, Present if kind in there else Absent, override=True)
    instance = choose_accelerator(name)
    assert type(instance) is (CPUAccelerator if chosen == "cpu" else Present)
    ACCELERATOR_REGISTRY.register(chosen, Absent, override=True)  # with the chosen one gone, another or none is chosen
    if name == "auto" and chosen != "cpu":
        assert choose_accelerator(name) is not instance


def test_choose_accelerator_says_what_is_there_when_the_wish_is_not() -> None:
    for kind in ("cuda", "mps", "tpu"):
        ACCELERATOR_REGISTRY.register(kind, Absent, override=True)
    with pytest.raises(MisconfigurationException, match=r'accelerator="gpu".*neither.*Present: \[\'cpu\'\]'):
        choose_accelerator("gpu")
    with pytest.raises(MisconfigurationException, match=r'accelerator="cuda".*no such device.*Present: \[\'cpu\'\]'):
        choose_accelerator("cuda")


@pytest.mark.parametrize("name", ["hpu", "CPU", "", None, 3])
def test_choose_accelerator_lists_the_names_for_an_unknown_one(name: Any) -> None:
    with pytest.raises(ValueError, match=r"is not known. Accepted: auto, gpu, cpu, cuda, mps, tpu"):
        choose_accelerator(name)


def test_an_accelerator_of_ones_own_needs_the_documented_methods_only() -> None:
    class Mine(Accelerator):
        def setup_device(self, device: torch.device) -> None: ...
        def teardown(self) -> None: ...
        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device("cpu")] * devices

        @staticmethod
        def auto_device_count() -> int:
            return 2

        @staticmethod
        def is_available() -> bool:
            return True

    assert choose_accelerator(Mine()).get_parallel_devices(2) == [torch.device("cpu")] * 2
    with pytest.raises(NotImplementedError, match="Mine gives no statistics"):
        Mine().get_device_stats(torch.device("cpu"))


def test_accelerator_without_the_documented_methods_cannot_be_made() -> None:
    class Half(Accelerator):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
