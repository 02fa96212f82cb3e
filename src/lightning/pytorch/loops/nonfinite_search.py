"""The first module whose output is not finite: found by running the forward pass of a batch once more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning.pytorch.loops.replay import tensors_in, without_trace

if TYPE_CHECKING:
    from lightning.pytorch.loops.finite import Origin
    from lightning.pytorch.loops.fit import FitLoop
    from lightning.pytorch.trainer.trainer import Trainer

HINT = "`Trainer(detect_anomaly=True)` names the operation."


def search(trainer: Trainer, loop: FitLoop, origin: Origin, kind: str, through_strategy: bool) -> str:
    """Run the forward pass of a batch again, and say where it first was not finite.

    Random numbers are those of the first time; random states, buffers, Metrics and logged values are afterwards as before.

    Args:
        trainer: whose module.
        loop: the loop of the run.
        origin: the batch.
        kind: what was not finite: ``"loss"``, ``"gradient"`` or ``"scale"``.
        through_strategy: whether the pass runs as the strategy runs it, in all processes.
    """
    known = known_before(trainer, origin)
    # Where a forward pass needs all processes, all of them must run it.
    if trainer.strategy.reduce_boolean_decision(known is not None, all=False) if through_strategy else known is not None:
        return known or "Another process knows more."
    module, metrics = trainer.lightning_module, trainer._metrics
    try:
        with without_trace(module, metrics, trainer.strategy.root_device):
            first, loss = run_again(trainer, loop, origin, through_strategy)
    except Exception as error:
        return f"A second forward pass to find the module ended with {type(error).__name__}: {error}"
    if first is not None:
        return first
    if loss is not None and not is_finite(loss):
        return "All outputs of its modules were finite, so it became so in the code of `training_step` itself."
    if kind == "loss":
        return f"A second forward pass of the same batch and random numbers was finite throughout. {HINT}"
    return f"All outputs of the forward pass were finite, so it became so in the backward pass. {HINT}"


def known_before(trainer: Trainer, origin: Origin) -> str | None:
    """What explains it without a forward pass: weights or a batch that hold such values."""
    spoiled = [name for name, parameter in trainer.lightning_module.named_parameters() if not is_finite(parameter)]
    if spoiled:
        return f"The weights were not finite before: `{spoiled[0]}`" + (f" and {len(spoiled) - 1} more." if len(spoiled) > 1 else ".")
    for path, tensor in tensors_in(origin.batch):
        if not is_finite(tensor):
            return f"The batch itself holds values that are not finite{f', in `batch{path}`' if path else ''}."
    return None


def run_again(trainer: Trainer, loop: FitLoop, origin: Origin, through_strategy: bool) -> tuple[str | None, Tensor | None]:
    """One forward pass: what is to be told of the first module that was not finite, and the loss."""
    from lightning.pytorch.loops.batches import step_with_index
    from lightning.pytorch.loops.bind import training_step

    module, found = trainer.lightning_module, list[str]()
    assert origin.states is not None
    names = {submodule: name for name, submodule in module.named_modules()}

    def look(submodule: Module, inputs: Any, keywords: Any, output: Any) -> None:
        if found or submodule is module:
            return
        bad = next(((path, tensor) for path, tensor in tensors_in(output) if not is_finite(tensor)), None)
        if bad is not None:
            found.append(describe(names[submodule], submodule, (inputs, keywords), *bad))

    hooks = [submodule.register_forward_hook(look, with_kwargs=True) for submodule in names]
    try:
        origin.states.restore()
        trainer._metrics.scope, trainer._metrics.batch, trainer._metrics.batch_size = "training_step", origin.batch, None
        step = training_step(trainer) if through_strategy else step_with_index(module.training_step, "training_step")
        with torch.enable_grad(), loop.forward_context():
            outputs = step(origin.batch, origin.batch_idx)
    finally:
        for hook in hooks:
            hook.remove()
    loss = outputs if isinstance(outputs, Tensor) else outputs.get("loss") if isinstance(outputs, dict) else None
    return (found[0] if found else None), loss


def describe(name: str, module: Module, inputs: Any, path: str, output: Tensor) -> str:
    """What is told of the module whose output was the first that is not finite."""
    values = output.detach()
    bad = int((~values.isfinite()).sum())
    kind = "NaN" if bool(values.isnan().any()) else "infinite"
    clean = all(is_finite(tensor) for _, tensor in tensors_in(inputs))
    got = "Its input was finite." if clean else "Its input was not: it became so between modules, before this one."
    return (
        f"The first module whose output was not finite is `{name}` ({type(module).__name__}): {bad} of {values.numel()} values"
        f"{f' of `output{path}`' if path else ''} are {kind}. {got}"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor, or of what this process holds of it, is finite."""
    from lightning.fabric.strategies.sharding import local_tensor

    values = local_tensor(tensor.detach())
    values = values._values() if values.is_sparse else values
    if values.layout is not torch.strided or values.device.type == "meta" or not (values.is_floating_point() or values.is_complex()):
        return True
    return bool(values.isfinite().all())
