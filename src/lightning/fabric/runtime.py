"""From flags to a runtime: the only place where accelerator, devices, strategy, precision and plugins are parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.registry import choose_accelerator
from lightning.fabric.precision import Precision, build_precision, parse_precision
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info

STRATEGY_NAMES = ("auto", "single_device")
BUILT_IN = ("cpu", "cuda", "mps", "tpu")
ACCELERATOR_OF = {"xla": "tpu"}  # where a device has another name than its accelerator


@dataclass(frozen=True)
class Runtime:
    """What a run runs on, all of it decided.

    Args:
        accelerator: the kind of device.
        devices: the devices of this machine that take part.
        num_nodes: the number of machines.
        strategy: how the work is laid out; it holds the precision and the checkpoint writer.
    """

    accelerator: Accelerator
    devices: list[torch.device]
    num_nodes: int
    strategy: Strategy

    @property
    def precision(self) -> Precision:
        """The numbers that modules compute with."""
        return self.strategy.precision


def resolve(
    accelerator: str | Accelerator = "auto",
    strategy: str | Strategy = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
    precision: int | str | None = None,
    plugins: Any = None,
) -> Runtime:
    """Decide what to run on.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"tpu"``, a registered name, or an Accelerator.
        strategy: ``"auto"``, a name, or a Strategy.
        devices: a count, a list of indices, a string of either, -1 for all, or ``"auto"``.
        num_nodes: machines that take part.
        precision: see :func:`lightning.fabric.precision.parse_precision`.
        plugins: a Precision, a CheckpointIO, or a list of such.

    Raises:
        MisconfigurationException: if the machine cannot serve the request, or arguments contradict each other.
        ValueError: for a name that is not known, or a number of nodes that is none.

    Example::

        >>> runtime = resolve(accelerator="cpu", precision="bf16-mixed")
        >>> runtime.devices, runtime.precision.precision
        ([device(type='cpu')], 'bf16-mixed')
    """
    if not isinstance(num_nodes, int) or isinstance(num_nodes, bool) or num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes!r}: a whole number of machines, 1 or more, is needed.")
    if strategy not in STRATEGY_NAMES if isinstance(strategy, str) else not isinstance(strategy, Strategy):
        raise ValueError(
            f"strategy={strategy!r} is not known. Accepted: {', '.join(map(repr, STRATEGY_NAMES))}, or an instance of Strategy."
        )
    precision_plugin, checkpoint_io = _sort_plugins(plugins)
    chosen = _accelerator_of(accelerator, strategy)
    parallel = _devices_of(chosen, devices, strategy)
    if num_nodes * len(parallel) > 1:
        raise MisconfigurationException(
            f"devices={devices!r} with num_nodes={num_nodes} asks for {num_nodes * len(parallel)} processes, and the strategies of this "
            "version run on one device. Use devices=1 and num_nodes=1."
        )
    if isinstance(strategy, str):
        strategy = SingleDeviceStrategy(device=parallel[0])
    _equip(strategy, chosen, precision, precision_plugin, checkpoint_io)
    return Runtime(chosen, parallel, num_nodes, strategy)


def _sort_plugins(plugins: Any) -> tuple[Precision | None, Any]:
    from lightning.fabric.checkpoint.io import CheckpointIO

    found: dict[type, Any] = {}
    for plugin in plugins if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]:
        kind = next((kind for kind in (Precision, CheckpointIO) if isinstance(plugin, kind)), None)
        if kind is None:
            raise MisconfigurationException(
                f"plugins got {plugin!r}, a {type(plugin).__name__}; accepted are instances of Precision and of CheckpointIO."
            )
        if kind in found:
            raise MisconfigurationException(f"plugins got two of the kind {kind.__name__}: {found[kind]!r} and {plugin!r}. Keep one.")
        found[kind] = plugin
    return found.get(Precision), found.get(CheckpointIO)


def _accelerator_of(accelerator: str | Accelerator, strategy: str | Strategy) -> Accelerator:
    """The accelerator; that of the strategy, or of the strategy's device, where only the strategy says where to run."""
    own = strategy.accelerator if isinstance(strategy, Strategy) else None
    device = strategy.root_device if isinstance(strategy, SingleDeviceStrategy) else None
    if accelerator == "auto":
        return own or choose_accelerator("auto" if device is None else ACCELERATOR_OF.get(device.type, device.type))
    chosen = choose_accelerator(accelerator)
    if own is not None and type(own) is not type(chosen):
        raise MisconfigurationException(
            f"accelerator={accelerator!r} was given, and so was a strategy that runs on {type(own).__name__}. Leave one of them out."
        )
    if device is not None and chosen.name() in BUILT_IN and chosen.name() != ACCELERATOR_OF.get(device.type, device.type):
        raise MisconfigurationException(
            f"accelerator={accelerator!r} was given, and so was a strategy for the device {str(device)!r}. Leave one of them out."
        )
    return own or chosen


def _devices_of(accelerator: Accelerator, devices: Any, strategy: str | Strategy) -> list[torch.device]:
    if devices is None:
        raise MisconfigurationException("devices=None: give a count, a list of indices, -1 for all, or 'auto'.")
    single = strategy.root_device if isinstance(strategy, SingleDeviceStrategy) else None
    if single is not None and devices == "auto":
        return [single]
    if devices == "auto":
        available = accelerator.auto_device_count()
        if available > 1:
            rank_zero_info(f"Using 1 of {available} {accelerator.name()} devices.")
        devices = 1
    found = list(accelerator.get_parallel_devices(accelerator.parse_devices(devices)))
    if not found:
        raise MisconfigurationException(f"devices={devices!r}: {type(accelerator).__name__} has no such device.")
    if single is None or len(found) > 1:
        return found
    if isinstance(devices, list) and found != [single]:
        raise MisconfigurationException(f"devices={devices!r} was given, and so was a strategy for {str(single)!r}. Leave one of them out.")
    return [single]


def _equip(strategy: Strategy, accelerator: Accelerator, precision: Any, plugin: Precision | None, checkpoint_io: Any) -> None:
    """Put the parts into the strategy, where it does not bring its own. What both sides agree on is no contradiction."""
    strategy.accelerator = accelerator
    own = strategy._precision
    if own is None:
        strategy.precision = build_precision(precision, accelerator, plugin)
    elif (plugin is not None and plugin is not own) or (precision is not None and parse_precision(precision) != own.precision):
        raise MisconfigurationException(
            f"The strategy brings the precision {own.precision!r}, and the Trainer was given "
            f"{f'precision={precision!r}' if plugin is None else f'the plugin {type(plugin).__name__}'}. Leave one of them out."
        )
    if checkpoint_io is not None:
        if strategy._checkpoint_io not in (None, checkpoint_io):
            raise MisconfigurationException("A CheckpointIO was given both to the strategy and in plugins. Leave one of them out.")
        strategy.checkpoint_io = checkpoint_io
