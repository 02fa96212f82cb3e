"""What a step calls, resolved once: the user's override where there is one, else the shortest way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning.fabric.precision import Precision
from lightning.fabric.strategies.hooks import StrategyHooks
from lightning.fabric.strategies.strategy import Strategy
from lightning.fabric.utilities.apply_func import apply_to_collection, move_data_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.dispatch import no_op, override_of, scoped, spanned
from lightning.pytorch.loops.batches import Waits, step_with_index

if TYPE_CHECKING:
    from lightning.pytorch.loops.fit import FitLoop
    from lightning.pytorch.trainer.trainer import Trainer


def without_bound(loop: Any, fresh: Any) -> dict[str, Any]:
    """The state of a loop for copies and pickles: what a fresh one has too, not what a run has resolved."""
    return {name: value for name, value in vars(loop).items() if name in vars(fresh)}


def profiled(trainer: Trainer, function: Callable[..., Any], action: str) -> Callable[..., Any]:
    """``function`` inside a span of the profiler, if there is one."""
    return function if trainer._profiler is None else spanned(function, trainer._profiler, action)


def fetched(trainer: Trainer, loader: Iterable[Any], action: str) -> Iterable[Any]:
    """``loader``, with a span of the profiler, if there is one, around the wait for each batch."""
    return loader if trainer._profiler is None else Fetched(loader, trainer._profiler, action)


class Fetched:
    """An iterable whose items are waited for in spans of a profiler.

    Args:
        source: the iterable.
        profiler: gets the spans.
        action: their name.
    """

    def __init__(self, source: Iterable[Any], profiler: Any, action: str) -> None:
        self.source, self.profiler, self.action = source, profiler, action

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        items, end = iter(self.source), object()
        while True:
            with self.profiler.profile(self.action):
                item = next(items, end)
            if item is end:
                return
            box, item = [item], None
            yield box.pop()  # kept by nobody here while it is computed on


def waits(trainer: Trainer) -> Waits:
    """What takes the time for which training waits for its loader, and says it where that is much."""
    device, idle = trainer.strategy.root_device, None
    if device.type == "cuda":
        from lightning.pytorch.loops.input_bound import DeviceIdle

        idle = DeviceIdle(torch.cuda.current_stream(device))
    # Others work behind the host too, and can't be asked whether they are done.
    return Waits(idle, partial(_tell_of_waits, trainer) if device.type in ("cpu", "cuda") else None)


def _tell_of_waits(trainer: Trainer, waits: Waits) -> None:
    from lightning.pytorch.loops.input_bound import tell

    tell(trainer, waits)


def transfer(trainer: Trainer, dataloader_idx: int = 0) -> Callable[[Any], Any]:
    """How a batch gets to the device: through the data hooks that somebody overrides."""
    strategy, device = trainer.strategy, trainer.strategy.root_device
    span = f"[Strategy]{type(strategy).__name__}.batch_to_device"
    before = _data_hook(trainer, "on_before_batch_transfer")
    move = _data_hook(trainer, "transfer_batch_to_device")
    after = _data_hook(trainer, "on_after_batch_transfer")
    convert = strategy.precision.convert_input if type(strategy.precision).convert_input is not Precision.convert_input else None
    if before is None and move is None and after is None and convert is None:
        if type(strategy).batch_to_device is Strategy.batch_to_device:
            return profiled(trainer, _overlapping(trainer, partial(move_data_to_device, device=device), False), span)
        own = partial(strategy.batch_to_device, device=device, dataloader_idx=dataloader_idx)
        return profiled(trainer, _overlapping(trainer, own, True), span)
    transfer_to = _overlapping(trainer, move or profiled(trainer, strategy.batch_to_device, span), move is not None)

    def through_hooks(batch: Any) -> Any:
        if convert is not None:
            batch = convert(batch)
        if before is not None:
            batch = before(batch, dataloader_idx)
        batch = transfer_to(batch, device, dataloader_idx)
        return batch if after is None else after(batch, dataloader_idx)

    return through_hooks


def _overlapping(trainer: Trainer, transfer: Callable[..., Any], is_users: bool) -> Callable[..., Any]:
    """``transfer`` on a stream of its own, unless that is not wanted or the device has none."""
    device, asked = trainer.strategy.root_device, trainer._config.overlap_transfer
    if asked is False or device.type != "cuda":
        return transfer
    from lightning.pytorch.loops.overlap import OverlappedTransfer

    # Steps that are replayed leave the host time to spare.
    return OverlappedTransfer(transfer, device, is_users, bool(asked) or trainer.fit_loop.recorder is not None, bool(asked))


def _data_hook(trainer: Trainer, name: str) -> Callable[..., Any] | None:
    """The override of a data hook: the datamodule's goes first, the module's where that has none."""
    in_module = override_of(trainer.lightning_module, name, LightningModule)
    in_data = override_of(trainer.datamodule, name, LightningDataModule) if trainer.datamodule is not None else None
    if in_module is not None and in_data is not None:
        rank_zero_warn(f"Both the LightningModule and the LightningDataModule override `{name}`: the datamodule's is used.")
    found = in_data or in_module
    if found is None:
        return None
    base, owner = ("LightningDataModule", trainer.datamodule) if in_data is not None else ("LightningModule", trainer.lightning_module)
    return profiled(trainer, found, f"[{base}]{type(owner).__name__}.{name}")


def training_step(trainer: Trainer) -> Callable[[Any, int], Any]:
    """``training_step`` as it runs under the strategy, as a function of batch and index."""
    strategy = trainer.strategy
    step = step_with_index(strategy.step_of("training_step"), "training_step")
    if type(strategy).post_training_step is not StrategyHooks.post_training_step:
        step = followed(step, strategy.post_training_step)
    return profiled(trainer, step, f"[Strategy]{type(strategy).__name__}.training_step")


def followed(step: Callable[[Any, int], Any], then: Callable[[], None]) -> Callable[[Any, int], Any]:
    """``step``, and ``then`` after it."""

    def both(batch: Any, batch_idx: int) -> Any:
        outputs = step(batch, batch_idx)
        then()
        return outputs

    return both


def forward_context(trainer: Trainer, stage: str) -> Callable[[], AbstractContextManager[Any]]:
    """The context of a step: that of the stage where a precision of the user's own has one, else that of any forward pass."""
    precision, name = trainer.strategy.precision, f"{stage}_step_context"
    if getattr(type(precision), name) is getattr(Precision, name):
        return precision.forward_context
    return getattr(precision, name)  # type: ignore[no-any-return]


