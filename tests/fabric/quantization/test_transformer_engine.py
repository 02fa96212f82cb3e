"""The library needs a Hopper GPU and a compiler: these tests put a package of the same interface in its place."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric.precision import build_precision
from lightning.fabric.quantization import TransformerEnginePrecision

installed = importlib.util.find_spec("transformer_engine") is not None

ENGINE = """
import contextlib, torch
entered = []

@contextlib.contextmanager
def NAME(enabled=True, RECIPE=None):
    entered.append((enabled, RECIPE))
    yield

class Linear(torch.nn.Module):
    def __init__(self, in_features, out_features, sequence_parallel=False, *, bias=True, device="cuda"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = torch.nn.Parameter(torch.empty(out_features, device=device)) if bias else torch.Tensor()

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias if self.bias.numel() else None)

class LayerNorm(torch.nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, *, device="cuda"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(normalized_shape, device=device))
        self.bias = torch.nn.Parameter(torch.empty(normalized_shape, device=device))
        self.eps = eps

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
"""
RECIPES = """
import dataclasses, enum

class Format(enum.Enum):
    E4M3 = 1
    HYBRID = 2

@dataclasses.dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
"""


@pytest.fixture(params=[("autocast", "recipe"), ("fp8_autocast", "fp8_recipe")], ids=["new", "old"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    name, recipe = request.param
    package = tmp_path / "packages" / "transformer_engine"
    for directory in (package / "pytorch", package / "common" / "recipe"):
        directory.mkdir(parents=True)
    for file in (package, package / "common"):
        (file / "__init__.py").touch()
    (package / "pytorch" / "__init__.py").write_text(ENGINE.replace("NAME", name).replace("RECIPE", recipe))
    (package / "common" / "recipe" / "__init__.py").write_text(RECIPES)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    importlib.invalidate_caches()
    import transformer_engine.pytorch

    yield transformer_engine.pytorch
    for module in [module for module in sys.modules if module.startswith("transformer_engine")]:
        del sys.modules[module]


pytestmark = pytest.mark.skipif(installed, reason="a real transformer_engine is installed, which needs a GPU")


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 16, bias=False), nn.LayerNorm(16, eps=0.5), nn.Sequential(nn.Linear(16, 16)), nn.BatchNorm1d(16))


def test_the_missing_library_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install.*transformer_engine"):
        TransformerEnginePrecision(weights_dtype=torch.bfloat16)
    with pytest.raises(ModuleNotFoundError, match=r"pip install.*transformer_engine"):
        build_precision("transformer-engine", "cuda")


def test_names_stand_for_weights_dtypes(engine: Any) -> None:
    assert build_precision("transformer-engine", "cuda").policy.param_dtype is torch.bfloat16
    assert build_precision("transformer-engine-float16", "cuda").policy.param_dtype is torch.float16
    assert build_precision("transformer-engine-float16", "cuda").precision == "transformer-engine-float16"
    with pytest.raises(ValueError, match=r"weights_dtype=torch\.float32"):
        TransformerEnginePrecision(weights_dtype=torch.float32)


def test_layers_are_replaced_and_keep_their_parameters(engine: Any) -> None:
    model = make_model().eval()
    weight, x = model[0].weight, torch.ones(4, 32)
    expected = model(x)
    converted = TransformerEnginePrecision(weights_dtype=torch.bfloat16).convert_module(model)
    assert converted is model
    assert [type(child) for child in model] == [engine.Linear, engine.LayerNorm, nn.Sequential, nn.BatchNorm1d]
    assert type(model[2][0]) is engine.Linear
    assert model[0].weight is weight
    assert not model[0].training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model.float()(x), expected, rtol=0.1, atol=0.1)


def test_layers_that_8_bit_products_can_not_serve_stay(engine: Any) -> None:
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 16), nn.LayerNorm(16, bias=False))
    with pytest.warns(UserWarning, match="'0' maps 10 to 16 features"):
        TransformerEnginePrecision(weights_dtype=torch.bfloat16).convert_module(model)
    assert [type(child) for child in model] == [nn.Linear, engine.Linear, nn.LayerNorm]


@pytest.mark.parametrize("replace", [None, True])
def test_a_module_with_layers_of_the_library_is_left_to_its_author(engine: Any, replace: bool | None) -> None:
    model = nn.Sequential(engine.Linear(16, 16, device="cpu"), nn.Linear(16, 16))
    TransformerEnginePrecision(weights_dtype=torch.float16, replace_layers=replace).convert_module(model)
    assert type(model[1]) is nn.Linear
    assert model[1].weight.dtype is torch.float16


def test_layers_stay_when_the_user_says_so(engine: Any) -> None:
    model = TransformerEnginePrecision(weights_dtype=torch.bfloat16, replace_layers=False).convert_module(make_model())
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype is torch.bfloat16


def test_recipe_from_a_mapping(engine: Any) -> None:
    from transformer_engine.common import recipe

    precision = TransformerEnginePrecision(weights_dtype=torch.bfloat16, recipe={"fp8_format": "E4M3", "amax_history_len": 16})
    assert precision.recipe == recipe.DelayedScaling(fp8_format=recipe.Format.E4M3, amax_history_len=16)
    with pytest.raises(ValueError, match=r"fp8_format='E9M9'\. Accepted: 'E4M3', 'HYBRID'"):
        TransformerEnginePrecision(weights_dtype=torch.bfloat16, recipe={"fp8_format": "E9M9"})


@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")
def test_forward_context_opens_the_engine_each_time(engine: Any) -> None:
    recipe = object()
    precision = TransformerEnginePrecision(weights_dtype=torch.bfloat16, recipe=recipe, fallback_compute_dtype=torch.float16)
    for _ in range(2):
        with precision.forward_context():
            assert torch.get_default_dtype() is torch.bfloat16
            assert torch.is_autocast_enabled("cuda") is torch.cuda.is_available()
            with precision.forward_context():
                pass
    assert engine.entered == [(True, recipe)] * 4
    assert torch.get_default_dtype() is torch.float32
    with precision.module_init_context():
        assert nn.Linear(1, 1).weight.dtype is torch.bfloat16
