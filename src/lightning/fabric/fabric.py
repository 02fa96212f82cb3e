"""Fabric: what a hand-written training loop needs to run on any device, on many of them, and in any precision."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning.fabric import arguments, wrappers
from lightning.fabric.runtime import resolve
from lightning.fabric.services import FabricServices
from lightning.fabric.strategies.objects import follow_parameters
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.data import is_shuffled, seed_workers
from lightning.fabric.utilities.rank_zero import rank_zero_deprecation
from lightning.fabric.utilities.seed import reset_seed
from lightning.fabric.wrappers import _FabricDataLoader, _FabricModule, _FabricOptimizer, _uncompiled, _unwrap_objects

if TYPE_CHECKING:
    from lightning.fabric.accelerators.accelerator import Accelerator

R = TypeVar("R")

_logger = logging.getLogger("lightning.fabric")
_logger.setLevel(_logger.level or logging.INFO)
if not _logger.handlers and not logging.getLogger().handlers:
    # Messages for users are seen without any set-up; an application that configures logging decides itself.
    _logger.addHandler(logging.StreamHandler())
    _logger.propagate = False


def _do_nothing(*_: Any) -> None:
    """What is launched where there is nothing to run: the processes themselves are what is wanted."""


class Fabric(FabricServices):
    """Runs your own loop on any device, on many of them, and in any precision.

    Subclass it and define ``run``, or use it from a script: call :meth:`launch` where there are several devices, :meth:`setup` and
    :meth:`setup_dataloaders`, and :meth:`backward` in place of ``loss.backward()``.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"tpu"``, a registered name, or an Accelerator.
        strategy: ``"auto"``, a name such as ``"ddp"`` or ``"fsdp"``, or a Strategy.
        devices: a count, a list of indices, a string of either, -1 for all, or ``"auto"``.
        num_nodes: machines that take part.
        precision: what numbers are made of: ``"32-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"``, ``"bf16-true"``,
            ``"64-true"``, or an abbreviation.
        plugins: a Precision, a CheckpointIO, a ClusterEnvironment, or a list of such.
        callbacks: objects whose methods :meth:`call` calls.
        loggers: where :meth:`log` writes to: one, or a list.

    Raises:
        MisconfigurationException: if the machine cannot serve the request, or arguments contradict each other.
        ValueError: for a name that is not known, or one that contradicts what the command line has set.
        TypeError: for a logger that can't log.

    Example::

        fabric = Fabric(accelerator="gpu", devices=2, precision="bf16-mixed")
        fabric.launch()
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(loader)
        for batch in loader:
            optimizer.zero_grad()
            fabric.backward(model(batch).mean())
            optimizer.step()
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: int | str | None = None,
        plugins: Any = None,
        callbacks: list[Any] | Any | None = None,
        loggers: Any = None,
    ) -> None:
        given = {"accelerator": accelerator, "strategy": strategy, "devices": devices, "num_nodes": num_nodes, "precision": precision}
        self._from_command_line = os.environ.get("LT_CLI_USED") == "1"
        if self._from_command_line and type(self).run is not Fabric.run:
            raise TypeError(
                f"{type(self).__name__} defines `run`, which starts processes, and the command line has started them already. Start the "
                "script with `python`, or write the loop outside of `run`."
            )
        super().__init__(resolve(**arguments.from_environment(given), plugins=plugins).strategy, callbacks, loggers)
        self._launched = False  # whether this is one of the processes that were asked for
        self._inside = False  # whether a function that was launched runs
        self._ready = False  # whether the device is, and the processes have met

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        run = vars(cls).get("run")
        if run is not None:
            cls.run = _launching(run)  # type: ignore[method-assign]

    # ---- starting ---------------------------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Define it in a subclass: all code of the run. Calling it launches the processes, and runs it in each of them."""

    def launch(self, function: Callable[..., Any] = _do_nothing, *args: Any, **kwargs: Any) -> Any:
        """Start all processes, and let them meet.

        Without a function each process runs the script again, up to here, and goes on from here.

        Args:
            function: called as ``function(fabric, *args, **kwargs)`` in each process; strategies that spawn or fork need it.
            args: its positional arguments.
            kwargs: its named ones.

        Returns:
            What the function returned; of the process of rank 0 where processes were spawned or forked for it.

        Raises:
            TypeError: if the function can't be called so, or is missing where it is needed.
            RuntimeError: if the command line has started the processes already.

        Example::

            def train(fabric):
                model, optimizer = fabric.setup(...)

            Fabric(devices=2, strategy="ddp_spawn").launch(train)
        """
        if self._from_command_line:
            raise RuntimeError(
                "This script was started from the command line of Fabric, which has started all processes. Remove `fabric.launch(...)`, "
                "or start the script with `python`."
            )
        launcher = self._strategy.launcher
        if function is not _do_nothing:
            arguments.check_launched(function)
        elif self._launched:
            return None
        elif getattr(launcher, "runs_copies", False):
            raise TypeError(
                f"`fabric.launch()`: {type(self._strategy).__name__} runs a function in new processes. Pass it: `fabric.launch(train)` "
                "with `def train(fabric): ...`."
            )
        if launcher is None or self._inside:
            return self._run_here(function, args, kwargs)
        return launcher.launch(self._run_launched, function, args, kwargs)

    def _run_launched(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        """What each process does."""
        if getattr(self._strategy.launcher, "runs_copies", False):
            reset_seed()  # a new process knows the seed from its environment alone
        self._inside = True
        try:
            return self._run_here(function, args, kwargs)
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                self._strategy.on_exception(error)
            raise
        finally:
            self._inside = False

    def _run_here(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        self._launched = True
        self._get_ready()
        return function(self, *args, **kwargs)

    def _get_ready(self) -> None:
        """Meet the other processes, if nobody has done so.

        Raises:
            RuntimeError: if they have not been started.
        """
        if self._ready:
            return
        if not self._launched and not self._from_command_line and self._strategy.launcher is not None and self.world_size > 1:
            raise RuntimeError(
                f"{self.world_size} processes were asked for, and this one has not been launched: call `fabric.launch()` first, or "
                "`fabric.launch(function)` with what is to be run in each of them."
            )
        self._strategy.setup_environment()
        self._ready = True

    # ---- setting up -------------------------------------------------------------------------------------------------

    def setup(
        self,
        module: Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Set up a module, and the optimizers that were made of its parameters.

        Args:
            module: any torch module, compiled or not.
            optimizers: as many as you like.
            scheduler: a learning rate scheduler, for strategies that step it themselves.
            move_to_device: False leaves the module where it is.
            _reapply_compile: take a module that ``torch.compile`` has wrapped out of its wrapper, and compile it again as it runs.

        Returns:
            The module, or a tuple of module, optimizers, and the scheduler if one was given.

        Raises:
            TypeError: for other things.
            ValueError: for what was set up before.
            RuntimeError: if the processes have not been launched, or the optimizers can't go on with what the module has become.

        Example::

            model, optimizer = fabric.setup(model, optimizer)
        """
        self._get_ready()
        arguments.check_module(module, "setup")
        arguments.check_optimizers(optimizers, "setup")
        inner, compiler = _uncompiled(module) if _reapply_compile else (module, None)
        arguments.warn_of_foreign_optimizers(inner, optimizers)
        chosen = list(optimizers)
        before = list(inner.parameters())
        with self._placing(inner, move_to_device):
            if chosen:
                model, chosen, scheduler = self._strategy.setup_module_and_optimizers(inner, chosen, scheduler)
            else:
                model = self._strategy.setup_module(inner)
                follow_parameters([], before, list(inner.parameters()))
        wrapped = self._wrap(inner, model, compiler)
        wrapped_optimizers = [_FabricOptimizer(optimizer, self._strategy, self._callbacks) for optimizer in chosen]
        for part in inner.modules():
            if isinstance(getattr(type(part), "fabric", None), property):  # LightningModules
                part.fabric = self  # type: ignore[assignment]
                vars(part)["_fabric_optimizers"] = wrapped_optimizers
        self.call("on_after_setup", fabric=self, module=wrapped)
        if not wrapped_optimizers:
            return wrapped
        return (wrapped, *wrapped_optimizers) if scheduler is None else (wrapped, *wrapped_optimizers, scheduler)

    @contextmanager
    def _placing(self, module: Module, move_to_device: bool) -> Generator[None, None, None]:
        """A context for setting a module up on the device, or where it is."""
        if move_to_device:
            arguments.warn_of_several_devices(module)
            yield
            return
        self._strategy.__dict__["module_to_device"] = _do_nothing
        try:
            yield
        finally:
            del self._strategy.__dict__["module_to_device"]

    def _wrap(self, module: Module, model: Module, compiler: Callable[[Module], Module] | None) -> _FabricModule:
        original = module if any(part is module for part in model.modules()) else model  # a strategy may have made another one of it
        return _FabricModule(model if compiler is None else compiler(model), self._strategy, original)

    def setup_module(self, module: Module, move_to_device: bool = True, _reapply_compile: bool = True) -> _FabricModule:
        """Set up a module alone: for inference, or before the optimizer is made from its parameters.

        Args:
            module: any torch module, compiled or not.
            move_to_device: False leaves it where it is.
            _reapply_compile: as for :meth:`setup`.

        Returns:
            The module as it runs.

        Raises:
            TypeError: for other things.
            ValueError: for what was set up before.
            RuntimeError: if the processes have not been launched.

        Example::

            model = fabric.setup_module(model)
            optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters()))
        """
        arguments.check_module(module, "setup_module")
        wrapped: _FabricModule = self.setup(module, move_to_device=move_to_device, _reapply_compile=_reapply_compile)
        return wrapped

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Set up optimizers of modules that were set up before.

        Args:
            optimizers: one or more.

        Returns:
            The optimizer, or a tuple if there are several.

        Raises:
            TypeError: for other things.
            ValueError: for none, or what was set up before.
            RuntimeError: if one was made from parameters that the module no longer has, or the processes have not been launched.
        """
        self._get_ready()
        if not optimizers:
            raise ValueError("`setup_optimizers()` was called without an optimizer. Pass at least one.")
        arguments.check_optimizers(optimizers, "setup_optimizers")
        arguments.check_parameters(optimizers)
        wrapped = [_FabricOptimizer(self._strategy.setup_optimizer(each), self._strategy, self._callbacks) for each in optimizers]
        return wrapped[0] if len(wrapped) == 1 else tuple(wrapped)

    def setup_dataloaders(self, *dataloaders: DataLoader[Any], use_distributed_sampler: bool = True, move_to_device: bool = True) -> Any:
        """Set up loaders: each process gets its part of the samples, and batches arrive on the device.

        All processes get the same number of samples, for which a few may come twice. To evaluate each sample once, give the loader a
        ``lightning.fabric.utilities.samplers.UnrepeatedDistributedSampler``. A loader that shuffles does so anew in each pass.

        Args:
            dataloaders: one or more; samplers of your own are wrapped, distributed ones are left alone.
            use_distributed_sampler: False gives every process all samples.
            move_to_device: False leaves batches where they are.

        Returns:
            The loader, or a list if there are several.

        Raises:
            TypeError: for other things than a DataLoader, and for samplers that can't be shared out.
            ValueError: for none, or what was set up before.
            RuntimeError: if the processes have not been launched.
        """
        self._get_ready()
        arguments.check_dataloaders(dataloaders)
        found = [self._setup_dataloader(loader, use_distributed_sampler, move_to_device) for loader in dataloaders]
        return found[0] if len(found) == 1 else found

    def _setup_dataloader(self, dataloader: DataLoader[Any], use_distributed_sampler: bool, move_to_device: bool) -> Any:
        part = self._strategy.distributed_sampler_kwargs
        if use_distributed_sampler and part.get("num_replicas", 1) > 1:
            from lightning.fabric.utilities.samplers import distribute

            dataloader = distribute(dataloader, **part, training=True, shuffle=is_shuffled(dataloader))
        seed_workers(dataloader, self.global_rank)
        return _FabricDataLoader(self._strategy.process_dataloader(dataloader), self.device if move_to_device else None)

    def to_device(self, obj: Any) -> Any:
        """Return a module, a tensor, or a collection of tensors, on the device of this process; modules are moved in place."""
        if isinstance(obj, Module):
            self._strategy.module_to_device(obj)
            return obj
        return self._strategy.batch_to_device(obj)

    def init_tensor(self) -> AbstractContextManager[Any]:
        """A context in which new tensors are on the device and in the precision of the run."""
        return self._strategy.tensor_init_context()

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """A context to build a module in: on the device and in the precision of the run, at once.

        Args:
            empty_init: leave weights uninitialised, because a checkpoint will be loaded.

        Raises:
            RuntimeError: if the processes have not been launched.
        """
        self._get_ready()
        return self._strategy.module_init_context(empty_init=empty_init)

    def sharded_model(self) -> AbstractContextManager[Any]:
        """Deprecated: use :meth:`init_module`."""
        rank_zero_deprecation("`fabric.sharded_model()` is deprecated. Use `fabric.init_module()`.")
        self._get_ready()
        context = getattr(self._strategy, "module_sharded_context", nullcontext)
        return context()

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def backward(self, tensor: Tensor, *args: Any, model: _FabricModule | None = None, **kwargs: Any) -> None:
        """Run backward, in place of ``loss.backward()``.

        Args:
            tensor: the loss.
            args: go to ``Tensor.backward``.
            model: which module it comes from, for engines that need to know it where there are several.
            kwargs: go to ``Tensor.backward`` too.

        Raises:
            TypeError: for a model that was not set up.
        """
        if model is not None and not isinstance(_uncompiled(model)[0], _FabricModule):
            raise TypeError(f"`backward(model=...)` got a {type(model).__name__} that was not set up. Pass what `fabric.setup` returned.")
        module = None if model is None else _running(model)
        wrappers._Backward.running = True
        try:
            self._strategy.backward(tensor, module, *args, **kwargs)
        finally:
            wrappers._Backward.running = False

    def no_backward_sync(self, module: _FabricModule, enabled: bool = True) -> AbstractContextManager[Any]:
        """A context in which gradients stay local, for all but the last batch of an accumulation window.

        Both the forward pass and :meth:`backward` belong into it.

        Args:
            module: as :meth:`setup` returned it.
            enabled: False makes it a context that does nothing.

        Raises:
            TypeError: for a module that was not set up.

        Example::

            for index, batch in enumerate(loader):
                last = (index + 1) % 8 == 0
                with fabric.no_backward_sync(model, enabled=not last):
                    fabric.backward(model(batch).mean() / 8)
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
        """
        if not isinstance(_uncompiled(module)[0], _FabricModule):
            raise TypeError(
                f"`no_backward_sync` got a {type(module).__name__} that was not set up. Pass what `model = fabric.setup(model)` returned."
            )
        return self._strategy.no_backward_sync(_running(module)) if enabled else nullcontext()

    def clip_gradients(
        self,
        module: Module | _FabricModule,
        optimizer: Optimizer | _FabricOptimizer,
        clip_val: float | int | None = None,
        max_norm: float | int | None = None,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters, after bringing them to their true size.

        Args:
            module: which is trained.
            optimizer: of its parameters.
            clip_val: the largest absolute value of an element.
            max_norm: the largest norm of all gradients together, across all processes where they are divided.
            norm_type: which norm; infinity for the largest absolute value.
            error_if_nonfinite: raise if the norm is infinite or no number, for which the host waits for the device.

        Returns:
            The norm before clipping, if it was by norm.

        Raises:
            ValueError: unless one of ``clip_val`` and ``max_norm`` is given.
            RuntimeError: if the norm is not finite, and ``error_if_nonfinite``.
        """
        if (clip_val is None) == (max_norm is None):
            given = "neither" if clip_val is None else "both"
            raise ValueError(f"`clip_gradients` got {given} of clip_val, which clips by value, and max_norm, by norm. Give one.")
        model = _running(module) if isinstance(_uncompiled(module)[0], _FabricModule) else module
        inner: Optimizer = _unwrap_objects(optimizer)
        if clip_val is not None:
            self._strategy.clip_gradients_value(model, inner, clip_val)
            return None
        assert max_norm is not None
        return self._strategy.clip_gradients_norm(model, inner, max_norm, norm_type, error_if_nonfinite)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass in the precision of the run, for code outside of a module."""
        return self._strategy.precision.forward_context()


def _running(module: Module) -> Module:
    """A module that was set up, as the strategy returned it."""
    return _uncompiled(module)[0].__dict__["_running"]  # type: ignore[no-any-return]


def _launching(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` of a subclass, which runs in all processes however it is called."""

    @wraps(run)
    def launched(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if self._inside or self._strategy.launcher is None:
            return self._run_here(run, args, kwargs)
        return self._strategy.launcher.launch(self._run_launched, _run, args, kwargs)

    return launched


def _run(fabric: Fabric, *args: Any, **kwargs: Any) -> Any:
    """What is sent to other processes, where ``run`` is found by its name."""
    return fabric.run(*args, **kwargs)
