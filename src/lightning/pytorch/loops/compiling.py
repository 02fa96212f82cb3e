"""``Trainer(compile=...)``: steps compiled by ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning.pytorch.core.module import LightningModule

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

# What a step may call that has its effect outside of the tensors: such calls are left out of what is compiled.
EAGER = (
    "log", "log_dict", "print", "all_gather", "manual_backward", "optimizers", "lr_schedulers", "toggle_optimizer", "untoggle_optimizer",
    "clip_gradients",
)  # fmt: skip


@contextmanager
def compiled_steps(trainer: Trainer, options: dict[str, Any]) -> Iterator[None]:
    """A context in which the strategy compiles the steps of the module.

    Args:
        trainer: whose model and strategy.
        options: keywords of ``torch.compile``.

    Raises:
        MisconfigurationException: if the strategy can't.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    eager: list[tuple[Any, str]] = []

    def compiler(step: Callable[..., Any]) -> Callable[..., Any]:
        for each in module.modules():
            if isinstance(each, LightningModule):
                keep_eager(each, EAGER, eager)
        for optimizer in strategy._lightning_optimizers:
            keep_eager(optimizer, ("step",), eager)
        return torch.compile(step, **options)

    try:
        strategy.compile_with(compiler)
    except ValueError as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        raise MisconfigurationException(f"Trainer(compile=...) with the strategy {type(strategy).__name__}: {error}") from None
    import torch._dynamo

    try:
        # So that a step which reads `self.global_step` is compiled once more, and not anew at each step.
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            yield
    finally:
        strategy.compile_with(None)
        for owner, name in eager:
            vars(owner).pop(name, None)


def keep_eager(owner: Any, names: tuple[str, ...], done: list[tuple[Any, str]]) -> None:
    """Let calls of some methods interrupt compiled code, so that they run as they always do.

    Args:
        owner: whose.
        names: of the methods.
        done: where that was done; it grows.
    """
    for name in names:
        if name not in vars(owner):
            vars(owner)[name] = torch.compiler.disable(getattr(owner, name))
            done.append((owner, name))
