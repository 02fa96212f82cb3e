"""Accumulation windows in checkpoints: which gradients a step that is still to come will use, and going on with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer


def names_to_keep(trainer: Trainer) -> set[str]:
    """The names of the parameters whose gradients a checkpoint has to hold; all processes must call it, and have the same result.

    In manual optimization these are the gradients of all optimizers that have not stepped since ``manual_backward`` ran last, and
    all there are where backward is run by other means, of which nobody hears. Within a step, which a resumed run takes
    again, there are none.
    """
    loop, strategy = trainer.fit_loop, trainer.strategy
    module = strategy.lightning_module
    assert module is not None
    if module.automatic_optimization:
        within = loop.gathered > 0 and loop.gathered == loop.progress.batch_idx % loop.accumulate
        return {name for name, _ in module.named_parameters()} if within else set()
    names = _unspent(trainer, module) if loop.gathered == 0 else set()
    others = strategy.compare(dict.fromkeys(names, ""), names)  # None where all processes have the same
    return names if others is None else names.union(*others)


def _unspent(trainer: Trainer, module: Any) -> set[str]:
    loop, strategy = trainer.fit_loop, trainer.strategy
    over = [optimizer for optimizer in strategy.optimizers if loop.runs_backward and id(optimizer) in loop.spent]
    spent = {id(parameter) for optimizer in over for group in optimizer.param_groups for parameter in group["params"]}
    # Sharded strategies keep what was not reduced yet elsewhere.
    elsewhere = strategy.forward_is_collective
    return {
        name
        for name, parameter in module.named_parameters()
        if id(parameter) not in spent and (parameter.grad is not None or (elsewhere and parameter.requires_grad))
    }


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Where in its accumulation window a run is."""
    loop = trainer.fit_loop
    return {
        "accumulate": loop.accumulate,
        "gathered": loop.gathered,
        "spent": [index for index, optimizer in enumerate(trainer.strategy.optimizers) if id(optimizer) in loop.spent],
        "stepped": [index for index, optimizer in enumerate(trainer.strategy.optimizers) if id(optimizer) in loop.stepped],
        "runs_backward": loop.runs_backward,
    }


def go_on(trainer: Trainer, saved: dict[str, Any] | None, with_gradients: bool) -> None:
    """Go on where :func:`state_of` was taken, so that a checkpoint that is saved before the next step holds the same.

    Args:
        trainer: whose run.
        saved: what the checkpoint has of it; None in one of others.
        with_gradients: whether it holds gradients.
    """
    if saved is None:
        return
    loop, optimizers = trainer.fit_loop, trainer.strategy.optimizers
    if not trainer.lightning_module.automatic_optimization:
        loop.spent.update(id(optimizers[index]) for index in saved["spent"])
        loop.stepped.update(id(optimizers[index]) for index in saved["stepped"])
        loop.runs_backward = saved["runs_backward"]
        return
    if not with_gradients:
        return
    loop.gathered, loop.accumulate = saved["gathered"], saved["accumulate"]
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
    now = trainer.accumulate_grad_batches
    if now != saved["accumulate"] and not scheduled:
        rank_zero_warn(
            f"The checkpoint was saved after {saved['gathered']} batches of a window of accumulate_grad_batches={saved['accumulate']}, and "
            f"it is {now} now: the gradients of that window are weighed as then. Resume with the same, or from a checkpoint of the end of "
            "a window."
        )
