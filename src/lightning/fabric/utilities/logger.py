"""Hyperparameters and metrics in the forms that loggers can write."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor

PLAIN_TYPES = (bool, int, float, str, type(None))


def convert_params(params: Any) -> dict[str, Any]:
    """Hyperparameters as a dict of their own; the values stay what they are.

    Args:
        params: a mapping, a ``Namespace``, a dataclass instance, or None for no hyperparameters.

    Raises:
        TypeError: if ``params`` is anything else.

    Example::

        >>> convert_params(Namespace(lr=0.1))
        {'lr': 0.1}
    """
    if params is None:
        return {}
    fields = named_values(params)
    if fields is None:
        raise TypeError(
            f"`params` must be a dict, a Namespace, a dataclass instance or None, but {params!r} ({type(params).__name__}) was given. "
            "Give each value a name, for example {'lr': 0.1}."
        )
    return fields


def named_values(value: Any) -> dict[Any, Any] | None:
    """The entries of a mapping, the attributes of a ``Namespace``, the fields of a dataclass instance; None for others."""
    if isinstance(value, Mapping):
        omegaconf = sys.modules.get("omegaconf")
        if omegaconf is not None and isinstance(value, omegaconf.DictConfig):
            return from_omegaconf(value)  # type: ignore[no-any-return]
        return dict(value)
    if isinstance(value, Namespace):
        return dict(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def from_omegaconf(value: Any) -> Any:
    """An OmegaConf container as dicts and lists, interpolations resolved where they can be."""
    omegaconf = sys.modules["omegaconf"]
    try:
        return omegaconf.OmegaConf.to_container(value, resolve=True)
    except omegaconf.errors.OmegaConfBaseException:
        return omegaconf.OmegaConf.to_container(value, resolve=False)


def flatten_dict(params: Any, delimiter: str = "/", parent_key: str = "") -> dict[str, Any]:
    """Nested mappings, namespaces and dataclasses as one dict whose keys are the paths; empty ones vanish.

    Example::

        >>> flatten_dict({"optimizer": {"name": "sgd", "lr": 0.1}, "layers": [2, 2]})
        {'optimizer/name': 'sgd', 'optimizer/lr': 0.1, 'layers': [2, 2]}
    """
    result: dict[str, Any] = {}
    for key, value in convert_params(params).items():
        path = f"{parent_key}{delimiter}{key}" if parent_key else str(key)
        if named_values(value) is None:
            result[path] = value
        else:
            result.update(flatten_dict(value, delimiter, path))
    return result


def sanitize_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys with values that TensorBoard can show: numbers, booleans and strings; the rest in string form.

    Example::

        >>> sanitize_params({"lr": 0.1, "layers": [2, 2], "optimizer": None, "loss": Tensor})
        {'lr': 0.1, 'layers': '[2, 2]', 'optimizer': 'None', 'loss': 'torch.Tensor'}
    """
    result: dict[str, Any] = {}
    for key, value in params.items():
        value = as_number(value)
        result[key] = value if type(value) in (bool, int, float, str) else string_form(value)
    return result


def plain_data(value: Any) -> Any:
    """``value`` in nothing but dicts, lists, strings, numbers, booleans and None, so that any YAML or JSON reader takes it.

    Namespaces and dataclass instances become dicts, tuples and sets lists, numpy scalars numbers; whatever else there is
    (tensors, paths, enums, modules, functions) is replaced by its string form.

    Example::

        >>> from pathlib import Path
        >>> plain_data({"path": Path("data"), "betas": (0.9, 0.99), "model": Namespace(width=8), 1: None})
        {'path': 'data', 'betas': [0.9, 0.99], 'model': {'width': 8}, 1: None}
    """
    if type(value) in PLAIN_TYPES:
        return value
    fields = named_values(value)
    if fields is not None:
        return {k if type(k) in PLAIN_TYPES else string_form(k): plain_data(v) for k, v in fields.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return [plain_data(v) for v in sorted(value, key=string_form)]
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(value, omegaconf.ListConfig):
        return plain_data(from_omegaconf(value))
    if not isinstance(value, Tensor):
        value = as_number(value)
    return value if type(value) in PLAIN_TYPES else string_form(value)


def string_form(value: Any) -> str:
    """``str(value)``; of functions and classes their qualified name, which unlike their repr holds no address."""
    name = getattr(value, "__qualname__", None)
    if callable(value) and isinstance(name, str):
        return f"{value.__module__}.{name}"
    return str(value)


def as_number(value: Any) -> Any:
    """The Python number in a one-element tensor or numpy scalar; anything else as it is."""
    numpy = sys.modules.get("numpy")
    is_scalar = numpy is not None and isinstance(value, numpy.generic)
    if is_scalar or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    return value


def metric_value(name: str, value: Any) -> Any:
    """The Python number in a metric that is a tensor or a numpy scalar; any other value as it is.

    Raises:
        ValueError: if the tensor has more than one element.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"The metric {name!r} is a tensor of shape {tuple(value.shape)}, but a metric is one number. Log its mean or sum, "
            "or each element under a name of its own."
        )
    return as_number(value)


def add_prefix(metrics: Mapping[str, Any], prefix: str, separator: str) -> dict[str, Any]:
    """The metrics with ``prefix`` and ``separator`` before each name; without a prefix the names stay.

    Example::

        >>> add_prefix({"loss": 0.5}, "student", "-")
        {'student-loss': 0.5}
    """
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()} if prefix else dict(metrics)
