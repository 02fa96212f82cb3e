"""Matrix products in 8 bits on Hopper and later GPUs, through NVIDIA's library ``transformer_engine``."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn import LayerNorm, Linear, Module

from lightning.fabric.precision import Autocast, TruePrecision
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

NAMES = {torch.bfloat16: "transformer-engine", torch.float16: "transformer-engine-float16"}


class TransformerEnginePrecision(TruePrecision):
    """Weights in 16 bits, matrix products in 8 bits where layers of ``transformer_engine`` do them.

    Args:
        weights_dtype: what parameters are stored in: ``torch.bfloat16`` or ``torch.float16``.
        recipe: how the scales of the 8-bit numbers are found: a recipe of ``transformer_engine.common.recipe``, or a mapping with
            the arguments of its ``DelayedScaling``, in which ``fp8_format`` may be a name such as ``"HYBRID"``. None: the
            library's choice for the GPU.
        replace_layers: whether ``torch.nn.Linear`` and ``torch.nn.LayerNorm`` give way to the library's layers (which are no
            subclasses of them). None: yes, unless the module has layers of the library already.
        fallback_compute_dtype: what other operations compute in. None: ``weights_dtype``.

    Raises:
        ModuleNotFoundError: without the package ``transformer_engine``.
        ValueError: if ``weights_dtype``, or the recipe's ``fp8_format``, is another.

    Example::

        precision = TransformerEnginePrecision(weights_dtype=torch.bfloat16, recipe={"fp8_format": "HYBRID", "amax_history_len": 16})
        trainer = Trainer(accelerator="gpu", plugins=precision)
    """

    def __init__(
        self,
        *,
        weights_dtype: torch.dtype,
        recipe: Mapping[str, Any] | Any | None = None,
        replace_layers: bool | None = None,
        fallback_compute_dtype: torch.dtype | None = None,
    ) -> None:
        require_transformer_engine()
        if weights_dtype not in NAMES:
            raise ValueError(
                f"TransformerEnginePrecision(weights_dtype={weights_dtype}) is not known. Accepted: {', '.join(map(str, NAMES))}."
            )
        super().__init__(NAMES[weights_dtype])
        self.weights_dtype = weights_dtype
        self.recipe = delayed_scaling(recipe) if isinstance(recipe, Mapping) else recipe
        self.replace_layers = replace_layers
        self.fallback_compute_dtype = fallback_compute_dtype or weights_dtype
        self.fallback = Autocast("cuda", self.fallback_compute_dtype)

    def convert_module(self, module: Module) -> Module:
        if self.replace_layers is not False:
            if any(is_engine_layer(child) for child in module.modules()):
                if self.replace_layers:
                    rank_zero_info("The module has layers of transformer_engine already; its other layers are left as they are.")
            else:
                replace_layers(module)
        return super().convert_module(module)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which parameters have ``weights_dtype``; layers are replaced when the module is set up."""
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.eight_bits()

    @contextmanager
    def eight_bits(self) -> Generator[None, None, None]:
        import transformer_engine.pytorch as te

        # Releases before 2.9 know the older name only.
        engine = (
            te.autocast(enabled=True, recipe=self.recipe)
            if hasattr(te, "autocast")
            else te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)
        )
        with self.default_dtype, self.fallback, engine:
            yield


def delayed_scaling(arguments: Mapping[str, Any]) -> Any:
    """Return the ``DelayedScaling`` recipe with these arguments."""
    from transformer_engine.common import recipe

    keywords = dict(arguments)
    name = keywords.get("fp8_format")
    if isinstance(name, str):
        if name not in recipe.Format.__members__:
            raise ValueError(f"recipe has fp8_format={name!r}. Accepted: {', '.join(map(repr, recipe.Format.__members__))}.")
        keywords["fp8_format"] = recipe.Format[name]
    return recipe.DelayedScaling(**keywords)


def replace_layers(module: Module) -> None:
    """Put the library's layers, with the same parameters, in place of linear layers and layer norms."""
    import transformer_engine.pytorch as te

    for name, child in module.named_children():
        replacement: Any = None
        if type(child) is Linear:
            if child.in_features % 16 or child.out_features % 16:
                rank_zero_warn(
                    f"The linear layer {name!r} maps {child.in_features} to {child.out_features} features. 8-bit products need multiples "
                    "of 16, so it stays in 16 bits."
                )
                continue
            replacement = te.Linear(child.in_features, child.out_features, bias=child.bias is not None, device=child.weight.device)
        elif type(child) is LayerNorm and child.bias is not None:
            replacement = te.LayerNorm(child.normalized_shape, eps=child.eps, device=child.weight.device)
        if replacement is None:
            replace_layers(child)
            continue
        replacement.weight, replacement.bias = child.weight, child.bias if child.bias is not None else replacement.bias
        setattr(module, name, replacement.train(child.training))


def is_engine_layer(module: Module) -> bool:
    return type(module).__module__.startswith("transformer_engine.pytorch")


def require_transformer_engine() -> None:
    import importlib.util

    if importlib.util.find_spec("transformer_engine") is None:
        raise ModuleNotFoundError(
            "precision='transformer-engine' needs the package transformer_engine: "
            '`pip install --no-build-isolation "transformer_engine[pytorch]"` (Linux, CUDA).'
        )
