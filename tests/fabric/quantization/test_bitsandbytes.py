from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.quantization import BitsandbytesPrecision
from lightning.fabric.utilities.exceptions import MisconfigurationException

installed = importlib.util.find_spec("bitsandbytes") is not None
needs_library = pytest.mark.skipif(not installed, reason="bitsandbytes, an optional dependency, is not installed")

FOUR_BITS = ["nf4", "nf4-dq", "fp4", "fp4-dq"]
MODES = [*FOUR_BITS, "int8", "int8-training"]
X = torch.linspace(-2, 2, 4 * 64).reshape(4, 64)


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 32, bias=False)), nn.LayerNorm(32))


def run(precision: BitsandbytesPrecision, model: nn.Module) -> Tensor:
    with precision.forward_context():
        return model(precision.convert_input(X))


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        BitsandbytesPrecision("nf4")


@needs_library
@pytest.mark.parametrize(
    ("kwargs", "match"), [({"mode": "int4"}, "mode='int4'.*'nf4-dq'"), ({"mode": "nf4", "dtype": torch.int8}, "dtype=")]
)
def test_wrong_arguments_are_named(kwargs: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BitsandbytesPrecision(**kwargs)


@needs_library
@pytest.mark.parametrize("mode", ["int8", "int8-training"])
def test_int8_computes_in_float16_only(mode: Any) -> None:
    assert BitsandbytesPrecision(mode).dtype is torch.float16
    with pytest.raises(ValueError, match=r"compute in torch\.float16 only"):
        BitsandbytesPrecision(mode, dtype=torch.bfloat16)


@needs_library
@pytest.mark.parametrize("mode", MODES)
def test_a_converted_module_computes_nearly_the_same(mode: Any) -> None:
    precision = BitsandbytesPrecision(mode)
    expected = make_model()(X)
    model = precision.convert_module(make_model()).to("cpu")
    output = run(precision, model)
    assert output.dtype is precision.dtype
    error = (output.float() - expected).abs().mean() / expected.abs().mean()
    assert error < (0.02 if mode.startswith("int8") else 0.3)
    quantized = {"int8": torch.int8, "int8-training": torch.float16}.get(mode, torch.uint8)
    assert model[0].weight.dtype is model[2][0].weight.dtype is quantized
    assert model[3].weight.dtype is precision.dtype


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_four_bits_compute_in_the_dtype_that_was_asked_for(dtype: torch.dtype) -> None:
    precision = BitsandbytesPrecision("nf4", dtype=dtype)
    assert precision.policy.compute_dtype is dtype
    assert run(precision, precision.convert_module(make_model()).to("cpu")).dtype is dtype


@needs_library
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_quantized_weights_stay_and_the_rest_trains(mode: Any) -> None:
    precision = BitsandbytesPrecision(mode)
    model = precision.convert_module(make_model()).to("cpu")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def closure() -> Tensor:
        loss = run(precision, model).float().pow(2).mean()
        precision.backward(loss, model)
        return loss

    precision.optimizer_step(optimizer, model=model, closure=closure)
    assert torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(before["0.bias"], model[0].bias)


@needs_library
def test_int8_training_trains_its_weights() -> None:
    precision = BitsandbytesPrecision("int8-training")
    model = precision.convert_module(make_model()).to("cpu")
    run(precision, model).float().pow(2).sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.abs().sum() > 0


@needs_library
def test_ignored_modules_keep_their_layers() -> None:
    model = BitsandbytesPrecision("nf4", ignore_modules={"2"}).convert_module(make_model())
    assert type(model[0]) is not nn.Linear
    assert type(model[2][0]) is nn.Linear
    assert model[2][0].weight.dtype is torch.bfloat16
    assert type(BitsandbytesPrecision("nf4", ignore_modules="0").convert_module(make_model())[0]) is nn.Linear


@needs_library
def test_converting_twice_changes_nothing_more() -> None:
    precision = BitsandbytesPrecision("nf4")
    model = precision.convert_module(make_model()).to("cpu")
    layer, output = model[0], run(precision, model)
    assert precision.convert_module(model).to("cpu")[0] is layer
    assert torch.equal(run(precision, model), output)


@needs_library
def test_a_module_without_linear_layers_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="quantizes linear layers, and ReLU has none"):
        BitsandbytesPrecision("nf4").convert_module(nn.ReLU())


@needs_library
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moved_first", [False, True])
def test_what_a_quantized_module_saves_another_one_loads(mode: Any, moved_first: bool) -> None:
    precision = BitsandbytesPrecision(mode)
    model = precision.convert_module(make_model()).to("cpu")
    expected = run(precision, model)
    torch.save(model.state_dict(), "weights.pt")
    other = precision.convert_module(make_model(seed=1))
    if moved_first:
        run(precision, other.to("cpu"))
    other.load_state_dict(torch.load("weights.pt", weights_only=True))
    assert torch.equal(run(precision, other.to("cpu")), expected)


@needs_library
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moved_first", [False, True])
def test_a_quantized_module_loads_full_weights(mode: Any, moved_first: bool) -> None:
    precision = BitsandbytesPrecision(mode)
    expected = run(precision, precision.convert_module(make_model()).to("cpu"))
    other = precision.convert_module(make_model(seed=1))
    if moved_first:
        run(precision, other.to("cpu"))
    other.load_state_dict(make_model().state_dict())
    assert torch.equal(run(precision, other.to("cpu")), expected)


@needs_library
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_modules_built_in_the_init_context_are_quantized(mode: Any) -> None:
    precision = BitsandbytesPrecision(mode)
    with precision.module_init_context():
        model = make_model()

        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        scaled = Scaled(2, 3)
    assert type(nn.Linear(1, 1)).__module__ == "torch.nn.modules.linear"
    assert type(model[0]).__module__.startswith("bitsandbytes")
    assert model[3].weight.dtype is precision.dtype
    assert isinstance(scaled, Scaled)
    assert scaled.weight.shape == (3, 2)
    assert run(precision, model.to("cpu")).dtype is precision.dtype


@needs_library
def test_the_init_context_refuses_ignored_modules() -> None:
    with pytest.raises(RuntimeError, match="can't be used with init_module"):
        BitsandbytesPrecision("nf4", ignore_modules={"head"}).module_init_context()
