"""What a training step reads and does on the host, which a replay of its device work would neither read nor do again."""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

OWN_CODE = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent), warnings.__file__)
PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, Enum)
DEEPEST, MOST_ITEMS = 3, 64  # how far containers and objects of the module are looked into

# Attributes of a LightningModule that lead to what changes from step to step, or to what acts outside of tensors.
CHANGING = ("trainer", "global_step", "current_epoch", "logger", "loggers", "optimizers", "lr_schedulers", "print", "fabric")
OF_TORCH = ("_parameters", "_buffers", "_modules", "_trainer", "_metrics", "_fabric", "_fabric_optimizers", "_non_persistent_buffers_set")


class NotReplayable(Exception):
    """A step can't be replayed; the message says why, as the end of a sentence."""


def place(frames: Any) -> str:
    """Where in the user's code the innermost of these frames is."""
    for frame in reversed(list(frames)):
        if not frame.filename.startswith((*OWN_CODE, "<")):
            return f" ({frame.filename}:{frame.lineno}: `{(frame.line or '').strip()}`)"
    return ""


def here() -> str:
    """Where in the user's code this is called from."""
    return place(traceback.extract_stack())


class WatchedIndex(int):
    """A batch index that tells when somebody computes with it, rather than passing it on."""

    used: Callable[[], None]


def _telling(name: str) -> Callable[..., Any]:
    own = getattr(int, name)

    def method(self: WatchedIndex, *args: Any) -> Any:
        self.used()
        return own(self, *args)

    return method


for _name in (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__floordiv__", "__rfloordiv__",
    "__mod__", "__rmod__", "__pow__", "__rpow__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__int__",
    "__index__", "__float__", "__str__", "__repr__", "__format__", "__hash__", "__and__", "__rand__", "__lshift__", "__rshift__",
    "__neg__", "__divmod__", "__rdivmod__",
):  # fmt: skip
    setattr(WatchedIndex, _name, _telling(_name))


class Watch:
    """Runs a training step and takes note of what would make a replay of it wrong.

    Args:
        module: whose step.
        device: where it computes.
        attributes: whether to see which attributes of the module it reads; else all plain ones count as read.
    """

    def __init__(self, module: Module, device: torch.device, attributes: bool = True) -> None:
        self.module, self.device, self.attributes = module, device, attributes
        self.constants: dict[str, Any] = {}  # attributes of the module that the step has read, and their values
        self.containers: set[str] = set()  # such attributes that hold more than one value
        self.within: list[tuple[dict[str, Any], str, Any]] = []  # plain attributes of the modules within
        self.reason: str | None = None
        self.paused = False  # whether what runs is no part of what would be recorded

    def note(self, reason: str) -> None:
        """The step can't be replayed; the first reason counts."""
        if self.reason is None and not self.paused:
            self.reason = reason

    def run(self, step: Callable[[Any, int], Any], batch: Any, batch_idx: int) -> Any:
        """``step(batch, batch_idx)``, watched."""
        index = WatchedIndex(batch_idx)
        index.used = lambda: self.note(f"`training_step` computes with `batch_idx`, which a replay would not see change{here()}")
        states, numbers = host_state(self.module, self.device), self.random_states()
        with self.reading():
            outputs = step(batch, index)
        changed = [name for name, value in host_state(self.module, self.device).items() if states.get(name) != value]
        if changed:
            self.note(
                f"`training_step` changes `{changed[0]}` on the host, which a replay would not do: use a buffer and operations in place, "
                "or a hook of the batch's end"
            )
        if numbers != self.random_states():
            self.note("`training_step` draws random numbers on the host, which a replay would not do: draw them on the device")
        if outputs is None:
            self.note("`training_step` returned None, so that not every batch is trained on")
        return outputs

    def random_states(self) -> Any:
        """Of the host's generators, where the device has one of its own."""
        numpy = sys.modules.get("numpy")
        states: list[Any] = [random.getstate()]
        if numpy is not None:
            kind, keys, *rest = numpy.random.get_state(legacy=True)
            states.append((kind, keys.tobytes(), *rest))
        if self.device.type != "cpu":
            states.append(torch.get_rng_state().numpy().tobytes())
        return states

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside of it, attributes of the module that are read are noted."""
        if not self.attributes:
            self.constants = {name: value for name, value in vars(self.module).items() if isinstance(value, PLAIN)}
            yield
            return
        module, kind, watch = self.module, type(self.module), self
        inside = False  # of what the package does for an attribute

        def read(instance: Any, name: str) -> Any:
            nonlocal inside
            if instance is not module or inside or name.startswith("__"):
                return kind.__getattribute__(instance, name)
            if name in CHANGING:
                watch.note(f"`training_step` reads `self.{name}`, which a replay would not see change{here()}")
            inside = True
            try:
                value = kind.__getattribute__(instance, name)
            finally:
                inside = False
            if name in vars(module):
                if isinstance(value, (*PLAIN, Tensor)):
                    watch.constants[name] = value
                else:
                    watch.containers.add(name)
            return value

        module.__class__ = type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})
        try:
            yield
        finally:
            module.__class__ = kind

    def changed(self) -> str | None:
        """The name of an attribute that the step has read, and that has another value now."""
        values = vars(self.module)
        for name, value in self.constants.items():
            now = values.get(name)
            if now is not value and (isinstance(value, Tensor) or now != value):
                return f"self.{name}"
        return None

    def places(self) -> list[Any]:
        """What a hook of the user may change between any two steps: where weights and buffers lie, which of them are trained, which modules
        are in training mode."""
        found: list[Any] = []
        for part in self.module.modules():
            found.append(part.training)
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    found.extend((tensor.data_ptr(), tensor.requires_grad))
        return found

    def remember(self) -> None:
        """Take note of the plain attributes of modules within, as a recording that was just made has them."""
        self.within = [
            (vars(part), name, value)
            for part in self.module.modules()
            if part is not self.module
            for name, value in vars(part).items()
            if isinstance(value, PLAIN) and name != "training"
        ]

    def changed_within(self) -> bool:
        """Whether one of them has another value now."""
        return any(values.get(name) is not value and values.get(name) != value for values, name, value in self.within)

    def state_elsewhere(self) -> dict[str, Any]:
        """What a step may depend on and :meth:`changed` does not ask: the modules within, and containers that the step has read."""
        return host_state(self.module, self.device, self.containers)


class NoticedCollectives(TorchDispatchMode):
    """Notes what talks to other processes inside of it: one of them may replay a step while another runs it, or records it.

    Args:
        watch: takes the note.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.watch.note(f"it communicates with other processes in the middle of a step{here()}")
        return func(*args, **(kwargs or {}))


