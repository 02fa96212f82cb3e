"""What Fabric offers beside setting up and stepping: where it runs, messages between processes, checkpoints, callbacks and loggers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric import arguments
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.apply_func import apply_to_collection, convert_tensors_to_scalars, convert_to_tensors
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.seed import seed_everything
from lightning.fabric.wrappers import _unwrap_objects

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator

TBroadcast = TypeVar("TBroadcast")
PathLike = Union[str, Path]


class FabricServices:
    """The part of :class:`~lightning.fabric.fabric.Fabric` that changes neither modules nor optimizers.

    Args:
        strategy: how the work is laid out, all of it decided.
        callbacks: see Fabric.
        loggers: see Fabric.
    """

    def __init__(self, strategy: Strategy, callbacks: Any, loggers: Any) -> None:
        self._strategy = strategy
        self._callbacks = arguments.as_list(callbacks)
        self._loggers = arguments.checked_loggers(loggers)
        self._patient_group: Any = None

    def _get_ready(self) -> None:
        """Meet the other processes, if nobody has done so."""
        raise NotImplementedError

    # ---- what it runs on --------------------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device."""
        return self._strategy.accelerator  # type: ignore[return-value]

    @property
    def strategy(self) -> Strategy:
        """How the work is laid out over devices and processes."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._strategy.root_device

    @property
    def global_rank(self) -> int:
        """This process's index among all."""
        return self._strategy.global_rank

    @property
    def local_rank(self) -> int:
        """This process's index among those of its machine."""
        return self._strategy.local_rank

    @property
    def node_rank(self) -> int:
        """The index of this process's machine."""
        return self._strategy.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self._strategy.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the first of all."""
        return self._strategy.is_global_zero

    @property
    def loggers(self) -> list[Any]:
        """The loggers."""
        return self._loggers

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            IndexError: if there is none.
        """
        if not self._loggers:
            raise IndexError("`fabric.logger`: no logger was given. Pass one: Fabric(loggers=CSVLogger('logs')).")
        return self._loggers[0]

    # ---- processes --------------------------------------------------------------------------------------------------

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print in the first process of each machine; the arguments are those of Python's ``print``."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait until all processes are here.

        Args:
            name: of this place, for strategies that tell it.
        """
        self._get_ready()
        self._strategy.barrier(name)

    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        """Return the object of process ``src`` in every process; anything that can be pickled."""
        self._get_ready()
        return self._strategy.broadcast(obj, src)

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather tensors from all processes; all of them must call it with the same structure and shapes.

        Args:
            data: a tensor, a number, or a collection of such.
            group: the processes; None for all.
            sync_grads: let gradients flow back to where each part came from.

        Returns:
            The same structure, whose tensors have a new first dimension, the processes. With one process they are as they were.
        """
        self._get_ready()
        data = convert_to_tensors(data, self.device)
        return apply_to_collection(data, Tensor, self._strategy.all_gather, group=group, sync_grads=sync_grads)

    def all_reduce(self, data: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce tensors over all processes; all of them must call it with the same structure and shapes.

        Args:
            data: a tensor, a number, or a collection of such. Tensors are changed in place, but for integers whose mean is asked for.
            group: the processes; None for all.
            reduce_op: ``"mean"``, ``"sum"``, ``"min"``, ``"max"``, ``"product"``, or a ``torch.distributed.ReduceOp``.

        Returns:
            The same structure, with what they were reduced to.
        """
        self._get_ready()

        def reduce(tensor: Tensor) -> Tensor:
            result: Tensor = self._strategy.all_reduce(tensor, group, reduce_op)
            if result is tensor or result.dtype != tensor.dtype:
                return result
            tensor.detach().copy_(result)
            return tensor

        return apply_to_collection(convert_to_tensors(data, self.device), Tensor, reduce)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Generator[None, None, None]:
        """A context that the first process goes through before the others, however long it takes.

        Args:
            local: the first of each machine goes first, as for downloads to disks that machines don't share.

        Example::

            with fabric.rank_zero_first():
                dataset = download()
        """
        rank = self.local_rank if local else self.global_rank
        if rank > 0:
            self._wait_patiently()
        yield
        if rank == 0:
            self._wait_patiently()

    def _wait_patiently(self) -> None:
        if not _distributed_is_initialized():
            return
        if self._patient_group is None:
            self._patient_group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))
        torch.distributed.barrier(self._patient_group)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, path: PathLike, state: Mapping[str, Any], filter: dict[str, Callable[[str, Any], bool]] | None = None) -> None:
        """Write a checkpoint, whole or not at all; every process must call it.

        Args:
            path: of a file; strategies that divide weights may make a directory of it.
            state: modules, optimizers, other objects with a ``state_dict``, and plain values, by name.
            filter: for names in ``state``, a function of key and value that tells which entries of its ``state_dict`` are saved.

        Raises:
            TypeError: if ``state`` or ``filter`` is no dict, a filter no function, or a value can't be stored.
            ValueError: for a filter of a name that is not in ``state``.
            OSError: if the file can't be written.

        Example::

            fabric.save("last.ckpt", {"model": model, "optimizer": optimizer, "epoch": 3})
        """
        self._get_ready()
        arguments.check_state(state, filter)
        unwrapped = {name: _unwrap_objects(value) for name, value in state.items()}
        self._strategy.save_state(path, unwrapped, filter)
        self.barrier()

    def load(
        self, path: PathLike, state: MutableMapping[str, Any] | None = None, strict: bool = True, *, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint into modules, optimizers and other objects; every process must call it.

        Args:
            path: where it is.
            state: as for :meth:`save`; its plain values are replaced by those that were saved. None loads nothing into anything.
            strict: whether the checkpoint must hold every name in ``state``, and the keys of modules must match.
            weights_only: None and True never run code that the file brings along. False unpickles anything: for files that you trust.

        Returns:
            What of the checkpoint was not asked for; all of it without ``state``.

        Raises:
            FileNotFoundError: if there is no such file.
            KeyError: if ``strict`` and a name is missing.
            RuntimeError: if weights don't fit, or the file is damaged.
            pickle.UnpicklingError: if the file needs ``weights_only=False``.

        Example::

            state = {"model": model, "optimizer": optimizer, "epoch": 0}
            fabric.load("last.ckpt", state)
            first_epoch = state["epoch"] + 1
        """
        self._get_ready()
        if state is not None:
            arguments.check_state(state, None)
        given = {} if state is None else {name: _unwrap_objects(value) for name, value in state.items()}
        loaded = dict(given)
        remainder = self._strategy.load_state(path, loaded, strict, weights_only)
        for name, value in loaded.items():
            if value is not given[name]:  # a plain one
                state[name] = value  # type: ignore[index]
        return remainder

    def load_raw(self, path: PathLike, obj: Module | Optimizer, strict: bool = True, *, weights_only: bool | None = None) -> None:
        """Load a file that holds the ``state_dict`` of one module or optimizer, such as one written without Fabric.

        Args:
            path: where it is.
            obj: a module or optimizer, set up or not.
            strict: whether the keys of a module must match.
            weights_only: as for :meth:`load`.

        Raises:
            TypeError: for another object.
            RuntimeError: if weights don't fit.
        """
        inner = _unwrap_objects(obj)
        if not isinstance(inner, (Module, Optimizer)):
            raise TypeError(f"`load_raw(obj={obj!r})`: a module or an optimizer is needed, not a {type(obj).__name__}.")
        saved = self._strategy.load_checkpoint(path, weights_only=weights_only)
        if isinstance(inner, Module):
            self._strategy.load_module_state_dict(inner, saved, strict)
        else:
            self._strategy.load_optimizer_state(inner, saved)

    # ---- callbacks, loggers, seeds ----------------------------------------------------------------------------------

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method ``hook_name`` of all callbacks that have it.

        Args:
            hook_name: of a method; any name.
            args: its positional arguments.
            kwargs: its named ones; a callback gets those that its method takes.

        Example::

            fabric.call("on_train_epoch_end", results=results)
        """
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if callable(method):
                method(*args, **_accepted(method, kwargs))
            elif method is not None:
                rank_zero_warn(f"`fabric.call({hook_name!r})`: `{type(callback).__name__}.{hook_name}` is no function, and is passed over.")

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Send a number to all loggers.

        Args:
            name: of the metric.
            value: a number, or a tensor of one element, which the host waits for.
            step: when it was measured; None leaves counting to the logger.
        """
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send several numbers to all loggers; see :meth:`log`."""
        numbers = convert_tensors_to_scalars(metrics)
        for logger in self._loggers:
            logger.log_metrics(metrics=numbers, step=step)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed all random generators; see :func:`lightning.fabric.utilities.seed.seed_everything`.

        Args:
            seed: from 0 to 4294967295; None for that of the environment.
            workers: whether the workers of loaders get seeds of their own; None: yes.
            verbose: whether to log the seed.
        """
        return seed_everything(seed=seed, workers=workers is None or workers, verbose=verbose)


def _accepted(method: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the method takes."""
    if not given:
        return given
    parameters = inspect.signature(method).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}
