"""Precision: what the numbers of a run are made of, and what that asks of each step.

A :class:`PrecisionPolicy` says it as data. A :class:`Precision` does it: it converts modules and inputs, opens the
contexts of the forward pass, and scales gradients where float16 needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn


@dataclass(frozen=True)
class PrecisionPolicy:
    """A precision as data, which strategies interpret.

    Args:
        name: the canonical name, such as ``"bf16-mixed"``.
        param_dtype: what parameters are stored in.
        compute_dtype: what matrix products are computed in.
        reduce_dtype: what gradients are averaged in between processes.
        autocast: whether operations choose their dtype one by one (``torch.autocast``).
        scaler: whether the loss is scaled, so that small float16 gradients don't vanish.
    """

    name: str
    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    autocast: bool
    scaler: bool


POLICIES = {
    policy.name: policy
    for policy in (
        PrecisionPolicy("32-true", torch.float32, torch.float32, torch.float32, autocast=False, scaler=False),
        PrecisionPolicy("64-true", torch.float64, torch.float64, torch.float64, autocast=False, scaler=False),
        PrecisionPolicy("16-true", torch.float16, torch.float16, torch.float16, autocast=False, scaler=False),
        PrecisionPolicy("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, autocast=False, scaler=False),
        PrecisionPolicy("16-mixed", torch.float32, torch.float16, torch.float32, autocast=True, scaler=True),
        PrecisionPolicy("bf16-mixed", torch.float32, torch.bfloat16, torch.float32, autocast=True, scaler=False),
        PrecisionPolicy("transformer-engine", torch.bfloat16, torch.bfloat16, torch.bfloat16, autocast=False, scaler=False),
        PrecisionPolicy("transformer-engine-float16", torch.float16, torch.float16, torch.float16, autocast=False, scaler=False),
    )
}

SHORT_NAMES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def parse_precision(value: int | str | None) -> str:
    """Return the canonical name of the precision ``value``; None means ``"32-true"``.

    Raises:
        ValueError: if there is no such precision.

    Example::

        >>> parse_precision(32), parse_precision("bf16-true"), parse_precision(None)
        ('32-true', 'bf16-true', '32-true')
    """
    if value is None:
        return "32-true"
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        text = str(value)
        if text in POLICIES:
            return text
        if text in SHORT_NAMES:
            name = SHORT_NAMES[text]
            if name.endswith("-mixed"):
                rank_zero_warn(f"precision={value!r} leaves open whether it is mixed or true, and is read as {name!r}. Write {name!r}.")
            return name
    raise ValueError(f"precision={value!r} is not known. Accepted: {', '.join(map(repr, POLICIES))}; also 16, 32, 64, 'bf16'.")


# Entered by whoever asks for a context that does nothing; it holds no state, so one serves all.
NO_CONTEXT: AbstractContextManager[Any] = nullcontext()


class Precision:
    """Full float32 precision, and the base class of all others.

    Derive from it for a precision of your own, override what differs, and pass an instance in ``Trainer(plugins=...)``.
    """

    precision: str = "32-true"
    policy: PrecisionPolicy = POLICIES["32-true"]

    # -- before the run --

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its parameters and buffers in the dtype that this precision stores them in."""
        return module

    def connect(self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]) -> tuple[Module, list[Optimizer], list[Any]]:
        """Return the three, replaced where the precision needs wrappers around them."""
        return model, optimizers, lr_schedulers

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which newly built modules have the right dtype, or the right layers."""
        return self.tensor_init_context()

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new floating-point tensors have the right dtype."""
        return NO_CONTEXT

    # -- the forward pass --

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass. It may be entered each step, and within itself."""
        return NO_CONTEXT

    def train_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def val_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def test_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def predict_step_context(self) -> AbstractContextManager[Any]:
        return self.forward_context()

    def convert_input(self, data: Any) -> Any:
        """Return the batch ``data`` with its floating-point tensors in the dtype that the forward pass takes."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Return ``data``, the result of a forward pass, with its floating-point tensors in PyTorch's default dtype."""
        return data

    # -- the backward pass and the update --

    def pre_backward(self, tensor: Tensor, module: Module | None = None) -> Tensor:
        """Return what is to be differentiated in place of the loss ``tensor``."""
        return tensor

    def backward(self, tensor: Tensor, model: Module | None = None, *args: Any, **kwargs: Any) -> None:
        """Differentiate ``tensor``; the arguments after ``model`` go to ``Tensor.backward``, an ``optimizer`` among them goes nowhere."""
        if args and isinstance(args[0], Optimizer):
            args = args[1:]
        kwargs.pop("optimizer", None)
        tensor.backward(*args, **kwargs)

    def post_backward(self, tensor: Tensor, module: Module | None = None) -> Tensor:
        """Called after the backward pass; returns the loss ``tensor`` for the records."""
        return tensor

    def optimizer_step(
        self, optimizer: Optimizer, model: Module | None = None, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> Any:
        """Let ``optimizer`` update its parameters; ``closure`` computes loss and gradients, ``kwargs`` go to ``optimizer.step``."""
        if closure is None:
            return optimizer.step(**kwargs)
        return optimizer.step(closure=closure, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring the gradients of ``optimizer`` to their true size; gradients that have it stay as they are."""

    def main_params(self, optimizer: Optimizer) -> Iterator[Tensor]:
        """Yield the parameters that ``optimizer`` updates."""
        for group in optimizer.param_groups:
            yield from group["params"]

    def clip_gradients(self, optimizer: Optimizer, clip_val: int | float = 0.0, gradient_clip_algorithm: str = "norm") -> None:
        """Bound the gradients of ``optimizer``, after they were brought to their true size.

        Args:
            optimizer: its parameters' gradients are clipped in place.
            clip_val: the largest norm of all gradients together, or the largest absolute value; 0 or less: no bound.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.

        Raises:
            ValueError: if the algorithm is another.
        """
        if clip_val <= 0:
            return
        if gradient_clip_algorithm == "norm":
            clip = self.clip_grad_by_norm
        elif gradient_clip_algorithm == "value":
            clip = self.clip_grad_by_value
        else:
            raise ValueError(f"gradient_clip_algorithm={gradient_clip_algorithm!r} is not known. Accepted: 'norm', 'value'.")
        self.unscale_gradients(optimizer)
        clip(optimizer, clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Scale all gradients of ``optimizer`` by one factor such that their common norm is at most ``clip_val``."""
        clip_grad_norm(self.main_params(optimizer), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Limit each element of each gradient of ``optimizer`` to between ``-clip_val`` and ``clip_val``."""
        torch.nn.utils.clip_grad_value_(self.main_params(optimizer), clip_val)

    # -- checkpoints and the end --

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; the key in the checkpoint is the name of the class."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with the whole checkpoint before it is written."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with the whole checkpoint before its parts are restored."""

    def teardown(self) -> None:
        """Undo whatever the precision has changed outside itself."""


class TruePrecision(Precision):
    """Parameters, inputs and computation all in one dtype."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.policy = POLICIES[precision]
        self.default_dtype = DefaultDtype(self.policy.param_dtype)

    def convert_module(self, module: Module) -> Module:
        # Module.to(dtype) would drop the imaginary part of complex parameters.
        dtype = self.policy.param_dtype
        module._apply(lambda tensor: convert_floating(tensor, dtype))
        return module

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self.default_dtype

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.default_dtype

    def convert_input(self, data: Any) -> Any:
        return apply_to_collection(data, Tensor, convert_floating, self.policy.compute_dtype)

    def convert_output(self, data: Any) -> Any:
        return apply_to_collection(data, Tensor, convert_floating, torch.get_default_dtype())


class HalfPrecision(TruePrecision):
    """Everything in float16 or bfloat16: half the memory, and no float32 copy of the weights.

    Args:
        precision: ``"16-true"`` or ``"bf16-true"``.

    Raises:
        ValueError: if it is another.
    """

    def __init__(self, precision: str = "16-true") -> None:
        if precision not in ("16-true", "bf16-true"):
            raise ValueError(f"HalfPrecision(precision={precision!r}) is not known. Accepted: '16-true', 'bf16-true'.")
        super().__init__(precision)


class DoublePrecision(TruePrecision):
    """Everything in float64."""

    precision = "64-true"
    policy = POLICIES["64-true"]

    def __init__(self) -> None:
        super().__init__("64-true")


class MixedPrecision(Precision):
    """Parameters in float32, matrix products in float16 or bfloat16 (``torch.autocast``).

    With float16 the loss is scaled before the backward pass. The gradients are brought to their true size before they
    are clipped, and the update is left out when they overflowed. Fused optimizers are welcome.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: the device, or its type, that the forward pass runs on.
        scaler: a scaler of your own for ``"16-mixed"``.

    Raises:
        ValueError: if the precision is another.
        MisconfigurationException: if a scaler is given with ``"bf16-mixed"``, which needs none.
    """

    def __init__(self, precision: str, device: str | torch.device, scaler: GradScaler | None = None) -> None:
        if precision not in ("16-mixed", "bf16-mixed"):
            raise ValueError(f"MixedPrecision(precision={precision!r}) is not known. Accepted: '16-mixed', 'bf16-mixed'.")
        if scaler is not None and precision != "16-mixed":
            raise MisconfigurationException(f"precision='bf16-mixed' scales no gradients; leave out scaler={scaler!r}, or use '16-mixed'.")
        self.precision = precision
        self.policy = POLICIES[precision]
        self.device = str(device)
        self.autocast = Autocast(torch.device(device).type, self.policy.compute_dtype)
        self._scaler = scaler
        self._update_due = False

    @property
    def scaler(self) -> GradScaler | None:
        """The scaler of the gradients; None with ``"bf16-mixed"``."""
        if not self.policy.scaler:
            return None
        self.update_scale()
        return self.grad_scaler

    @scaler.setter
    def scaler(self, scaler: GradScaler | None) -> None:
        self._scaler = scaler
        self._update_due = False

    @property
    def grad_scaler(self) -> GradScaler:
        if self._scaler is None:  # made late: on a machine without that device, making one warns and disables it
            self._scaler = GradScaler(device=torch.device(self.device).type)
        return self._scaler

    def update_scale(self) -> None:
        """Let the scaler take the outcome of the last steps into account.

        This waits for the next backward pass. Were it done after each step, then with two optimizers the first one's
        step would make the scaler forget that the second one's gradients are already unscaled, or change their scale.
        """
        if self._update_due:
            self._update_due = False
            self.grad_scaler.update()

    def forget_step(self) -> None:
        """Let go of what a step has left that was begun and never done: its overflows, and which gradients it had unscaled."""
        self._update_due = False
        if self.policy.scaler:
            self.grad_scaler._per_optimizer_states.clear()

    def autocast_context_manager(self) -> torch.autocast:
        """Return a new ``torch.autocast`` for this precision."""
        return torch.autocast(self.autocast.device_type, dtype=self.autocast.dtype)

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.autocast

    def convert_output(self, data: Any) -> Any:
        return apply_to_collection(data, Tensor, convert_floating, torch.get_default_dtype())

    def pre_backward(self, tensor: Tensor, module: Module | None = None) -> Tensor:
        if not self.policy.scaler:
            return tensor
        self.update_scale()
        return self.grad_scaler.scale(tensor)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        if self.policy.scaler and has_gradients(optimizer) and stage_of(self.grad_scaler, optimizer) is OptState.READY:
            self.grad_scaler.unscale_(optimizer)

    def optimizer_step(
        self, optimizer: Optimizer, model: Module | None = None, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> Any:
        """Run ``closure``, then the update, unless the gradients overflowed or there are none; return the closure's result.

        Raises:
            MisconfigurationException: for LBFGS with ``"16-mixed"``: it calls its closure several times in a step.
        """
        if not self.policy.scaler:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "precision='16-mixed' can't scale the gradients of LBFGS, which runs its closure several times in one step. "
                "Use 'bf16-mixed' or '32-true', or another optimizer."
            )
        result = None if closure is None else closure()
        if not has_gradients(optimizer):
            return result
        scaler = self.grad_scaler
        if stage_of(scaler, optimizer) is OptState.STEPPED:
            self.update_scale()  # a second step without a backward pass in between
        stepped = scaler.step(optimizer, **kwargs)
        self._update_due = True
        return stepped if closure is None else result

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)


class Autocast(threading.local, AbstractContextManager[None]):
    """``torch.autocast`` that may be entered any number of times, and within itself, without being built anew.

    One ``torch.autocast`` remembers one outer state, so each depth of nesting, and each thread, has one of its own.
    """

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self.device_type = device_type
        self.dtype = dtype
        self.contexts: list[torch.autocast] = []
        self.depth = 0

    def __enter__(self) -> None:
        if self.depth == len(self.contexts):
            self.contexts.append(torch.autocast(self.device_type, dtype=self.dtype))
        self.contexts[self.depth].__enter__()
        self.depth += 1

    def __reduce__(self) -> Any:
        return Autocast, (self.device_type, self.dtype)  # a copy or a pickle starts outside of every context

    def __exit__(self, *exception: Any) -> None:
        self.depth -= 1
        self.contexts[self.depth].__exit__(*exception)


class DefaultDtype(AbstractContextManager[None]):
    """A context in which ``torch.get_default_dtype()`` is ``dtype``; it may be entered within itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.outer: list[torch.dtype] = []

    def __enter__(self) -> None:
        self.outer.append(torch.get_default_dtype())
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *exception: Any) -> None:
        torch.set_default_dtype(self.outer.pop())


def convert_floating(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in ``dtype`` if it is a floating-point one; integers, booleans and complex numbers stay."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> None:
    """``torch.nn.utils.clip_grad_norm_``, by the same operations, in half the host's time where all gradients lie on one GPU in one dtype.

    Args:
        parameters: their gradients are scaled in place.
        max_norm: the largest norm of all of them together.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not are_of_one_gpu(gradients):
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    with torch.no_grad():
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)), 2.0)
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (total + 1e-6), max=1.0))


def are_of_one_gpu(tensors: list[Tensor]) -> bool:
    """Whether these are plain tensors on one CUDA device, all of one dtype."""
    if not tensors:
        return False
    device, dtype = tensors[0].device, tensors[0].dtype
    return device.type == "cuda" and all(type(each) is Tensor and each.device == device and each.dtype is dtype for each in tensors)


def has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def stage_of(scaler: GradScaler, optimizer: Optimizer) -> OptState:
    """Whether ``optimizer`` has been unscaled, or has stepped, since the scaler's last update."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"]  # type: ignore[no-any-return]


def build_precision(name: int | str | None, accelerator: Any, plugin: Precision | None = None) -> Precision:
    """Return the precision for a run on one kind of device.

    Args:
        name: what ``Trainer(precision=...)`` takes; None: 32-bit, or that of ``plugin``.
        accelerator: the accelerator, or the type or name of its devices, such as ``"cuda"``.
        plugin: a precision of the user's own, which is returned as it is.

    Raises:
        ValueError: if the precision is not known, or both ``name`` and ``plugin`` are given.

    Example::

        >>> build_precision("bf16-mixed", "cpu").precision
        'bf16-mixed'
    """
    if plugin is not None:
        if name is not None:
            raise ValueError(f"precision={name!r} and the plugin {type(plugin).__name__} both choose the precision. Leave one of them out.")
        return plugin
    precision = parse_precision(name)
    kind = (
        accelerator if isinstance(accelerator, str) else accelerator.type if isinstance(accelerator, torch.device) else accelerator.name()
    )
    device_type = {"tpu": "xla", "gpu": "cuda"}.get(kind, kind)
    if precision == "32-true":
        return Precision()
    if precision == "64-true":
        if device_type == "mps":
            raise MisconfigurationException("precision='64-true' was asked for on MPS, which has no float64. Use '32-true', or the CPU.")
        return DoublePrecision()
    if precision in ("16-true", "bf16-true"):
        return HalfPrecision(precision)
    if precision.startswith("transformer-engine"):
        from lightning.fabric.quantization.transformer_engine import TransformerEnginePrecision

        engine: Precision = TransformerEnginePrecision(weights_dtype=POLICIES[precision].param_dtype)
        return engine
    if precision == "16-mixed" and device_type == "cpu":
        rank_zero_warn("precision='16-mixed' was asked for on the CPU, which computes in bfloat16 instead; 'bf16-mixed' is used.")
        precision = "bf16-mixed"
    rank_zero_info(f"Using {'float16' if precision == '16-mixed' else 'bfloat16'} automatic mixed precision")
    return MixedPrecision(precision, device_type)