def is_ours(code: Any) -> bool:
    """Whether a class or function comes from this package."""
    return (getattr(code, "__module__", None) or "").startswith("lightning.")


def place_of(tensor: Tensor) -> int:
    """Where the elements of a tensor lie."""
    return tensor.data_ptr() if tensor.layout is torch.strided else 0


def host_state(module: Module, device: torch.device, own: Container[str] | None = None) -> dict[str, Any]:
    """What a module and those in it hold on the host, by name: plain values, and which tensors they are.

    Args:
        module: which.
        device: where it computes.
        own: the attributes of the module itself that count; None for all.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, part in module.named_modules():
        prefix = f"{path}." if path else "self."
        for name, value in vars(part).items():
            if part is module and own is not None and name not in own:
                continue
            if name not in OF_TORCH and not name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                describe(prefix + name, value, found, seen, device, 0)
        for name, tensor in (*part._buffers.items(), *part._parameters.items()):
            describe(prefix + name, tensor, found, seen, device, 0)
    return found


def describe(name: str, value: Any, found: dict[str, Any], seen: set[int], device: torch.device, depth: int) -> None:
    """Enter into ``found`` what can be compared of ``value``."""
    if isinstance(value, PLAIN):
        found[name] = value if value == value else "nan"
    elif isinstance(value, Tensor):
        # Changes in place are the device's; those of a tensor on the host are not.
        found[name] = (id(value), value.requires_grad, place_of(value), value._version if value.device.type != device.type else 0)
    elif depth >= DEEPEST or isinstance(value, (Module, type)) or callable(value) or id(value) in seen:
        found[name] = id(value)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        seen.add(id(value))
        found[name] = (type(value), len(value))
        if not isinstance(value, (set, frozenset)):
            for index, each in enumerate(value):
                if index >= MOST_ITEMS:
                    break
                describe(f"{name}[{index}]", each, found, seen, device, depth + 1)
    elif isinstance(value, Mapping):
        seen.add(id(value))
        found[name] = (type(value), len(value))
        for index, (key, each) in enumerate(value.items()):
            if index >= MOST_ITEMS:
                break
            describe(f"{name}[{key!r}]", each, found, seen, device, depth + 1)
    else:
        seen.add(id(value))
        found[name] = id(value)
        if not type(value).__module__.startswith("torch."):
            for inner, each in getattr(value, "__dict__", {}).items():
                describe(f"{name}.{inner}", each, found, seen, device, depth + 1)