def backward(trainer: Trainer) -> Callable[..., None]:
    """Backward on the loss: scaled for fp16, through the user's override of ``backward`` if there is one."""
    strategy = trainer.strategy
    run = _heard_by(strategy, _backward(trainer), trainer.lightning_module.automatic_optimization)
    return profiled(trainer, run, f"[Strategy]{type(strategy).__name__}.backward")


def _heard_by(strategy: Strategy, run: Callable[..., None], automatic: bool) -> Callable[..., None]:
    """``run`` with ``pre_backward`` and ``post_backward`` of the strategy around it, where they are the user's own."""
    # Ours do something in manual optimization alone, where `manual_backward` calls them; users' may call ours.
    before = strategy.pre_backward if automatic and _of_users(type(strategy).pre_backward) else no_op
    after = strategy.post_backward if _of_users(type(strategy).post_backward) else no_op
    if before is no_op and after is no_op:
        return run

    def heard(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        before(loss)
        run(loss, *args, **kwargs)
        after(loss.detach())

    return heard


def _of_users(method: Callable[..., Any]) -> bool:
    return not method.__module__.startswith("lightning.fabric.")


def _backward(trainer: Trainer) -> Callable[..., None]:
    module, strategy = trainer.lightning_module, trainer.strategy
    override = of_user(trainer, "backward")
    precision = strategy.precision
    plain = (
        type(strategy).backward is Strategy.backward
        and type(precision).backward is Precision.backward
        and type(precision).pre_backward is Precision.pre_backward
        and type(precision).post_backward is Precision.post_backward
    )
    if override is None:
        return Tensor.backward if plain else partial(_strategy_backward, strategy, module)
    if plain:
        return override

    def through_override(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        override(precision.pre_backward(loss, module), *args, **kwargs)
        precision.post_backward(loss, module)

    return through_override


def of_user(trainer: Trainer, name: str) -> Callable[..., Any] | None:
    """The module's override of a hook, if there is one, as the loop calls it."""
    module = trainer.lightning_module
    override = override_of(module, name, LightningModule)
    if override is None:
        return None
    return profiled(trainer, scoped(override, name, trainer._metrics), f"[LightningModule]{type(module).__name__}.{name}")


def _strategy_backward(strategy: Strategy, module: LightningModule, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    strategy.backward(loss, module, *args, **kwargs)


def _step_is_plain(strategy: Strategy) -> bool:
    """Whether stepping an optimizer under strategy and precision is just ``optimizer.step(closure)``."""
    precision = type(strategy.precision)
    unscaled = precision.optimizer_step is Precision.optimizer_step or not strategy.precision.policy.scaler
    known = precision.__module__ == Precision.__module__  # a user's own class may do anything
    return (
        type(strategy).optimizer_step is Strategy.optimizer_step
        and unscaled
        and (known or precision.optimizer_step is Precision.optimizer_step)
    )


def update(trainer: Trainer, loop: FitLoop) -> Callable[[Callable[[], Any]], Any]:
    """One optimizer step with a closure: the user's ``optimizer_step``, else the optimizer's own, else through the precision."""
    strategy = trainer.strategy
    optimizer = strategy.optimizers[0]
    override = of_user(trainer, "optimizer_step")
    if override is not None:
        wrapped, progress = strategy._lightning_optimizers[0], loop.progress
        return lambda closure: override(progress.epoch, progress.batch_idx, wrapped, closure)
    if _step_is_plain(strategy):
        step: Callable[[Callable[[], Any]], Any] = optimizer.step
    else:
        step = partial(strategy.optimizer_step, optimizer)
    return profiled(trainer, step, f"[LightningModule]{type(trainer.lightning_module).__name__}.optimizer_step")


def zeroes_plainly(trainer: Trainer) -> bool:
    """Whether zeroing gradients runs nobody's code but torch's, so that nobody sees when it happens."""
    optimizer = trainer.strategy.optimizers[0]
    return (
        override_of(trainer.lightning_module, "optimizer_zero_grad", LightningModule) is None
        and type(optimizer).zero_grad is Optimizer.zero_grad
        and "zero_grad" not in vars(optimizer)
    )


def drop_gradients(optimizer: Optimizer) -> None:
    """``Optimizer.zero_grad``, without what it tells profilers."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def zero_grad(trainer: Trainer, loop: FitLoop) -> Callable[[Any], Any]:
    """Zeroing the gradients before a window's first backward."""
    override = of_user(trainer, "optimizer_zero_grad")
    if override is None:
        optimizer = trainer.strategy.optimizers[0]
        own = vars(optimizer).get("zero_grad")
        plain = type(optimizer).zero_grad if own is None else lambda optimizer: own()
        if zeroes_plainly(trainer):
            plain = drop_gradients
        return profiled(trainer, plain, f"[LightningModule]{type(trainer.lightning_module).__name__}.optimizer_zero_grad")
    progress = loop.progress
    return lambda optimizer: override(progress.epoch, progress.batch_idx, optimizer)


def clip(trainer: Trainer) -> Callable[[Any], Any]:
    """Clipping before an automatic step."""
    module, value, algorithm = trainer.lightning_module, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    overridden = any(override_of(module, name, LightningModule) for name in ("configure_gradient_clipping", "clip_gradients"))
    if overridden:
        configure = scoped(module.configure_gradient_clipping, "configure_gradient_clipping", trainer._metrics)
        configure = profiled(trainer, configure, f"[LightningModule]{type(module).__name__}.configure_gradient_clipping")
        # By position: scoped() passes no keywords; the parameters' order is part of the hook's signature.
        return lambda optimizer: configure(optimizer, value, algorithm)
    strategy, precision = trainer.strategy, trainer.strategy.precision
    if not value or value < 0:
        return no_op
    plain = type(strategy).clip_gradients is Strategy.clip_gradients and type(precision).clip_gradients is Precision.clip_gradients
    if plain and algorithm in (None, "norm"):  # gradients have their true size already
        by_norm = precision.clip_grad_by_norm
        return lambda optimizer: by_norm(optimizer, value)
    return lambda optimizer: strategy.clip_gradients(optimizer, value, algorithm or "norm")


def unscale(trainer: Trainer) -> Callable[[Any], Any]:
    """Bringing fp16 gradients to their true size, where somebody looks at them before the step."""
    module = trainer.lightning_module
    precision = trainer.strategy.precision
    looks = (
        trainer._hooks.on_before_optimizer_step is not no_op
        or trainer.gradient_clip_val
        or any(override_of(module, name, LightningModule) for name in ("configure_gradient_clipping", "clip_gradients"))
    )
    if not looks or type(precision).unscale_gradients is Precision.unscale_gradients:
        return no_op
    return precision.unscale_gradients


def guards(trainer: Trainer, loop: FitLoop) -> list[Any]:
    """What was asked for to stand around a step, each with ``wrap(loop)`` and ``finish()``."""
    config, found = trainer._config, list[Any]()
    if config.on_out_of_memory == "split_batch":
        from lightning.pytorch.loops.splitting import BatchSplitter

        found.append(BatchSplitter(trainer, loop))
    if config.on_nonfinite is not None:
        from lightning.pytorch.loops.finite import FiniteWatch

        found.append(FiniteWatch(trainer, loop, config.on_nonfinite))
    if config.gc_interval is not None:
        from lightning.pytorch.loops.garbage import GarbageSchedule

        found.append(GarbageSchedule(config.gc_interval))
    if loop.recorder is not None:
        from lightning.pytorch.loops.graphs import StepGraphs

        found.append(StepGraphs(trainer, loop, loop.recorder))
    return found


@contextmanager
def guarded(guards: list[Any]) -> Iterator[None]:
    """A context for the run; in the end each guard says what it has to, also where the run fails."""
    try:
        yield
    except BaseException:
        for guard in guards:
            with suppress(Exception):  # the error that ended the run is what counts
                guard.finish()
        raise
    for guard in guards:
        guard.finish()


def detach_outputs(outputs: Any) -> Any:
    """What ``training_step`` returned, without its graph: a dict with the loss under ``"loss"``."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach()}
    if outputs is None:
        return {}
    return apply_to_collection(outputs, Tensor, Tensor.detach)


def detach_manual_outputs(outputs: Any) -> Any:
    """The same for manual optimization, whose steps may return nothing.

    Raises:
        MisconfigurationException: for anything but a tensor, a dict, or None.
    """
    if outputs is None or isinstance(outputs, (Tensor, dict)):
        return detach_outputs(outputs)
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    raise MisconfigurationException(
        f"`training_step` returned {outputs!r}, a {type(outputs).__name__}: in manual optimization return a tensor, a dict, or None."
    )
