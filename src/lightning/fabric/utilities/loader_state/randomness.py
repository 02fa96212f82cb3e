"""Random generators that objects carry with them, and their states as plain data."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from lightning.fabric.utilities.seed import _with_arrays, _without_arrays

DEPTH = 4  # Compose -> list -> transform -> generator
WIDTH = 64  # a longer collection holds data, not transforms
CLOSED = (str, bytes, int, float, complex, type(None), torch.Tensor, type, ModuleType, FunctionType, BuiltinFunctionType)


def generators_within(roots: Iterable[Any]) -> list[Any]:
    """The random generators that objects hold as attributes, each once, in an order that is the same for copies of them.

    Args:
        roots: samplers, datasets, functions that collate.

    Example::

        >>> class Noisy:
        ...     def __init__(self):
        ...         self.rng = random.Random(1)
        >>> len(generators_within([Noisy(), [1, 2]]))
        1
    """
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if "numpy.random" in sys.modules:
        import numpy as np

        kinds += (np.random.Generator, np.random.RandomState)
    found: list[Any] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, MethodType):
            value = value.__self__
        if isinstance(value, kinds):
            if id(value) not in seen:
                seen.add(id(value))
                found.append(value)
            return
        if depth == 0 or isinstance(value, CLOSED) or id(value) in seen:
            return
        seen.add(id(value))
        for inner in _parts(value):
            visit(inner, depth - 1)

    for root in roots:
        visit(root, DEPTH)
    return found


def _parts(value: Any) -> list[Any]:
    """What an object holds that could draw random numbers."""
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= WIDTH else []
    parts = list(value) if isinstance(value, (list, tuple)) and len(value) <= WIDTH else []
    attributes = getattr(value, "__dict__", None)
    return parts + list(attributes.values()) if isinstance(attributes, dict) else parts


def state_of(generator: Any) -> Any:
    """The state of a generator as plain data."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return list(generator.getstate()) if type(generator) is random.Random else None
    kept = generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state(legacy=False)
    return _without_arrays(kept)


def set_state(generator: Any, state: Any) -> None:
    """Let a generator continue from what :func:`state_of` returned."""
    if state is None:
        return
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _with_arrays(state)
    else:
        generator.set_state(_with_arrays(state))


def states_of(generators: list[Any]) -> list[Any]:
    """The states of several generators."""
    return [state_of(generator) for generator in generators]


def set_states(generators: list[Any], states: list[Any]) -> None:
    """The inverse of :func:`states_of`; nothing, if there are more or fewer of them now."""
    if len(generators) == len(states):
        for generator, state in zip(generators, states):
            set_state(generator, state)


def is_stateful(value: Any) -> bool:
    """Whether an object offers ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
