"""LightningModules that ``torch.compile`` has wrapped."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch._dynamo.eval_frame import OptimizedModule

    import lightning.pytorch as pl

__all__ = ["from_compiled", "maybe_unwrap_optimized", "to_uncompiled"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def from_compiled(model: OptimizedModule) -> pl.LightningModule:
    """The LightningModule inside ``torch.compile(module)``, with its ``forward`` and its steps compiled in the same way.

    The wrapper itself compiles ``forward`` alone, while the trainer calls the steps.

    Args:
        model: what ``torch.compile`` returned for a LightningModule.

    Returns:
        The module that was given to ``torch.compile``, changed in place.

    Raises:
        ValueError: if ``model`` is anything else.

    Example::

        model = from_compiled(torch.compile(LitModel()))
        trainer.fit(model)
    """
    from lightning.pytorch.core.module import LightningModule
    from lightning.pytorch.utilities.model_helpers import is_overridden

    if not _is_optimized(model):
        raise ValueError(f"from_compiled takes what `torch.compile(module)` returns, and got an object of type {type(model).__name__}.")
    module = model._orig_mod
    if not isinstance(module, LightningModule):
        raise ValueError(f"from_compiled takes a compiled LightningModule, and got a compiled {type(module).__name__}.")
    if _originals(module) is not None:
        to_uncompiled(module)
    names = ("forward", *(name for name in _STEPS if is_overridden(name, module, LightningModule)))
    own = vars(module)
    originals: dict[str, Any] = {name: own.get(name) for name in names}
    for name in names:
        setattr(module, name, model.dynamo_ctx(getattr(module, name)))
    module._compiler_ctx = originals  # type: ignore[assignment]
    return module


def to_uncompiled(model: pl.LightningModule | OptimizedModule) -> pl.LightningModule:
    """The LightningModule with the methods that it had before :func:`from_compiled`.

    Args:
        model: what :func:`from_compiled` or ``torch.compile`` returned.

    Returns:
        The module itself, changed in place.

    Raises:
        ValueError: if ``model`` is a LightningModule that is not compiled, or no module at all.
        TypeError: if it is a compiled module, and no LightningModule.

    Example::

        module = to_uncompiled(model)
        module.to_onnx("model.onnx")
    """
    from lightning.pytorch.core.module import LightningModule

    if _is_optimized(model):
        module = model._orig_mod
        if not isinstance(module, LightningModule):
            raise TypeError(f"to_uncompiled takes a compiled LightningModule, and got a compiled {type(module).__name__}.")
        if _originals(module) is None:
            return module
    elif isinstance(model, LightningModule):
        module = model
    else:
        raise ValueError(f"to_uncompiled takes a compiled LightningModule, and got an object of type {type(model).__name__}.")
    originals = _originals(module)
    if originals is None:
        raise ValueError(f"to_uncompiled takes a compiled LightningModule, and this {type(module).__name__} is not compiled.")
    for name, original in originals.items():
        delattr(module, name)
        if original is not None:
            setattr(module, name, original)
    module._compiler_ctx = None  # type: ignore[assignment]
    return module


def maybe_unwrap_optimized(model: object) -> pl.LightningModule:
    """The LightningModule that ``model`` is, or that ``torch.compile`` made ``model`` from.

    Raises:
        TypeError: if it is neither.
    """
    from lightning.pytorch.core.module import LightningModule

    if isinstance(model, LightningModule):
        return model
    if _is_optimized(model):
        return from_compiled(model)
    raise TypeError(
        f"`model` must be a LightningModule, or one that `torch.compile` wrapped; got an object of type {type(model).__name__}."
    )


def _is_optimized(model: object) -> TypeGuard[OptimizedModule]:
    # The compiler is heavy to import; where nobody has imported it, nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def _originals(module: pl.LightningModule) -> dict[str, Any] | None:
    """What stood in the compiled methods' places on the instance; None if the module is not compiled."""
    originals: dict[str, Any] | None = vars(module).get("_compiler_ctx")
    return originals
