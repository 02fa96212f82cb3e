"""What Fabric gives back for a module, an optimizer or a loader: the same thing, as it runs under the strategy."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning.fabric.precision import Precision
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.apply_func import apply_to_collection, move_data_to_device
from lightning.fabric.utilities.data import set_sampler_epoch
from lightning.fabric.utilities.device_dtype_mixin import DeviceDtypeMixin

if TYPE_CHECKING:
    from torch._dynamo.eval_frame import OptimizedModule

T_destination = TypeVar("T_destination", bound=dict[str, Any])

# What stands for a forward pass in every LightningModule.
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class _FabricModule(DeviceDtypeMixin):
    """A module as it runs: under the strategy, in the precision of the run.

    Calling it calls the module so. Everything else is the module's: what is read, set or called here is read, set or called there.

    Args:
        forward_module: the module as the strategy returned it, and compiled again if it was compiled.
        strategy: knows how to run it.
        original_module: the user's module inside of it; None if they are the same.

    Example::

        model, optimizer = fabric.setup(model, optimizer)
        fabric.backward(model(batch).mean())
    """

    def __init__(self, forward_module: Module, strategy: Strategy, original_module: Module | None = None) -> None:
        super().__init__()
        original = forward_module if original_module is None else original_module
        self._strategy = strategy
        # As the strategy knows it; not through Module.__setattr__, which would make it a child.
        running = self.__dict__["_running"] = forward_module._orig_mod if _is_compiled(forward_module) else forward_module
        self._forward_methods = set(STEPS)
        self._redirected: dict[str, tuple[Any, Callable[..., Any]]] = {}  # by name: the function, and what runs it
        self._wrapped = running is not original or strategy.forward_is_collective
        self._converts = _changes(strategy.precision, "convert_input", "forward_context", "convert_output")
        self._watches = _scales(strategy)
        self._forward_module = forward_module
        first = next((p for p in original.parameters() if p.is_floating_point()), None)
        if first is not None:
            self._device, self._dtype = first.device, first.dtype
        self._original_module = original  # from here on attributes are the module's

    @property
    def module(self) -> Module:
        """The user's module."""
        return self._modules["_original_module"]  # type: ignore[return-value]

    # ---- running ----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, in the precision of the run."""
        return self._run(self._modules["_forward_module"], args, kwargs)  # type: ignore[arg-type]

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._converts:
            precision = self._strategy.precision
            args, kwargs = precision.convert_input((args, kwargs))
            with precision.forward_context():
                output = function(*args, **kwargs)
            output = precision.convert_output(output)
        else:
            output = function(*args, **kwargs)
        return apply_to_collection(output, Tensor, _watch_backward) if self._watches else output

    def mark_forward_method(self, method: MethodType | str) -> None:
        """Let a method of the module run as its forward pass does: in the precision of the run, and under the strategy.

        It is needed for methods that compute with the module, other than ``forward`` and the steps of a LightningModule.

        Args:
            method: its name, or the method itself.

        Raises:
            TypeError: if it is something else.
            ValueError: for ``forward``, which needs no mark.
            AttributeError: if the module has no such method.

        Example::

            model = fabric.setup(model)
            model.mark_forward_method("generate")
            text = model.generate(prompt)
        """
        if not isinstance(method, (str, MethodType)):
            raise TypeError(f"mark_forward_method got {method!r}, a {type(method).__name__}; a method or its name is needed.")
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise ValueError("mark_forward_method('forward'): `forward` is called by calling the module, and needs no mark.")
        if not callable(getattr(self.module, name, None)):
            raise AttributeError(f"mark_forward_method({name!r}): {type(self.module).__name__} has no method of that name.")
        self._forward_methods.add(name)

    def _as_forward(self, name: str, method: MethodType) -> Callable[..., Any]:
        """A method that runs as the forward pass does."""
        function, run = self._redirected.get(name, (None, None))
        if function is method.__func__ and run is not None:
            return run
        compiled = self._modules["_forward_module"]
        inner = compiled.dynamo_ctx(method) if _is_compiled(compiled) else method
        through = self._strategy.as_forward(self.__dict__["_running"], inner)

        @wraps(method)
        def redirected(*args: Any, **kwargs: Any) -> Any:
            return self._run(through, args, kwargs)

        self._redirected[name] = (method.__func__, redirected)
        return redirected

    def _guarded(self, name: str, method: MethodType) -> Callable[..., Any]:
        """A method that may not compute with the module, since the strategy would not know of it."""
        module, collective = self.module, self._strategy.forward_is_collective

        @wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if not collective and not torch.is_grad_enabled():
                return method(*args, **kwargs)
            parts = set(module.modules())

            def refuse(called: Module, _: Any) -> None:
                if called in parts:
                    kind = type(module).__name__
                    raise RuntimeError(
                        f"`{kind}.{name}` computes with the module outside of its forward pass, where {type(self._strategy).__name__} "
                        f"does not see it. After `fabric.setup`, call `model.mark_forward_method({name!r})`."
                    )

            handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
            try:
                return method(*args, **kwargs)
            finally:
                handle.remove()

        return guarded

    # ---- the module's own -------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights under the names that they have in the user's module."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of the user's module."""
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "_original_module" not in modules:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        original = modules["_original_module"]
        value = getattr(original, name)
        if not isinstance(value, MethodType) or value.__self__ is not original:
            return value
        if name in self._forward_methods:
            plain = not (self._wrapped or self._converts or self._watches or _is_compiled(modules["_forward_module"]))
            return value if plain else self._as_forward(name, value)
        return self._guarded(name, value) if self._wrapped else value

    def __setattr__(self, name: str, value: Any) -> None:
        modules = self.__dict__.get("_modules", {})
        if "_original_module" not in modules or name in self.__dict__ or name in modules or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(modules["_original_module"], name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name in self._modules:
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FabricModule:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        memo[id(self._strategy)] = self._strategy  # one for all: it holds what there is one of, such as the devices
        for name, value in self.__dict__.items():
            clone.__dict__[name] = {} if name == "_redirected" else copy.deepcopy(value, memo)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_redirected": {}}


def _changes(precision: Precision, *names: str) -> bool:
    """Whether the precision does anything in one of these methods."""
    return any(getattr(type(precision), name) is not getattr(Precision, name) for name in names)


def _scales(strategy: Strategy) -> bool:
    """Whether ``loss.backward()`` would do something else than ``fabric.backward(loss)``."""
    precision = strategy.precision
    if type(strategy).backward is not Strategy.backward:
        return True
    known = type(precision).__module__ == Precision.__module__
    return precision.policy.scaler if known else _changes(precision, "pre_backward", "backward", "post_backward")


class _Backward:
    """Whether ``fabric.backward`` runs; the same for all threads, since devices run backward in threads of their own."""

    running = False


def _watch_backward(tensor: Tensor) -> Tensor:
    if tensor.requires_grad:
        tensor.register_hook(_refuse_direct_backward)
    return tensor


def _refuse_direct_backward(gradient: Tensor) -> None:
    if not _Backward.running:
        raise RuntimeError(
            "`loss.backward()` was called, and under this strategy and precision a backward pass needs more than that: call "
            "`fabric.backward(loss)`."
        )


# Names that a wrapped optimizer has of its own; all others are those of the optimizer inside.
OWN_NAMES = frozenset({"_optimizer", "_strategy", "_callbacks", "optimizer", "step", "state_dict", "load_state_dict"})


class _FabricOptimizer:
    """An optimizer whose ``step`` goes through strategy and precision.

    Everything else is the wrapped optimizer's: what is read, set or called here is read, set or called there. It is an
    instance of that optimizer's class, so it can stand wherever that one can.

    Args:
        optimizer: as the strategy returned it.
        strategy: knows how to step it.
        callbacks: hear of each step, in ``on_after_optimizer_step(strategy, optimizer)``.

    Example::

        >>> wrapped = _FabricOptimizer(torch.optim.SGD([torch.ones(1)], lr=0.1), Strategy())
        >>> type(wrapped).__name__, isinstance(wrapped, torch.optim.SGD)
        ('FabricSGD', True)
    """

    def __init__(self, optimizer: Optimizer, strategy: Strategy, callbacks: list[Any] | None = None) -> None:
        self.__class__ = type("Fabric" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._optimizer = optimizer
        self._strategy = strategy
        self._callbacks = [] if callbacks is None else callbacks

    # The class is the wrapped optimizer's too, and its methods must not find this object: they would keep state here, where
    # no step ever reads it.

    def __getattribute__(self, name: str) -> Any:
        if name in OWN_NAMES or name.startswith("__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "_optimizer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN_NAMES or name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in OWN_NAMES:
            object.__delattr__(self, name)
        else:
            delattr(self._optimizer, name)

    def __repr__(self) -> str:
        return "Fabric" + repr(self._optimizer)

    def __reduce__(self) -> Any:
        return _itself, (self._optimizer,)  # a copy stands outside of the run

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    def state_dict(self) -> dict[str, Any]:
        """Its state, whole; under strategies that divide it every process must call this."""
        return self._strategy.get_optimizer_state(self._optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._strategy.load_optimizer_state(self._optimizer, state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model anew, runs ``fabric.backward``, and returns the loss.
        """
        result = self._strategy.optimizer_step(self._optimizer, closure)
        for callback in self._callbacks:
            hear = getattr(callback, "on_after_optimizer_step", None)
            if callable(hear):
                hear(strategy=self._strategy, optimizer=self._optimizer)
        return result


def _itself(optimizer: Optimizer) -> Optimizer:
    return optimizer


class _FabricDataLoader:
    """A loader whose batches are on the device, and whose sampler hears the epoch: each pass over it is one more.

    Everything else is the wrapped loader's.

    Args:
        dataloader: as this process needs it.
        device: where batches go; None leaves them where they are.
    """

    def __init__(self, dataloader: DataLoader[Any], device: torch.device | None = None) -> None:
        self._dataloader = dataloader
        self._device = device
        self._epoch = self._told = 0  # the next one, and what the sampler was told last

    @property
    def device(self) -> torch.device | None:
        """Where batches go; None if they stay where they are."""
        return self._device

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[Any]:
        self._tell_epoch()
        device = self._device
        if device is None:
            yield from self._dataloader
        else:
            for batch in self._dataloader:
                yield move_data_to_device(batch, device)

    def _tell_epoch(self) -> None:
        known = getattr(getattr(self._dataloader, "sampler", None), "epoch", self._told)
        if isinstance(known, int) and known != self._told:
            self._epoch = known  # somebody has told it another, as when a run goes on from a checkpoint
        set_sampler_epoch(self._dataloader, self._epoch)
        self._told = self._epoch
        self._epoch += 1

    def __getattr__(self, name: str) -> Any:
        if name == "_dataloader":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._dataloader, name)


# ---- and back ---------------------------------------------------------------------------------------------------------


def is_wrapped(obj: object) -> bool:
    """Whether Fabric has set up this module, optimizer or loader already.

    Example::

        >>> is_wrapped(torch.nn.Linear(1, 1)), is_wrapped(_FabricModule(torch.nn.Linear(1, 1), Strategy()))
        (False, True)
    """
    return isinstance(obj._orig_mod if _is_compiled(obj) else obj, (_FabricModule, _FabricOptimizer, _FabricDataLoader))


def _unwrap_objects(collection: Any) -> Any:
    """The user's own modules, optimizers and loaders, in place of what Fabric gave back for them, in dicts, lists and tuples."""

    def unwrap(obj: Any) -> Any:
        inner = obj._orig_mod if _is_compiled(obj) else obj
        if isinstance(inner, _FabricModule):
            return inner.module
        if isinstance(inner, _FabricOptimizer):
            return inner.optimizer
        return inner._dataloader if isinstance(inner, _FabricDataLoader) else obj

    if _is_compiled(collection):
        return unwrap(collection)
    return apply_to_collection(collection, (_FabricModule, _FabricOptimizer, _FabricDataLoader, *_compiled_class()), unwrap)


def _is_compiled(obj: object) -> TypeGuard[OptimizedModule]:
    """Whether ``obj`` is what ``torch.compile`` returns for a module."""
    return isinstance(obj, _compiled_class())


def _compiled_class() -> tuple[type, ...]:
    # The compiler is heavy to import; where nobody has imported it, nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return () if dynamo is None else (dynamo.OptimizedModule,)


def _uncompiled(module: Module) -> tuple[Module, Callable[[Module], Module] | None]:
    """The module that was given to ``torch.compile``, and what compiles another one in the same way; None if it is not compiled."""
    return (module._orig_mod, module.dynamo_ctx) if _is_compiled(module) else (module, None)
