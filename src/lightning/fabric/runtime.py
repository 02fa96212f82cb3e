"""From flags to a runtime: the only place where accelerator, devices, strategy, precision and plugins are parsed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.accelerators.registry import choose_accelerator
from lightning.fabric.precision import Precision, build_precision, parse_precision
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.layer_sync import LayerSync
    from lightning.fabric.strategies.parallel import ParallelStrategy

WITHOUT_REGISTRY = ("auto", "single_device")  # names for one device, which need none of the other strategies
BUILT_IN = ("cpu", "cuda", "mps", "tpu")
ACCELERATOR_OF = {"xla": "tpu"}  # where a device has another name than its accelerator


@dataclass(frozen=True)
class Runtime:
    """What a run runs on, all of it decided.

    Args:
        accelerator: the kind of device.
        devices: the devices of this machine that take part.
        num_nodes: the number of machines.
        strategy: how the work is laid out; it holds the precision, the checkpoint writer, and what starts the processes.
    """

    accelerator: Accelerator
    devices: list[torch.device]
    num_nodes: int
    strategy: Strategy

    @property
    def precision(self) -> Precision:
        """The numbers that modules compute with."""
        return self.strategy.precision


@dataclass
class Parts:
    """The plugins by kind; at most one of each."""

    precision: Precision | None = None
    checkpoint_io: Any = None
    environment: ClusterEnvironment | None = None
    layer_sync: LayerSync | None = None


def resolve(
    accelerator: str | Accelerator = "auto",
    strategy: str | Strategy = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
    precision: int | str | None = None,
    plugins: Any = None,
    sync_batchnorm: bool = False,
) -> Runtime:
    """Decide what to run on.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"tpu"``, a registered name, or an Accelerator.
        strategy: ``"auto"``, a registered name such as ``"ddp"``, or a Strategy. ``"auto"`` is one device where there is one, else
            DDP: in processes that run the script again, or, in a notebook, in forks of this one; on TPUs XLA.
        devices: a count, a list of indices, a string of either, -1 for all, or ``"auto"``: all, and one process on the CPU.
        num_nodes: machines that take part.
        precision: see :func:`lightning.fabric.precision.parse_precision`.
        plugins: a Precision, a CheckpointIO, a ClusterEnvironment, a LayerSync, or a list of such.
        sync_batchnorm: compute batch normalisation over all processes.

    Raises:
        MisconfigurationException: if the machine cannot serve the request, or arguments contradict each other.
        ValueError: for a name that is not known, a number of nodes that is none, or a strategy that does not serve the accelerator.

    Example::

        >>> runtime = resolve(accelerator="cpu", precision="bf16-mixed")
        >>> runtime.devices, runtime.precision.precision
        ([device(type='cpu')], 'bf16-mixed')
    """
    if not isinstance(num_nodes, int) or isinstance(num_nodes, bool) or num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes!r}: a whole number of machines, 1 or more, is needed.")
    _check_strategy(strategy)
    parts = _sort_plugins(plugins)
    chosen = _accelerator_of(accelerator, strategy)
    parallel = _devices_of(chosen, devices, strategy)
    built = _build(strategy, chosen, parallel, num_nodes) if isinstance(strategy, str) else strategy
    if strategy == "auto" and isinstance(built, SingleDeviceStrategy):
        built.was_asked_for = False
    if num_nodes * len(parallel) > 1 and not built.is_distributed:
        raise MisconfigurationException(
            f"devices={devices!r} with num_nodes={num_nodes} asks for {num_nodes * len(parallel)} processes, and "
            f"{type(built).__name__} runs on one device. Use strategy='ddp' or another of several processes, or devices=1 and num_nodes=1."
        )
    if chosen.name() == "mps" and built.is_distributed:
        raise ValueError(f"strategy={strategy!r}: no library carries collectives between MPS devices. Use devices=1 and strategy='auto'.")
    _equip(built, chosen, precision, parts)
    if built.is_distributed:
        _place(
            built,  # type: ignore[arg-type]
            parallel,
            num_nodes,
            parts,
            sync_batchnorm,
        )
    return Runtime(chosen, parallel, num_nodes, built)


def _check_strategy(strategy: Any) -> None:
    if isinstance(strategy, Strategy) or (isinstance(strategy, str) and strategy in WITHOUT_REGISTRY):
        return
    from lightning.fabric.strategies import STRATEGY_REGISTRY

    if not (isinstance(strategy, str) and strategy in STRATEGY_REGISTRY):
        names = ", ".join(map(repr, ("auto", *STRATEGY_REGISTRY)))
        raise ValueError(f"strategy={strategy!r} is not known. Accepted: {names}, or an instance of Strategy.")


def _build(name: str, accelerator: Accelerator, devices: list[torch.device], num_nodes: int) -> Strategy:
    """The strategy of that name, which on one device may need to be told which."""
    if name == "auto":
        name = _automatic(accelerator, num_nodes * len(devices))
    if name == "single_device":
        return SingleDeviceStrategy(device=devices[0])
    from lightning.fabric.strategies import STRATEGY_REGISTRY

    if name in ("single_xla", "single_tpu"):
        entry = STRATEGY_REGISTRY[name]
        return entry["strategy"](device=devices[0])  # type: ignore[no-any-return]
    return STRATEGY_REGISTRY.get(name)  # type: ignore[no-any-return]


def _automatic(accelerator: Accelerator, processes: int) -> str:
    if accelerator.name() == "tpu":
        return "xla" if processes > 1 else "single_xla"
    if processes == 1:
        return "single_device"
    return "ddp_notebook" if hasattr(sys, "ps1") else "ddp"


def _sort_plugins(plugins: Any) -> Parts:
    found = Parts()
    if plugins is None:
        return found
    from lightning.fabric.checkpoint.io import CheckpointIO
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.layer_sync import LayerSync

    kinds = {"precision": Precision, "checkpoint_io": CheckpointIO, "environment": ClusterEnvironment, "layer_sync": LayerSync}
    for plugin in plugins if isinstance(plugins, (list, tuple)) else [plugins]:
        name = next((name for name, kind in kinds.items() if isinstance(plugin, kind)), None)
        if name is None:
            accepted = ", ".join(kind.__name__ for kind in kinds.values())
            raise MisconfigurationException(f"plugins got {plugin!r}, a {type(plugin).__name__}; accepted are instances of {accepted}.")
        other = getattr(found, name)
        if other is not None:
            raise MisconfigurationException(f"plugins got two of the kind {kinds[name].__name__}: {other!r} and {plugin!r}. Keep one.")
        setattr(found, name, plugin)
    return found


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
    if devices == "auto" and single is not None:
        return [single]
    given: list[torch.device] | None = getattr(strategy, "parallel_devices", None)
    if devices == "auto" and given:
        return given
    if devices == "auto":
        devices = accelerator.auto_device_count() if strategy != "single_device" else 1
    found = list(accelerator.get_parallel_devices(accelerator.parse_devices(devices)))
    if not found:
        raise MisconfigurationException(f"devices={devices!r}: {type(accelerator).__name__} has no such device.")
    if single is None or len(found) > 1:
        return found
    if isinstance(devices, list) and found != [single]:
        raise MisconfigurationException(f"devices={devices!r} was given, and so was a strategy for {str(single)!r}. Leave one of them out.")
    return [single]


def _equip(strategy: Strategy, accelerator: Accelerator, precision: Any, parts: Parts) -> None:
    """Put the parts into the strategy, where it does not bring its own. What both sides agree on is no contradiction."""
    strategy.accelerator = accelerator
    own, plugin = strategy._precision, parts.precision
    if own is None:
        strategy.precision = build_precision(precision, accelerator, plugin)
    elif (plugin is not None and plugin is not own) or (precision is not None and parse_precision(precision) != own.precision):
        raise MisconfigurationException(
            f"The strategy brings the precision {own.precision!r}, and "
            f"{f'precision={precision!r}' if plugin is None else f'the plugin {type(plugin).__name__}'} was given beside it. "
            "Leave one of them out."
        )
    if parts.checkpoint_io is not None:
        if strategy._checkpoint_io not in (None, parts.checkpoint_io):
            raise MisconfigurationException("A CheckpointIO was given both to the strategy and in plugins. Leave one of them out.")
        strategy.checkpoint_io = parts.checkpoint_io


def _place(strategy: ParallelStrategy, devices: list[torch.device], num_nodes: int, parts: Parts, sync_batchnorm: bool) -> None:
    """Tell a strategy of several processes where they are and who starts them, where it was not told before."""
    strategy.parallel_devices = devices
    strategy.num_nodes = num_nodes
    given = parts.environment
    if given is not None and strategy.cluster_environment not in (None, given):
        raise MisconfigurationException("A ClusterEnvironment was given both to the strategy and in plugins. Leave one of them out.")
    strategy.cluster_environment = given or strategy.cluster_environment or _environment()
    if strategy.cluster_environment is None:
        _check_group(len(devices), num_nodes)
    if parts.layer_sync is not None and sync_batchnorm:
        raise MisconfigurationException(
            f"sync_batchnorm=True was given, and so was the plugin {type(parts.layer_sync).__name__}, which does the same in its own way. "
            "Leave one of them out."
        )
    if sync_batchnorm:
        from lightning.fabric.plugins.layer_sync import TorchSyncBatchNorm

        strategy.layer_sync = TorchSyncBatchNorm()
    strategy.layer_sync = parts.layer_sync or strategy.layer_sync
    if strategy.cluster_environment is not None:
        strategy.set_world_ranks()
        strategy.configure_launcher()


def _check_group(devices: int, num_nodes: int) -> None:
    """Compare the arguments with the group that the user's own code has let this process join."""
    size = torch.distributed.get_world_size()
    if size != num_nodes * devices:
        raise MisconfigurationException(
            f"{devices} devices on each of {num_nodes} machines make {num_nodes * devices} processes, and this process is already in a "
            f"process group of {size}, which your program has made. Give devices and num_nodes whose product is {size}, or call "
            "torch.distributed.destroy_process_group() before."
        )


def _environment() -> ClusterEnvironment | None:
    """The environment of this process; None where the user's own code has let it join a group already, which then knows the ranks."""
    from lightning.fabric.plugins.environments import LightningEnvironment, detect_environment

    found = detect_environment()
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return None if joined and isinstance(found, LightningEnvironment) and not found.creates_processes_externally else found
