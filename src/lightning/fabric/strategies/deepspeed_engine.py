"""DeepSpeed's engine as a training loop drives it: forward passes, accumulation windows, steps, clipping."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning.fabric.strategies.deepspeed_config import Config, import_deepspeed


class Engine:
    """A DeepSpeed engine, and what has happened in the current accumulation window.

    Args:
        raw: DeepSpeed's.
        parameters: what its optimizer trains, by group.
        loop_steps: whether a loop steps, and says which batches end a window; else each step of the user's code ends one.
    """

    def __init__(self, raw: Any, parameters: list[list[Parameter]], loop_steps: bool) -> None:
        self.raw = raw
        self.parameters = parameters
        self.loop_steps = loop_steps
        self.clip_val: float = raw.gradient_clipping()
        self.has_gradients = False
        self.within_forward = False

    @classmethod
    def build(
        cls,
        device: torch.device,
        module: Module,
        config: Config,
        optimizer: Optimizer | None = None,
        loop_steps: bool = False,
    ) -> Engine:
        """Let DeepSpeed make an engine; all processes must call it.

        Args:
            device: of this process.
            module: what it runs, on that device.
            config: whole: see :func:`~lightning.fabric.strategies.deepspeed_config.complete`.
            optimizer: None for the one that the configuration defines, or none.
            loop_steps: see :class:`Engine`.
        """
        deepspeed = import_deepspeed(device)
        if optimizer is not None:
            parameters = [list(group["params"]) for group in optimizer.param_groups]
        else:
            parameters = [[parameter for parameter in module.parameters() if parameter.requires_grad]]
        raw, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=parameters[0] if optimizer is None else None,
            config=config,
            dist_init_required=False,
        )
        return cls(raw, parameters, loop_steps)

    @property
    def module(self) -> Module:
        """What it runs."""
        return self.raw.module  # type: ignore[no-any-return]

    @property
    def trains(self) -> bool:
        """Whether it has an optimizer."""
        return self.raw.checkpoint_engine is not None

    @property
    def basic_optimizer(self) -> Any:
        """The optimizer that the engine's optimizer steps."""
        return self.raw.basic_optimizer or self.raw.optimizer

    def release(self) -> None:
        """Take it off the module."""
        self.raw.destroy()
        self.raw.module_forward_pre_hook.remove()
        self.raw.module_forward_post_hook.remove()

    # ---- forward ----------------------------------------------------------------------------------------------------

    def through(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as the engine's forward pass: with what the engine does before, after, and to the result."""
        raw, attributes = self.raw, vars(self.raw.module)
        own = attributes.get("forward")

        def restore() -> None:
            if own is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = own

        def forward(*args: Any, **kwargs: Any) -> Any:
            restore()  # the function may call the module
            return function(*args, **kwargs)

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self.within_forward = self.within_forward, True
            attributes["forward"] = forward
            try:
                return raw(*args, **kwargs)
            finally:
                self.within_forward = outer
                restore()

        return run

    def counting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """``step``, which at first tells the engine, for its log, how many samples a batch has."""
        counted = False

        @wraps(step)
        def run(batch: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            if not counted:
                counted = True
                size = first_dimension(batch)
                if size:
                    self.raw.set_train_micro_batch_size(size)
                    self.raw.tput_timer.batch_size = self.raw.train_batch_size()
            return step(batch, *args, **kwargs)

        return run

    # ---- backward and step ------------------------------------------------------------------------------------------

    def not_at_the_end(self) -> AbstractContextManager[None]:
        """A context for the batches of a window before the last one."""
        return self._inside_window() if self.loop_steps else nullcontext()

    @contextmanager
    def _inside_window(self) -> Generator[None, None, None]:
        self.raw.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.raw.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate the loss."""
        if self.within_forward:  # in manual optimization: what the engine does to the result of its forward pass has not happened
            result = loss
            loss = self.through(lambda: result)()  # not as an argument: weights would be given up at once when backward reaches it
        self.has_gradients = True
        self.raw.backward(loss, *args, **kwargs)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as the user's own code may differentiate it."""
        self.has_gradients = True
        return self.raw.scale(loss)  # type: ignore[no-any-return]

    def step(self, **kwargs: Any) -> None:
        """Update the weights; without gradients nothing happens."""
        if not self.has_gradients:
            return
        self.raw.step(**kwargs)
        self.has_gradients = False
        self._bound(self.clip_val)

    def clip(self, norm: float) -> None:
        """Clip the gradients of the step to come, unless the configuration says to what."""
        if not self.clip_val:
            self._bound(norm)

    def _bound(self, norm: float) -> None:
        self.raw._config.gradient_clipping = norm
        if hasattr(self.raw.optimizer, "clip_grad"):
            self.raw.optimizer.clip_grad = norm

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of the step to come, wherever they are kept; all processes must call it."""
        from deepspeed import utils

        trained = [parameter for group in self.parameters for parameter in group]
        if self.raw.zero_optimization_partition_weights():
            for parameter in trained:
                utils.safe_set_local_grad(parameter, utils.safe_get_local_grad(parameter) * factor)
            return
        utils.safe_update_full_grad_vectorized(trained, lambda gradient, parameter: gradient * factor)
        norms = getattr(self.raw.optimizer, "norm_for_param_grads", {})  # known already, where gradients are offloaded
        for parameter in norms:
            norms[parameter] = norms[parameter] * factor


def rounded_weights(module: Module, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Bring the weights of a module to the dtype in which an engine would have them; return them, each with what it was."""
    changed: list[tuple[Tensor, Tensor]] = []
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            changed.append((parameter, parameter.data))
            parameter.data = parameter.data.to(dtype)
    return changed


def configure_activation_checkpointing(settings: Mapping[str, Any] | None) -> None:
    """Tell ``deepspeed.checkpointing``, if a model uses it, what the section ``activation_checkpointing`` of the configuration says."""
    if not settings:
        return
    import deepspeed

    deepspeed.checkpointing.configure(
        None,
        partition_activations=settings.get("partition_activations"),
        contiguous_checkpointing=settings.get("contiguous_memory_optimization"),
        num_checkpoints=settings.get("number_checkpoints"),
        checkpoint_in_cpu=settings.get("cpu_checkpointing"),
        synchronize=settings.get("synchronize_checkpoint_boundary"),
        profile=settings.get("profile"),
    )


def first_dimension(batch: Any) -> int | None:
    """The length of the first tensor in a batch; None if there is none with a dimension."""
    from torch.utils._pytree import tree_leaves

    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
