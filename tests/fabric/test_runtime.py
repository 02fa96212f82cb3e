"""From flags to a runtime: what is chosen, and which requests are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning.fabric.accelerators import Accelerator, CPUAccelerator
from lightning.fabric.checkpoint.io import TorchCheckpointIO
from lightning.fabric.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.fabric.runtime import Runtime, resolve
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

CPU = torch.device("cpu")


class ThreeMeta(Accelerator):
    """Three devices of a kind that nobody has."""

    count = 3

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return list(range(devices)) if isinstance(devices, int) else devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("meta", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        return ThreeMeta.count

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "meta"


def described(runtime: Runtime) -> tuple[type, type, list[torch.device], str]:
    return type(runtime.accelerator), type(runtime.strategy), runtime.devices, runtime.precision.precision


# ---- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"accelerator": "cpu"},
        {"accelerator": "cpu", "devices": 1},
        {"accelerator": "cpu", "devices": "1"},
        {"accelerator": CPUAccelerator()},
        {"accelerator": "cpu", "strategy": "single_device"},
        {"strategy": SingleDeviceStrategy()},
        {"strategy": SingleDeviceStrategy("cpu"), "accelerator": "cpu", "devices": 1},
        {"strategy": SingleDeviceStrategy(accelerator=CPUAccelerator())},
        {"strategy": SingleDeviceStrategy(accelerator=CPUAccelerator()), "accelerator": "cpu"},
    ],
)
def test_every_way_to_ask_for_one_cpu_gives_it(flags: dict[str, Any]) -> None:
    runtime = resolve(**flags)
    assert described(runtime) == (CPUAccelerator, SingleDeviceStrategy, [CPU], "32-true")
    assert runtime.strategy.root_device == CPU
    assert runtime.strategy.accelerator is runtime.accelerator
    assert runtime.num_nodes == 1


def test_the_devices_of_an_accelerator_of_ones_own_are_used() -> None:
    runtime = resolve(accelerator=ThreeMeta(), devices=[2])
    assert described(runtime) == (ThreeMeta, SingleDeviceStrategy, [torch.device("meta", 2)], "32-true")
    assert runtime.strategy.root_device == torch.device("meta", 2)


def test_auto_takes_all_devices_that_there_are() -> None:
    runtime = resolve(accelerator=ThreeMeta())
    assert runtime.devices == [torch.device("meta", index) for index in range(3)]
    assert type(runtime.strategy) is DDPStrategy
    assert resolve(accelerator=ThreeMeta(), strategy="single_device").devices == [torch.device("meta", 0)]


@pytest.mark.parametrize(
    ("precision", "name", "kind"),
    [
        (None, "32-true", Precision), (32, "32-true", Precision), ("64-true", "64-true", DoublePrecision), (64, "64-true", DoublePrecision),
        ("bf16-mixed", "bf16-mixed", MixedPrecision), ("16-true", "16-true", HalfPrecision), ("bf16-true", "bf16-true", HalfPrecision),
    ],
)  # fmt: skip
def test_the_precision_is_that_of_the_strategy(precision: Any, name: str, kind: type, recwarn: Any) -> None:
    runtime = resolve(accelerator="cpu", precision=precision)
    assert runtime.precision is runtime.strategy.precision is runtime.strategy.precision_plugin
    assert (runtime.precision.precision, type(runtime.precision)) == (name, kind)
    assert not recwarn


@pytest.mark.filterwarnings("ignore:.*which computes in bfloat16 instead")
@pytest.mark.parametrize("precision", ["bf16", 16])
def test_a_precision_that_leaves_something_open_warns_once(precision: Any) -> None:
    with pytest.warns(UserWarning, match="leaves open whether it is mixed or true") as caught:
        resolve(accelerator="cpu", precision=precision)
    assert sum("leaves open" in str(warning.message) for warning in caught) == 1


def test_plugins_are_put_into_the_strategy() -> None:
    precision, checkpoint_io = DoublePrecision(), TorchCheckpointIO()
    for plugins in ([precision, checkpoint_io], (checkpoint_io, precision)):
        strategy = resolve(accelerator="cpu", plugins=plugins).strategy
        assert (strategy.precision, strategy.checkpoint_io) == (precision, checkpoint_io)
    assert resolve(accelerator="cpu", plugins=precision).precision is precision
    assert type(resolve(accelerator="cpu", plugins=[]).strategy.checkpoint_io) is TorchCheckpointIO


def test_parts_that_a_strategy_brings_stay() -> None:
    precision, checkpoint_io, accelerator = DoublePrecision(), TorchCheckpointIO(), CPUAccelerator()
    strategy = SingleDeviceStrategy("cpu", accelerator, checkpoint_io, precision)
    runtime = resolve(strategy=strategy)
    assert runtime.strategy is strategy
    assert (runtime.accelerator, strategy.precision, strategy.checkpoint_io) == (accelerator, precision, checkpoint_io)
    resolve(strategy=strategy, precision=64, plugins=checkpoint_io)  # says the same again
    assert SingleDeviceStrategy(precision_plugin=precision).precision is precision


def test_a_strategy_can_be_used_again() -> None:
    strategy = SingleDeviceStrategy()
    for _ in range(2):
        runtime = resolve(accelerator="cpu", strategy=strategy, precision="64-true", devices=1)
        assert described(runtime) == (CPUAccelerator, SingleDeviceStrategy, [CPU], "64-true")


def test_a_strategy_of_ones_own_runs_where_the_flags_say() -> None:
    class Own(Strategy):
        pass

    runtime = resolve(accelerator="cpu", strategy=Own())
    assert described(runtime) == (CPUAccelerator, Own, [CPU], "32-true")


# ---- refusals --------------------------------------------------------------------------------------------------------

WITH_DOUBLE = {"strategy": SingleDeviceStrategy(precision=DoublePrecision())}

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"accelerator": "abacus"}, ValueError, r"accelerator='abacus' is not known\. Accepted: auto, gpu, cpu"),
    ({"accelerator": None}, ValueError, "accelerator=None is not known"),
    ({"accelerator": CPUAccelerator}, ValueError, "or an instance of Accelerator"),
    ({"strategy": "luck"}, ValueError, "strategy='luck' is not known. Accepted: 'auto', "),
    ({"strategy": None}, ValueError, "strategy=None is not known"),
    ({"strategy": SingleDeviceStrategy}, ValueError, "or an instance of Strategy"),
    ({"strategy": 5}, ValueError, "strategy=5 is not known"),
    ({"num_nodes": 0}, ValueError, "num_nodes=0: a whole number of machines, 1 or more"),
    ({"num_nodes": "1"}, ValueError, "num_nodes='1'"),
    ({"num_nodes": True}, ValueError, "num_nodes=True"),
    ({"devices": None}, MisconfigurationException, "devices=None: give a count, a list of indices, -1 for all, or 'auto'"),
    ({"devices": 0}, MisconfigurationException, "devices=0"),
    ({"devices": "many"}, Exception, "devices='many'"),
    ({"devices": 1.5}, TypeError, "devices=1.5"),
    ({"devices": []}, Exception, r"devices=\[\]"),
    ({"accelerator": ThreeMeta(), "devices": []}, MisconfigurationException, r"devices=\[\]: ThreeMeta has no such device"),
    ({"precision": "17"}, ValueError, "precision='17' is not known"),
    ({"precision": [16]}, ValueError, r"precision=\[16\] is not known"),
    (
        {"plugins": "fast"},
        MisconfigurationException,
        "plugins got 'fast', a str; accepted are instances of Precision, CheckpointIO, ClusterEnvironment, LayerSync",
    ),
    ({"plugins": [object()]}, MisconfigurationException, "a object; accepted are instances"),
    ({"plugins": [DoublePrecision]}, MisconfigurationException, "a type; accepted are instances"),
    ({"plugins": [DoublePrecision(), Precision()]}, MisconfigurationException, "plugins got two of the kind Precision"),
    ({"plugins": [TorchCheckpointIO(), TorchCheckpointIO()]}, MisconfigurationException, "plugins got two of the kind CheckpointIO"),
    ({"plugins": DoublePrecision(), "precision": 64}, ValueError, "precision=64 and the plugin DoublePrecision both choose the precision"),
    ({**WITH_DOUBLE, "precision": 32}, MisconfigurationException, "brings the precision '64-true', and precision=32 was given beside it"),
    (
        {**WITH_DOUBLE, "plugins": Precision()},
        MisconfigurationException,
        "brings the precision '64-true', and the plugin Precision was given",
    ),
    (
        {"strategy": SingleDeviceStrategy(checkpoint_io=TorchCheckpointIO()), "plugins": TorchCheckpointIO()},
        MisconfigurationException,
        "A CheckpointIO was given both to the strategy and in plugins",
    ),
    (
        {"strategy": SingleDeviceStrategy(accelerator=ThreeMeta()), "accelerator": "cpu"},
        MisconfigurationException,
        "accelerator='cpu' was given, and so was a strategy that runs on ThreeMeta",
    ),
    (
        {"strategy": SingleDeviceStrategy("cuda:0"), "accelerator": "cpu"},
        MisconfigurationException,
        "accelerator='cpu' was given, and so was a strategy for the device 'cuda:0'",
    ),
    (
        {"strategy": SingleDeviceStrategy("meta:1", ThreeMeta()), "devices": [0]},
        MisconfigurationException,
        r"devices=\[0\] was given, and so was a strategy for 'meta:1'",
    ),
]


@pytest.mark.parametrize(("flags", "kind", "message"), REFUSED)
def test_a_wrong_flag_is_named_with_what_to_do(flags: dict[str, Any], kind: type[Exception], message: str) -> None:
    base = {} if "strategy" in flags else {"accelerator": "cpu"}
    with pytest.raises(kind, match=message):
        resolve(**{**base, **flags})


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize("flags", [{"accelerator": "cuda"}, {"accelerator": "gpu"}, {"strategy": SingleDeviceStrategy("cuda:0")}])
def test_a_device_that_is_not_there_is_named_with_those_that_are(flags: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"was asked for, and this machine has .*Present: \['cpu'"):
        resolve(**flags)


def test_one_device_is_not_taken_where_several_were_asked_for() -> None:
    for flags in ({"devices": 2}, {"num_nodes": 2}, {"devices": 2, "strategy": SingleDeviceStrategy()}):
        with pytest.raises(MisconfigurationException, match="asks for 2 processes, and SingleDeviceStrategy runs on one device"):
            resolve(accelerator="cpu", **{"strategy": "single_device", **flags})  # type: ignore[arg-type]
