"""What several processes hold has to stay the same in all of them: averages what nothing else averages, and finds differences."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning.fabric import collectives
from lightning.fabric.strategies.sharding import is_dtensor, local_tensor
from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def covers(parameter: Tensor, ranks: set[int]) -> bool:
    """Whether a parameter is laid out over a mesh that holds all these processes, so that DTensor keeps it the same in them."""
    return is_dtensor(parameter) and ranks <= ranks_of(parameter.device_mesh)


def ranks_of(mesh: DeviceMesh) -> set[int]:
    """The global ranks of the processes in a mesh."""
    return set(mesh.mesh.flatten().tolist())


def make_same(tensors: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Overwrite what the processes of a mesh of one dimension hold whole, or hold the same part of, with that of the first of them."""
    ranks = ranks_of(mesh)
    group = mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    collectives.broadcast_tensors((local_tensor(tensor) for tensor in tensors if not covers(tensor, ranks)), first, group)


# ---- gradients --------------------------------------------------------------------------------------------------------


class AveragedGradients:
    """Averages, at the end of each backward pass, the gradients of parameters that are divided by nothing that would do so.

    However backward is run, every process must run it over some of these parameters, or none must.

    Args:
        parameters: in the same order in each process.
        group: the processes.
    """

    def __init__(self, parameters: Iterable[Tensor], group: Any) -> None:
        self.parameters = list(parameters)
        self.group = group
        self.enabled = True  # False keeps gradients local, until the last backward pass of an accumulation window
        self._task = -1  # the backward pass whose end is awaited
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self.parameters]

    def remove(self) -> None:
        """Average no more."""
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, _: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if self.enabled and task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """Every process takes part with every parameter; one that it has no gradient of counts as zero."""
        size = torch.distributed.get_world_size(self.group)
        given = [parameter.grad is not None for parameter in self.parameters]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        parts = [local_tensor(grad) for grad in grads]
        anywhere = torch.tensor(given, dtype=torch.float32).to(parts[0].device, non_blocking=True)
        torch._foreach_div_(parts, size)
        works = [torch.distributed.all_reduce(part, group=self.group, async_op=True) for part in (*parts, anywhere)]
        for work in works:
            work.wait()
        if not all(given):  # only then does it matter who else has one, and is the device read
            for parameter, grad, has in zip(self.parameters, grads, anywhere.tolist()):
                if has and parameter.grad is None:
                    parameter.grad = grad


def check_replicated_gradients(module: Module, ranks: set[int], group: Any) -> bool:
    """Compare gradients of parameters that each of some processes holds whole; every one of them must call it.

    Args:
        module: after a backward pass.
        ranks: the global ranks of the processes of the group.
        group: the processes; they have computed with the same batch.

    Returns:
        whether all gradients were finite, so that the comparison means something.

    Raises:
        RuntimeError: in every process of the group, if gradients differ.
    """
    held = {name: p for name, p in module.named_parameters() if p.grad is not None and not covers(p, ranks)}
    names = collectives.gather_object(list(held), group)
    if any(each != names[0] for each in names):
        lacking = sorted(name for name in set().union(*names) if not all(name in each for each in names))
        raise RuntimeError(_explain(lacking, "only some processes of a tensor-parallel group have a gradient of"))
    if not held:
        return True
    distances = []
    for parameter in held.values():
        here = local_tensor(parameter.grad).detach()  # type: ignore[arg-type]
        mean = here.to(torch.float32, copy=True)
        torch.distributed.all_reduce(mean, group=group)
        mean /= torch.distributed.get_world_size(group)
        tolerance = 1e-3 if here.dtype in (torch.float32, torch.float64) else 2e-2
        distances.append(torch.stack([(here - mean).norm(), tolerance * mean.norm()]))
    worst = collectives.all_gather(torch.stack(distances), group).amax(0)  # NaN where any is
    differing = [name for name, (distance, allowed) in zip(held, worst.tolist()) if distance > allowed + 1e-12]
    if differing:
        raise RuntimeError(_explain(differing, "the processes of a tensor-parallel group have different gradients of"))
    return bool(worst.isfinite().all())


def _explain(names: list[str], what: str) -> str:
    shown = ", ".join(map(repr, names[: collectives.SHOWN_RANKS])) + (" ..." if len(names) > collectives.SHOWN_RANKS else "")
    return (
        f"After the first step {what} {shown}, which each of them holds whole: their weights would drift apart. Such parameters must see "
        "the same numbers in all processes of the group. Where activations are divided (as by SequenceParallel), name the module in the "
        "plan of `parallelize_module` too, so that its gradients are summed."
    )


# ---- data -------------------------------------------------------------------------------------------------------------


def compares_first_batch(step: Callable[..., Any], name: str, group: Any) -> Callable[..., Any]:
    """``step``, which in its first call makes sure that all processes of the group were given the same tensors.

    Args:
        step: takes a batch.
        name: of the step, for the error.
        group: the processes.

    Returns:
        a function that raises MisconfigurationException in every process of the group if they were not.
    """
    compared = False

    @wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compared
        if not compared:
            compared = True
            _check_same_batch(name, (args, kwargs), group)
        return step(*args, **kwargs)

    return run


def _check_same_batch(name: str, arguments: Any, group: Any) -> None:
    hashes = collectives.gather_object(_hash_of(arguments), group)
    if len(set(hashes)) > 1:
        raise MisconfigurationException(
            f"`{name}` was given different batches in the processes of a tensor-parallel group, which compute one model together and need "
            "the same data. Share data out by `trainer.distributed_sampler_kwargs` (the default does), not by the global rank, and draw "
            "random numbers, as in augmentations, from generators with the same seed."
        )


def _hash_of(tree: Any) -> str:
    """Of all tensors in a structure."""
    from torch.utils._pytree import tree_leaves

    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and not is_dtensor(leaf) and leaf.layout == torch.strided and leaf.device.type != "meta":
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- Metrics of torchmetrics --------------------------------------------------------------------------------------------


def count_once(module: Module, group: Any) -> list[Any]:
    """Let the Metrics in a module gather from the processes of ``group`` alone, which have different data; returns those that now do.

    Metrics that were told from whom to gather do so.
    """
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None:
        return []

    own = group

    def gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
        return torchmetrics.utilities.distributed.gather_all_tensors(tensor, group or own)  # type: ignore[no-any-return]

    found = [each for each in module.modules() if isinstance(each, torchmetrics.Metric)]
    changed = [metric for metric in found if metric.process_group is None and metric.dist_sync_fn is None]
    for metric in changed:
        metric.dist_sync_fn = gather  # unlike a group, it can be copied
    return changed
