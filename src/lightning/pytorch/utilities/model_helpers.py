"""Questions about modules and callbacks: what they override; and models from torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["get_torchvision_model", "is_overridden"]

_MISSING = object()


def is_overridden(method_name: str, instance: object | None = None, parent: type[object] | None = None) -> bool:
    """Whether ``instance`` has a method of its own in place of that of ``parent``.

    Its class may define it, or it may be set on the instance: ``module.on_train_start = function``, a mock.

    Args:
        method_name: the name of the method.
        instance: a module, datamodule, callback, or any other object if ``parent`` is given. None overrides nothing.
        parent: the class that defines the method; None for LightningModule, LightningDataModule or Callback, whichever
            ``instance`` is.

    Raises:
        ValueError: if ``parent`` is not given and ``instance`` is none of the three, or if ``parent`` has no such method.

    Example::

        >>> class Model(nn.Module):
        ...     def extra_repr(self):
        ...         return "mine"
        >>> is_overridden("extra_repr", Model(), nn.Module), is_overridden("train", Model(), nn.Module)
        (True, False)
    """
    if instance is None:
        return False
    if parent is None:
        parent = _documented_parent(instance)
    if method_name in getattr(instance, "__dict__", ()):
        mine: object = None
    else:
        mine = _definition(type(instance), method_name)
        if mine is _MISSING and not hasattr(instance, method_name):  # a mock makes it up when asked
            return False
    original = _definition(parent, method_name)
    if original is _MISSING:
        raise ValueError(f"is_overridden({method_name!r}): the class {parent.__name__} has no such method that could be overridden.")
    return mine is not original


def _definition(cls: type, name: str) -> object:
    """What the class, or the first of its bases that has it, defines under ``name``: not bound to anything."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), _MISSING)


def _documented_parent(instance: object) -> type[object]:
    from lightning.pytorch.callbacks.callback import Callback
    from lightning.pytorch.core.datamodule import LightningDataModule
    from lightning.pytorch.core.module import LightningModule

    for parent in (LightningModule, LightningDataModule, Callback):
        if isinstance(instance, parent):
            return parent
    raise ValueError(
        f"is_overridden: {type(instance).__name__} is no LightningModule, LightningDataModule or Callback; pass the class that "
        "defines the method as `parent`."
    )


def get_torchvision_model(model_name: str, **kwargs: Any) -> nn.Module:
    """A model from torchvision by its name.

    Args:
        model_name: such as ``"resnet18"``.
        kwargs: go to the model, such as ``weights="DEFAULT"``.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
    """
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"get_torchvision_model({model_name!r}) needs torchvision: `pip install torchvision`.") from error
    model: nn.Module = models.get_model(model_name, **kwargs)
    return model
