from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from lightning.fabric import precision
from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.precision import (
    POLICIES,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    are_of_one_gpu,
    build_precision,
    clip_grad_norm,
    parse_precision,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException

HALVES = [("16-true", torch.float16), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)]


# -- names --


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "32-true"), (32, "32-true"), ("32", "32-true"), (64, "64-true"), ("64", "64-true"), *[(name, name) for name in POLICIES]],
)
def test_parse_precision_gives_the_canonical_name(value: Any, name: str) -> None:
    assert parse_precision(value) == name


@pytest.mark.parametrize(("value", "name"), [(16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
def test_parse_precision_warns_of_names_that_leave_mixed_or_true_open(value: Any, name: str) -> None:
    with pytest.warns(UserWarning, match=f"Write '{name}'"):
        assert parse_precision(value) == name


@pytest.mark.parametrize("value", ["half", 8, "fp32", "BF16", True, 16.0, ["16"], torch.float16, ""])
def test_parse_precision_lists_what_is_accepted(value: Any) -> None:
    with pytest.raises(ValueError, match=r"is not known. Accepted: '32-true'.*'bf16-mixed'.*also 16, 32, 64, 'bf16'"):
        parse_precision(value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, Precision),
        (32, Precision),
        ("64-true", DoublePrecision),
        ("16-true", HalfPrecision),
        ("bf16-true", HalfPrecision),
        ("bf16-mixed", MixedPrecision),
    ],
)
@pytest.mark.parametrize("accelerator", ["cpu", torch.device("cpu"), CPUAccelerator()])
def test_build_precision_chooses_the_class(name: Any, kind: type, accelerator: Any) -> None:
    precision = build_precision(name, accelerator)
    assert type(precision) is kind
    assert precision.precision == precision.policy.name == parse_precision(name)


def test_build_precision_takes_bfloat16_for_float16_on_the_cpu_and_says_so() -> None:
    with pytest.warns(UserWarning, match="'bf16-mixed' is used"):
        assert build_precision("16-mixed", "cpu").precision == "bf16-mixed"


def test_build_precision_keeps_float16_on_a_gpu_and_makes_no_scaler_yet() -> None:
    precision = build_precision("16-mixed", "gpu")  # a scaler for an absent device would warn, which is an error here
    assert isinstance(precision, MixedPrecision)
    assert (precision.precision, precision.device) == ("16-mixed", "cuda")


def test_build_precision_refuses_float64_on_mps() -> None:
    with pytest.raises(MisconfigurationException, match="MPS, which has no float64"):
        build_precision(64, "mps")


def test_build_precision_returns_the_plugin_and_refuses_a_second_choice() -> None:
    plugin = HalfPrecision("bf16-true")
    assert build_precision(None, "cpu", plugin) is plugin
    with pytest.raises(ValueError, match="precision='bf16-mixed' and the plugin HalfPrecision"):
        build_precision("bf16-mixed", "cpu", plugin)


def test_constructors_refuse_other_precisions() -> None:
    with pytest.raises(ValueError, match=r"MixedPrecision\(precision='32'\)"):
        MixedPrecision("32", "cpu")
    with pytest.raises(ValueError, match=r"HalfPrecision\(precision='32'\)"):
        HalfPrecision("32")
    with pytest.raises(MisconfigurationException, match="bf16-mixed' scales no gradients"):
        MixedPrecision("bf16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


# -- contexts --


def test_forward_context_of_32_bit_is_one_shared_object() -> None:
    assert Precision().forward_context() is Precision().forward_context()
    with Precision().forward_context():
        assert torch.get_default_dtype() is torch.float32
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("name", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_forward_context_of_mixed_is_autocast_every_time(name: str, dtype: torch.dtype) -> None:
    precision = MixedPrecision(name, "cpu")
    context = precision.forward_context()
    assert precision.forward_context() is context
    layer = nn.Linear(2, 2)
    for _ in range(3):
        with precision.train_step_context():
            assert layer(torch.ones(1, 2)).dtype is dtype
            assert torch.get_default_dtype() is torch.float32
        assert layer(torch.ones(1, 2)).dtype is torch.float32


def test_forward_context_of_mixed_is_right_when_nested() -> None:
    context = MixedPrecision("bf16-mixed", "cpu").forward_context()
    with context:
        with torch.autocast("cpu", enabled=False):
            assert not torch.is_autocast_enabled("cpu")
            with context:
                assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_forward_context_of_mixed_is_left_when_the_step_raises() -> None:
    precision = MixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(RuntimeError, match="boom"):
        with precision.forward_context():
            raise RuntimeError("boom")
    assert not torch.is_autocast_enabled("cpu")
    with precision.forward_context():
        assert torch.is_autocast_enabled("cpu")


def test_forward_context_of_mixed_serves_several_threads_at_once() -> None:
    context = MixedPrecision("bf16-mixed", "cpu").forward_context()
    states: list[bool] = []

    def work() -> None:
        with context:
            states.append(torch.is_autocast_enabled("cpu"))
        states.append(torch.is_autocast_enabled("cpu"))

    with context:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert states == [True, False]
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_context_manager_is_a_new_one() -> None:
    context = MixedPrecision("bf16-mixed", "cpu").autocast_context_manager()
    assert isinstance(context, torch.autocast)
    with context:
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_contexts_of_true_precisions_set_the_default_dtype(name: str, dtype: torch.dtype) -> None:
    precision = build_precision(name, "cpu")
    for context in (precision.module_init_context(), precision.tensor_init_context(), precision.forward_context()):
        with context:
            assert nn.Linear(1, 1).weight.dtype is torch.zeros(1).dtype is dtype
            with context:
                pass
            assert torch.get_default_dtype() is dtype
        assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("name", ["32-true", "16-true", "64-true", "bf16-mixed"])
def test_precisions_can_be_copied_and_pickled(name: str) -> None:
    precision = build_precision(name, "cpu")
    with precision.forward_context():
        for other in (copy.deepcopy(precision), pickle.loads(pickle.dumps(precision))):
            assert other.precision == name
            with other.forward_context():
                pass


# -- conversions --


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_convert_module_converts_floating_point_and_leaves_the_rest(name: str, dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("wave", torch.tensor([1j]))
    module.register_buffer("flags", torch.tensor([True]))
    tied = module[0].weight
    converted = build_precision(name, "cpu").convert_module(module)
    assert converted is module
    assert {k: v.dtype for k, v in module.state_dict().items()} == {
        "0.weight": dtype,
        "0.bias": dtype,
        "1.weight": dtype,
        "1.bias": dtype,
        "1.running_mean": dtype,
        "1.running_var": dtype,
        "1.num_batches_tracked": torch.int64,
        "wave": torch.complex64,
        "flags": torch.bool,
    }
    assert module.wave.imag == 1
    assert module[0].weight is tied, "an optimizer that was built before keeps its parameters"


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_convert_module_keeps_full_parameters(name: str) -> None:
    assert build_precision(name, "cpu").convert_module(nn.Linear(1, 1)).weight.dtype is torch.float32


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_convert_input_converts_floating_point_tensors_of_a_batch(name: str, dtype: torch.dtype) -> None:
    batch = {"x": torch.zeros(1), "half": [torch.zeros(1, dtype=torch.float16)], "y": torch.zeros(1, dtype=torch.long), "s": "text"}
    converted = build_precision(name, "cpu").convert_input(batch)
    assert converted["x"].dtype is converted["half"][0].dtype is dtype
    assert converted["y"].dtype is torch.long
    assert converted["s"] == "text"


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_convert_input_leaves_the_batch_alone_where_parameters_are_full(name: str) -> None:
    batch = {"x": torch.zeros(1, dtype=torch.float64)}
    assert build_precision(name, "cpu").convert_input(batch) is batch


@pytest.mark.parametrize("name", ["16-true", "64-true", "bf16-mixed"])
def test_convert_output_gives_the_default_dtype(name: str) -> None:
    output = build_precision(name, "cpu").convert_output((torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.int8)))
    assert [tensor.dtype for tensor in output] == [torch.float32, torch.int8]


@pytest.mark.parametrize(("name", "dtype"), [*HALVES, ("32-true", torch.float32)])
def test_a_true_precision_trains(name: str, dtype: torch.dtype) -> None:
    precision = build_precision(name, "cpu")
    module = precision.convert_module(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module.weight.detach().clone()

    def closure() -> torch.Tensor:
        with precision.forward_context():
            loss = module(precision.convert_input(torch.ones(2, 4))).pow(2).sum()
        precision.backward(precision.pre_backward(loss, module), module)
        return precision.post_backward(loss, module)

    loss = precision.optimizer_step(optimizer, model=module, closure=closure)
    assert loss.dtype is dtype
    assert not torch.equal(before, module.weight)
    assert precision.state_dict() == {}


def test_backward_takes_an_optimizer_and_passes_the_rest_on() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    Precision().backward((weight * 3).sum(), None, optimizer, retain_graph=True)
    Precision().backward(weight * 3, None, gradient=torch.tensor([1.0, 0.0]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0, 3.0]


# -- clipping --


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("on_one_gpu", [False, True])
def test_clipping_by_norm_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, max_norm: float, on_one_gpu: bool) -> None:
    monkeypatch.setattr(precision, "are_of_one_gpu", lambda tensors: on_one_gpu)
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.zeros(size, size)) for size in (3, 40, 7)] + [nn.Parameter(torch.zeros(2))]
    theirs = copy.deepcopy(ours)
    for parameter, other in zip(ours[:3], theirs):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        other.grad = parameter.grad.clone()
    clip_grad_norm(iter(ours), max_norm)
    nn.utils.clip_grad_norm_(theirs, max_norm)
    assert ours[3].grad is None
    for a, b in zip(ours[:3], theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_gradients_of_the_cpu_or_none_at_all_are_clipped_by_torch() -> None:
    assert not are_of_one_gpu([])
    assert not are_of_one_gpu([torch.ones(1)])
    clip_grad_norm([nn.Parameter(torch.ones(1))], 1.0)
