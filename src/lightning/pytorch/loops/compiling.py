"""``Trainer(compile=...)``: steps compiled by ``torch.compile``, or replayed as graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.dispatch import no_op
from lightning.pytorch.loops import graph_recording

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


@contextmanager
def graphs_of_steps(trainer: Trainer) -> Iterator[None]:
    """A context for a fit whose steps are recorded: on a stream where that can be, with processes that talk between passes."""
    strategy = trainer.strategy
    device, talks = strategy.root_device, getattr(strategy, "talk_between_passes", no_op)
    recorder = trainer.fit_loop.recorder = graph_recording.recorder_of(device)
    if recorder is None:
        rank_zero_warn(f"Trainer(compile='step') needs a CUDA device: on {device} training steps run as without it, with the same result.")
        yield
        return
    with side_stream(device):
        talks(True)
        try:
            yield
        finally:
            talks(False)
            trainer.fit_loop.recorder = None


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A context in which a CUDA device works on another stream than its default one, on which nothing can be recorded."""
    if device.type != "cuda":
        yield
        return
    stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


def check_graphs(trainer: Trainer) -> None:
    """Refuse what steps that are replayed can't have.

    Raises:
        MisconfigurationException: if the run has it.
    """
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.single_device import SingleDeviceStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    config, strategy = trainer._config, trainer.strategy
    name, fits = type(strategy).__name__, ""
    if isinstance(strategy, DDPStrategy):
        try:
            strategy.talk_between_passes(True)
        except ValueError as error:
            fits = str(error)
        finally:
            strategy.talk_between_passes(False)
    against = {
        "manual optimization: its steps are the module's own": not trainer.lightning_module.automatic_optimization,
        f"the strategy {name}: it replays steps of SingleDeviceStrategy and DDPStrategy": type(strategy)
        not in (SingleDeviceStrategy, DDPStrategy),
        f"the strategy {name} as it is: {fits}": bool(fits),
        f"on_nonfinite={config.on_nonfinite!r}: nobody looks at single steps": config.on_nonfinite is not None,
        f"on_out_of_memory={config.on_out_of_memory!r}: their memory is reserved": config.on_out_of_memory != "raise",
        "detect_anomaly=True": config.detect_anomaly,
    }
    for what, is_so in against.items():
        if is_so:
            raise MisconfigurationException(f"Trainer(compile='step') does not go with {what}. Leave out one of the two.")
