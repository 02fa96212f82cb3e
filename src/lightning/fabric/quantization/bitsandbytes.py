"""Linear layers with weights of 8 or 4 bits, through the library ``bitsandbytes``."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Linear, Module

from lightning.fabric.precision import TruePrecision
from lightning.fabric.utilities.exceptions import MisconfigurationException

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
NAMES = {torch.float16: "16-true", torch.bfloat16: "bf16-true", torch.float32: "32-true"}


class BitsandbytesPrecision(TruePrecision):
    """Store the weights of linear layers in 8 or 4 bits, and compute in ``dtype``.

    The layers are quantized when the module moves to its device. All other parameters, and the inputs, are converted to
    ``dtype``. Quantized weights are not trained (``"int8-training"`` excepted, which keeps them in float16 and
    quantizes them in each forward pass); what trains is everything around them, such as adapters. Optimizers are left as
    they are: ``bitsandbytes.optim`` has some with 8-bit state.

    Args:
        mode: ``"nf4"`` or ``"fp4"`` for 4 bits, with ``-dq`` to quantize the scales as well; ``"int8"``, or ``"int8-training"``.
        dtype: what is computed in: float16, bfloat16 or float32. None: bfloat16 where the GPU has it; float16 with int8, which
            knows no other.
        ignore_modules: names of submodules whose linear layers stay as they are; each stands for all names that begin so.

    Raises:
        ModuleNotFoundError: without the package ``bitsandbytes``.
        ValueError: if mode or dtype are not among those, or don't go together.

    Example::

        precision = BitsandbytesPrecision("nf4-dq", dtype=torch.bfloat16, ignore_modules={"lm_head"})
        trainer = Trainer(plugins=precision)
    """

    def __init__(
        self,
        mode: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"],
        dtype: torch.dtype | None = None,
        ignore_modules: Iterable[str] | None = None,
    ) -> None:
        require_bitsandbytes()
        if mode not in MODES:
            raise ValueError(f"BitsandbytesPrecision(mode={mode!r}) is not known. Accepted: {', '.join(map(repr, MODES))}.")
        if dtype is None:
            full = not mode.startswith("int8") and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
            dtype = torch.bfloat16 if full else torch.float16
        if dtype not in NAMES:
            raise ValueError(f"BitsandbytesPrecision(dtype={dtype}) is not known. Accepted: {', '.join(map(str, NAMES))}.")
        if mode.startswith("int8") and dtype is not torch.float16:
            raise ValueError(f"BitsandbytesPrecision({mode!r}, dtype={dtype}): the 8-bit modes compute in torch.float16 only.")
        super().__init__(NAMES[dtype])
        self.mode = mode
        self.dtype = dtype
        self.ignore_modules = {ignore_modules} if isinstance(ignore_modules, str) else set(ignore_modules or ())

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with quantized layers in place of its linear ones; a quantized one stays as it is.

        Subclasses of ``torch.nn.Linear`` are left alone: what they do with their weight is their own business.

        Raises:
            MisconfigurationException: if there is no linear layer.
        """
        if not any(isinstance(child, Linear) for child in module.modules()):
            raise MisconfigurationException(
                f"BitsandbytesPrecision quantizes linear layers, and {type(module).__name__} has none. Use another precision."
            )
        super().convert_module(module)
        for name, child in list(module.named_modules()):
            if type(child) is Linear and name and not name.startswith(tuple(self.ignore_modules)):
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, self.quantized(child))
        return module

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which ``torch.nn.Linear`` makes quantized layers; on a GPU, one after the other.

        Raises:
            RuntimeError: with ``ignore_modules``, since a layer that is being built does not know its name yet.
        """
        if self.ignore_modules:
            raise RuntimeError(
                f"BitsandbytesPrecision(ignore_modules={self.ignore_modules}) can't be used with init_module: layers have no names "
                "while they are built. Leave out ignore_modules, or build the model outside of init_module."
            )
        return self.linear_replaced()

    @contextmanager
    def linear_replaced(self) -> Generator[None, None, None]:
        quantized = self.quantized

        class QuantizedLinear(Linear):
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                return quantized(Linear(*args, **kwargs)) if cls is QuantizedLinear else super().__new__(cls)

        torch.nn.Linear = QuantizedLinear  # type: ignore[misc]
        try:
            with self.default_dtype:
                yield
        finally:
            torch.nn.Linear = Linear  # type: ignore[misc]

    def quantized(self, linear: Linear) -> Linear:
        """Return a layer with the parameters of ``linear``, whose weight is quantized on the way to its device."""
        import bitsandbytes as bnb

        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        layer: Any
        if self.mode.startswith("int8"):  # 6.0: inputs beyond it keep 16 bits, as the authors of LLM.int8() advise
            layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=self.mode == "int8-training", threshold=6.0, device="meta")
        else:
            layer = bnb.nn.Linear4bit(
                *shape,
                compute_dtype=self.dtype,
                compress_statistics=self.mode.endswith("-dq"),
                quant_type=self.mode[:3],
                device="meta",
            )
        layer.bias = linear.bias
        device = linear.weight.device
        layer.weight = new_weight(layer, linear.weight.detach(), device if device.type not in ("cpu", "meta") else None)
        layer.register_load_state_dict_pre_hook(prepare_loading)
        return layer.train(linear.training)  # type: ignore[no-any-return]


def new_weight(layer: Any, weight: Tensor, device: torch.device | None) -> Any:
    """The parameter for ``layer.weight`` made of a floating-point ``weight``; quantized if ``device`` is given."""
    import bitsandbytes as bnb

    parameter: Any
    if isinstance(layer, bnb.nn.Linear8bitLt):
        layer.state.CB = layer.state.SCB = None
        training = layer.state.has_fp16_weights
        # Only a weight that comes from the CPU is quantized when it moves.
        parameter = bnb.nn.Int8Params(weight if device is None else weight.cpu(), requires_grad=training, has_fp16_weights=training)
    else:
        parameter = bnb.nn.Params4bit(
            weight.to(layer.compute_dtype),
            requires_grad=False,
            compress_statistics=layer.weight.compress_statistics,
            quant_type=layer.weight.quant_type,
            module=layer,
        )
    return parameter if device is None else parameter.to(device)


def prepare_loading(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let ``layer`` load weights of either kind, quantized or not, whichever it has itself."""
    import bitsandbytes as bnb

    key = prefix + "weight"
    weight = state_dict.get(key)
    if weight is None:
        return
    device = layer.weight.device
    eight_bits = isinstance(layer, bnb.nn.Linear8bitLt)
    if weight.is_floating_point():
        if not layer.weight.is_floating_point():
            layer.weight = new_weight(layer, weight, device)
    elif eight_bits:
        scale = state_dict[prefix + "SCB"].to(device)
        layer.state.CB = layer.state.SCB = None
        data = weight.to(device)
        layer.weight = bnb.nn.Int8Params(data, requires_grad=False, CB=data, SCB=scale)
    else:
        state = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(key + ".")}
        layer.weight = bnb.nn.Params4bit.from_prequantized(weight, state, device=device, module=layer)
    if not layer.weight.is_floating_point():
        state_dict[key] = layer.weight.data


def require_bitsandbytes() -> None:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("BitsandbytesPrecision needs the package bitsandbytes: `pip install bitsandbytes`.")
