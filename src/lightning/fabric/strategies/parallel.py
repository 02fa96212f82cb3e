"""What all strategies over several processes share: who this process is, its device, and the group they talk in."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning.fabric import collectives
from lightning.fabric.side_channel import SideChannel
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.fabric.watchdog import DEFAULT_LIMIT, Watchdog

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.checkpoint.io import CheckpointIO
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.layer_sync import LayerSync
    from lightning.fabric.precision import Precision

TBroadcast = TypeVar("TBroadcast")

DEFAULT_TIMEOUT = timedelta(seconds=1800)


def _nowhere() -> None:
    """The position outside of loops."""


class ParallelStrategy(Strategy):
    """Several processes, one device each, that meet in a process group of torch.distributed.

    Args:
        accelerator: the kind of device.
        parallel_devices: the devices of this machine, one for each of its processes.
        cluster_environment: knows the ranks, and where the processes meet.
        checkpoint_io: writes and reads checkpoints.
        precision: the numbers that the module computes with.
        precision_plugin: another name of ``precision``.
        process_group_backend: torch's name of the library that carries collectives, such as ``"nccl"``, or of one for each type of
            device, such as ``"cpu:gloo,cuda:nccl"``; None for what suits the devices.
        timeout: how long a collective may take before it fails.
        watchdog_timeout: how long the processes may go without reaching the next batch, of training or evaluation, before the
            one that stands still is named with its stack, and the run is ended; None for no limit.
    """

    strategy_name = "parallel"
    parallel_devices: list[torch.device] | None = None
    num_nodes: int = 1
    start_method = "popen"  # how the processes are started: "popen" runs the script again; others are those of multiprocessing
    is_distributed = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        *,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        watchdog_timeout: timedelta | None = DEFAULT_LIMIT,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision=precision or precision_plugin)
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self.timeout = timeout
        self.watchdog_timeout = watchdog_timeout
        self.side_channel: SideChannel | None = None  # between the processes of a run, while there is one
        self.watchdog: Watchdog | None = None
        self.failing = False  # this process has raised, and ends its run: there is nobody to talk to any more
        self.layer_sync: LayerSync | None = None
        self._process_group_backend = process_group_backend

    # ---- where this process is --------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[self.local_rank] if self.parallel_devices else torch.device("cpu")

    @property
    def num_processes(self) -> int:
        """The number of processes of this machine."""
        return len(self.parallel_devices) if self.parallel_devices else 1

    @property
    def world_size(self) -> int:
        if self.cluster_environment is not None:
            return self.cluster_environment.world_size()
        return torch.distributed.get_world_size() if collectives.is_distributed() else 1

    @property
    def global_rank(self) -> int:
        if self.cluster_environment is not None:
            return self.cluster_environment.global_rank()
        return torch.distributed.get_rank() if collectives.is_distributed() else 0

    @property
    def local_rank(self) -> int:
        if self.cluster_environment is not None:
            return self.cluster_environment.local_rank()
        return self.global_rank % self.num_processes

    @property
    def node_rank(self) -> int:
        if self.cluster_environment is not None:
            return self.cluster_environment.node_rank()
        return self.global_rank // self.num_processes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """What a DistributedSampler has to know: ``num_replicas`` and ``rank``."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # ---- setting up -------------------------------------------------------------------------------------------------

    @property
    def process_group_backend(self) -> str | None:
        """The library, or libraries, that carry collectives."""
        return self._process_group_backend or default_backend(self.root_device)

    def setup_environment(self) -> None:
        """Make the device ready, and meet the other processes; all of them must call it."""
        self.failing = False
        self.set_world_ranks()
        super().setup_environment()
        self.setup_distributed()

    def configure_launcher(self) -> None:
        """Decide what starts the processes."""
        if self.cluster_environment is None:
            return
        arguments: Any = {"cluster_environment": self.cluster_environment, "num_processes": self.num_processes, "num_nodes": self.num_nodes}
        if self.start_method == "popen":
            from lightning.fabric.launchers.script import ScriptLauncher

            self.launcher = ScriptLauncher(**arguments)
        else:
            from lightning.fabric.launchers.multiprocessing import MultiprocessingLauncher

            self.launcher = MultiprocessingLauncher(start_method=self.start_method, **arguments)  # type: ignore[arg-type]

    def set_world_ranks(self) -> None:
        """Tell the cluster environment what follows from the number of devices and machines."""
        environment = self.cluster_environment
        if environment is not None:
            environment.set_world_size(self.num_nodes * self.num_processes)
            environment.set_global_rank(environment.node_rank() * self.num_processes + environment.local_rank())
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_distributed(self) -> None:
        """Meet the other processes, unless this process has done so.

        Raises:
            RuntimeError: if torch has no distributed package, or the processes can't meet.
        """
        join_processes(self.cluster_environment, self.process_group_backend, self.timeout, self.root_device)

    def watch(self, position: Callable[[], Any] = _nowhere) -> None:
        """Let the processes tell each other of failures, and the watchdog see whether they get on; until :meth:`teardown`.

        All processes must call it, after :meth:`setup_environment`. It takes no collective, and a step pays nothing for it.

        Args:
            position: where the run is; see :class:`~lightning.fabric.watchdog.Watchdog`.
        """
        self._stop_watching()
        if not collectives.is_distributed() or torch.distributed.get_world_size() == 1:
            return
        self.side_channel = SideChannel.to_all()
        if self.watchdog_timeout is not None:
            self.watchdog = Watchdog(self.side_channel, self.watchdog_timeout, position, on_device=self.root_device.type != "cpu")
            self.watchdog.start()

    def _stop_watching(self) -> None:
        if self.watchdog is not None:
            self.watchdog.stop()
        if self.side_channel is not None:
            self.side_channel.close()
        self.side_channel = self.watchdog = None

    def on_exception(self, exception: BaseException) -> None:
        """Tell the others why this process fails, and leave them at once, without a farewell that they would have to answer."""
        Leaving.failed = self.failing = True
        if self.side_channel is not None:
            self.side_channel.fail(exception)
        self._stop_watching()

    def teardown(self) -> None:
        """Free module and device. The process group stays, for the next run of this process; nothing waits for another one here."""
        self._stop_watching()
        super().teardown()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()

    # ---- processes --------------------------------------------------------------------------------------------------
    # A process that fails speaks for itself alone: nobody would answer.

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self.failing:
            return tensor
        if self.before_gathering is not None and group is None:
            self.before_gathering(tensor, False)
        return collectives.reduce(tensor, reduce_op, group)

    def reduce_named(self, values: Mapping[str, tuple[Tensor, str]], group: Any = None) -> dict[str, Tensor]:
        """Reduce many values, each with those of the same name; see :func:`lightning.fabric.collectives.reduce_named`."""
        return super().reduce_named(values) if self.failing else collectives.reduce_named(values, group)

    def compare(self, kinds: Mapping[str, str], details: Any = None) -> list[Any] | None:
        return None if self.failing else collectives.compare(kinds, details)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor from all processes.

        Raises:
            RuntimeError: in a process that fails.
        """
        if self.failing:
            raise RuntimeError("This process has failed, so it can't gather anything from the others any more.")
        if self.before_gathering is not None and group is None:
            self.before_gathering(tensor, True)
        return collectives.all_gather(tensor, group, sync_grads)

    def gather_objects(self, obj: Any) -> list[Any]:
        if self.failing:
            return [obj if rank == self.global_rank else None for rank in range(self.world_size)]
        return collectives.gather_object(obj)

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return obj if self.failing else collectives.broadcast(obj, src)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if not self.failing:
            collectives.barrier()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self.failing else collectives.reduce_boolean_decision(decision, all)


def default_backend(device: torch.device) -> str | None:
    """The backends that serve a device and, for numbers that Python reads, the CPU.

    Example::

        >>> default_backend(torch.device("cuda:0")), default_backend(torch.device("cpu"))
        ('cpu:gloo,cuda:nccl', 'gloo')
    """
    backend: str | None = torch.distributed.Backend.default_device_backend_map.get(device.type)
    if backend is None or device.type == "cpu":
        return backend
    return f"cpu:gloo,{device.type}:{backend}"


def join_processes(environment: ClusterEnvironment | None, backend: str | None, timeout: timedelta | None, device: torch.device) -> None:
    """Become a member of the group of all processes, and leave it when Python ends.

    Args:
        environment: knows the ranks, and where the processes meet; None takes them from the variables that torchrun sets.
        backend: which libraries carry collectives; None for torch's choice.
        timeout: how long the processes wait for each other; None for the backend's own.
        device: the device of this process.

    Raises:
        RuntimeError: if torch has no distributed package, the processes can't meet, or this process is in a group of another size.
    """
    distributed = torch.distributed
    if not distributed.is_available():
        raise RuntimeError("This build of torch has no torch.distributed, which a run of several processes needs. Install another build.")
    if collectives.is_distributed():
        if environment is not None and environment.world_size() != distributed.get_world_size():
            raise RuntimeError(
                f"The run needs {environment.world_size()} processes, and this process is already in a group of "
                f"{distributed.get_world_size()}. Use the same number of devices and machines in all runs of one process, or call "
                "torch.distributed.destroy_process_group() in between."
            )
        return
    options: dict[str, Any] = {}
    if environment is not None:
        options = {"rank": environment.global_rank(), "world_size": environment.world_size()}
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    if device.type == "cuda" and device.index is not None:
        options["device_id"] = device
    if timeout is not None:
        options["timeout"] = timeout
    try:
        distributed.init_process_group(backend, **options)
    except (distributed.DistNetworkError, distributed.DistStoreError) as error:
        raise RuntimeError(_why_not_met(error)) from error
    Leaving.prepare()
    rank_zero_info(f"All {distributed.get_world_size()} processes have met; collectives run over {distributed.get_backend_config()}.")


def _why_not_met(error: Exception) -> str:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"The processes can't meet at {place}: the port is in use. Set the environment variable MASTER_PORT to a free one, or leave it "
            "out to have one chosen; is an earlier run still going?"
        )
    return f"The processes did not all meet at {place}: {error} Check that every process was started, and that it can reach this address."


class Leaving:
    """How this process leaves the group when Python ends: never later than a few seconds.

    NCCL's communicators say farewell to each other, and wait for ever for a process that never does, so it happens in a thread. It is
    started with the group, since Python 3.12 starts none while it ends; and NCCL ends a process by SIGABRT that has left nothing.
    """

    failed = False
    patience = 10.0  # seconds
    _thread: threading.Thread | None = None
    _now = threading.Event()

    @classmethod
    def prepare(cls) -> None:
        """To be called when this process has joined a group."""
        if cls._thread is None or not cls._thread.is_alive():
            cls._now = threading.Event()
            cls._thread = threading.Thread(target=cls._leave, args=(cls._now,), daemon=True, name="leave-process-group")
            cls._thread.start()
            atexit.unregister(cls.at_exit)
            atexit.register(cls.at_exit)

    @classmethod
    def at_exit(cls) -> None:
        """Leave the group, whether or not the others do."""
        cls.failed = cls.failed or getattr(sys, "last_value", None) is not None  # an error that nobody caught
        if cls.failed:
            _never_free_gloo()
        cls._now.set()
        if cls._thread is not None:
            cls._thread.join(cls.patience)

    @classmethod
    def _leave(cls, now: threading.Event) -> None:
        now.wait()
        if cls.failed:
            _break_off()
        else:
            _say_farewell()


def _say_farewell() -> None:
    if collectives.is_distributed():
        torch.distributed.destroy_process_group()


def _never_free_gloo() -> None:
    """Keep the objects of gloo: when they are freed they wait for collectives that this process has begun, and others never will."""
    if not collectives.is_distributed():
        return
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        with suppress(RuntimeError):  # a group without a backend for the CPU
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group._get_backend(torch.device("cpu"))))


def _break_off() -> None:
    if collectives.is_distributed():
        from torch.distributed.distributed_c10d import _abort_process_group

        with suppress(RuntimeError):  # not every backend has a way to abort; those that have none don't wait either
            _abort_process_group()
