from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_summary import (
    LayerSummary,
    ModelSummary,
    get_formatted_model_size,
    get_human_readable_count,
    parse_batch_shape,
    summarize,
)


class Net(LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
        self.head = nn.Linear(144, 10)
        self.scale = nn.Parameter(torch.ones(3))
        self.head.bias.requires_grad = False
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


class Calling(LightningModule):
    """Calls ``function(self, *args)`` as its forward."""

    def __init__(self, function: Any, example: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.example_input_array = example
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


TABLE = """\
  | Name         | Type        | Params | Mode  | FLOPs | In sizes     | Out sizes
----------------------------------------------------------------------------------------
0 | conv         | Sequential  | 48     | train | 5.2 K | [2, 1, 8, 8] | [2, 4, 6, 6]
1 | conv.0       | Conv2d      | 40     | train | 5.2 K | [2, 1, 8, 8] | [2, 4, 6, 6]
2 | conv.1       | ReLU        | 0      | train | 0     | [2, 4, 6, 6] | [2, 4, 6, 6]
3 | conv.2       | BatchNorm2d | 8      | train | 0     | [2, 4, 6, 6] | [2, 4, 6, 6]
4 | head         | Linear      | 1.4 K  | train | 5.8 K | [2, 144]     | [2, 10]
  | other params | n/a         | 3      | n/a   | n/a   | n/a          | n/a
----------------------------------------------------------------------------------------
1.5 K     Trainable params
10        Non-trainable params
1.5 K     Total params
0.006     Total estimated model params size (MB)
5         Modules in train mode
0         Modules in eval mode
10.9 K    Total FLOPs"""


def test_table_shows_layers_and_totals() -> None:
    summary = summarize(Net(torch.zeros(2, 1, 8, 8)), max_depth=-1)
    assert str(summary) == repr(summary) == TABLE


def test_table_without_example_has_no_sizes() -> None:
    header, _, *rows = str(summarize(Net())).splitlines()
    assert header.split(" | ") == [" ", "Name        ", "Type      ", "Params", "Mode ", "FLOPs"]
    assert rows[0] == "0 | conv         | Sequential | 48     | train | 0"


def test_attributes_hold_what_the_table_shows() -> None:
    summary = summarize(Net(torch.zeros(2, 1, 8, 8)))
    assert [name for name, _ in summary.named_modules] == summary.layer_names == ["conv", "head"]
    assert summary.layer_types == ["Sequential", "Linear"]
    assert summary.in_sizes == [[2, 1, 8, 8], [2, 144]]
    assert summary.out_sizes == [[2, 4, 6, 6], [2, 10]]
    assert summary.param_nums == [48, 1450]
    assert summary.training_modes == [True, True]
    assert summary.total_training_modes == {"train": 5, "eval": 0}
    assert (summary.total_parameters, summary.trainable_parameters, summary.total_layer_params) == (1501, 1491, 1498)
    assert summary.model_size == pytest.approx(0.006004)
    assert summary.total_flops == 5184 + 5760
    assert {name: sum(counts.values()) for name, counts in summary.flop_counts.items()} == {"conv": 5184, "head": 5760}


@pytest.mark.parametrize(
    ("max_depth", "names"),
    [
        (0, []),
        (1, ["conv", "head"]),
        (2, ["conv", "conv.0", "conv.1", "conv.2", "head"]),
        (-1, ["conv", "conv.0", "conv.1", "conv.2", "head"]),
    ],
)
def test_max_depth_limits_the_layers_but_not_the_totals(max_depth: int, names: list[str]) -> None:
    summary = summarize(Net(), max_depth=max_depth)
    assert summary.layer_names == names
    assert (summary.total_parameters, sum(summary.total_training_modes.values())) == (1501, 5)
    leftover = next(line for line in str(summary).splitlines() if "other params" in line)
    assert leftover.split("|")[3].strip() == ("1.5 K" if max_depth == 0 else "3")


@pytest.mark.parametrize("max_depth", [-2, "1", 1.5, None])
def test_wrong_max_depth_raises(max_depth: Any) -> None:
    with pytest.raises(ValueError, match=r"ModelSummary\(`max_depth`\) must be -1"):
        ModelSummary(Net(), max_depth=max_depth)


@pytest.mark.parametrize(
    "example",
    [(torch.zeros(2, 3), torch.zeros(2, 4)), {"x": torch.zeros(2, 3), "y": torch.zeros(2, 4)}],
    ids=["tuple", "dict"],
)
def test_example_is_spread_over_the_arguments(example: Any) -> None:
    model = Calling(lambda self, x, y: self.layer(x, y), example, layer=nn.Bilinear(3, 4, 5))
    summary = summarize(model)
    assert summary.in_sizes == [[[2, 3], [2, 4]]]
    assert summary.out_sizes == [[2, 5]]


def test_nested_outputs_and_keyword_inputs_have_sizes() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return self.plain(input=self.rnn(x)[0])

    model = Calling(forward, torch.zeros(2, 7, 3), rnn=nn.LSTM(3, 5, batch_first=True), plain=nn.Linear(5, 1), unused=nn.Linear(1, 1))
    summary = summarize(model)
    assert summary.in_sizes == [[2, 7, 3], [2, 7, 5], "?"]
    assert summary.out_sizes == [[[2, 7, 5], [[1, 2, 5], [1, 2, 5]]], [2, 7, 1], "?"]


def test_layer_that_is_called_twice_keeps_its_first_sizes_and_counts_both() -> None:
    model = Calling(lambda self, x: self.layer(self.layer(x)[:1]), torch.zeros(3, 8), layer=nn.Linear(8, 8))
    summary = summarize(model)
    assert summary.in_sizes == [[3, 8]]
    assert summary.total_flops == 2 * 8 * 8 * 3 + 2 * 8 * 8


def test_example_runs_in_eval_mode_without_gradients_and_leaves_modes_and_random_states() -> None:
    seen = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append((self.training, self.norm.training, self.drop.training, torch.is_grad_enabled()))
        torch.rand(1), random.random(), np.random.rand()
        return self.drop(self.norm(x))

    model = Calling(forward, torch.rand(2, 3), norm=nn.BatchNorm1d(3), drop=nn.Dropout())
    model.norm.eval()
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    summary = summarize(model)
    assert seen == [(False, False, False, False)]
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index,union-attr]
    assert summary.training_modes == [False, True]
    assert summary.total_training_modes == {"train": 1, "eval": 1}


def test_forward_that_raises_leaves_no_hooks_and_the_modes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.used(x)
        raise RuntimeError("no forward")

    model = Calling(forward, torch.zeros(3, 5), used=nn.Linear(5, 2), unused=nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="no forward"):
        summarize(model)
    assert model.training
    assert [len(module._forward_hooks) for module in model.modules()] == [0, 0, 0]


def test_no_hooks_stay_after_a_summary() -> None:
    model = Net(torch.zeros(2, 1, 8, 8))
    summarize(model, max_depth=-1)
    assert not any(module._forward_hooks for module in model.modules())


def test_summary_is_taken_when_it_is_first_needed_and_again_on_request() -> None:
    model = Net()
    summary = ModelSummary(model)
    model.extra = nn.Linear(1, 1)
    assert summary.layer_names == ["conv", "head", "extra"]
    model.another = nn.Linear(1, 1)
    assert summary.layer_names == ["conv", "head", "extra"]
    assert list(summary.summarize()) == summary.layer_names == ["conv", "head", "extra", "another"]


def test_shared_layers_and_weights_count_once() -> None:
    first = nn.Linear(8, 8)
    model = Calling(None, None, a=first, b=first, c=nn.Linear(8, 8))
    model.c.weight = first.weight
    summary = summarize(model)
    assert summary.layer_names == ["a", "c"]
    assert summary.param_nums == [72, 72]
    assert summary.total_parameters == summary.total_layer_params == 80
    assert "other params" not in str(summary)


def test_parameters_of_nested_modules_are_not_left_over() -> None:
    inner = nn.Sequential(nn.Linear(4, 4))
    inner.lone = nn.Parameter(torch.zeros(7))
    model = Calling(None, None, outer=nn.Sequential(inner))
    model.own = nn.Parameter(torch.zeros(1000))
    for max_depth in (1, 2, 3, -1):
        summary = summarize(model, max_depth=max_depth)
        assert summary.total_layer_params == 27
        assert "  | other params | n/a        | 1.0 K  | n/a   | n/a" in str(summary)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)])
def test_size_is_that_of_the_parameters_precision(dtype: torch.dtype, size: int) -> None:
    assert summarize(Calling(None, None, layer=nn.Linear(1000, 999)).to(dtype)).model_size == pytest.approx(0.999999 * size, rel=1e-2)


def test_lazy_parameters_warn_and_count_as_none() -> None:
    model = Calling(lambda self, x: self.lazy(x), None, lazy=nn.LazyLinear(5), plain=nn.Linear(5, 2))
    with pytest.warns(UserWarning, match="lazy parameters, whose sizes are not known yet"):
        summary = summarize(model)
    assert summary.param_nums == [0, 12]
    assert summary.model_size == pytest.approx(48e-6)
    assert "| LazyLinear | 0      |" in str(summary)


def test_lazy_parameters_are_initialized_by_the_example() -> None:
    summary = summarize(Calling(lambda self, x: self.lazy(x), torch.zeros(2, 3), lazy=nn.LazyLinear(5)))
    assert summary.param_nums == [20]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_modules_have_parameters_and_no_sizes() -> None:
    model = Calling(lambda self, x: self.script(x), torch.zeros(3, 5), script=torch.jit.script(nn.Linear(5, 2)))
    summary = summarize(model)
    assert (summary.param_nums, summary.in_sizes, summary.out_sizes) == ([12], ["?"], ["?"])
    assert summary.layer_types == ["RecursiveScriptModule"]


def test_compiled_layers_are_summarized_without_compiling_them() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    first, second = torch.compile(nn.Linear(5, 2), backend=backend), nn.Linear(2, 2)
    second.compile(backend=backend)
    model = Calling(lambda self, x: self.second(self.first(x)), torch.zeros(3, 5), first=first, second=second)
    summary = summarize(model)
    assert (summary.param_nums, summary.out_sizes) == ([12, 6], [[3, 2], [3, 2]])
    assert summary.total_flops == 2 * 3 * 5 * 2 + 2 * 3 * 2 * 2
    assert not graphs
    model(torch.zeros(3, 5))
    assert graphs


def test_empty_model_is_an_empty_table() -> None:
    summary = summarize(LightningModule())
    assert (summary.layer_names, summary.total_parameters, summary.model_size, summary.total_flops) == ([], 0, 0.0, 0)
    assert str(summary).splitlines()[0] == "  | Name | Type | Params | Mode | FLOPs"


def test_layer_summary_watches_the_first_forward_pass_alone() -> None:
    layer = nn.Linear(3, 2)
    summary = LayerSummary(layer)
    assert (summary.in_size, summary.out_size) == ("?", "?")
    layer(torch.zeros(5, 3))
    layer(torch.zeros(7, 3))
    assert (summary.in_size, summary.out_size) == ([5, 3], [5, 2])
    assert not layer._forward_hooks


def test_layer_summary_detached_or_gone_leaves_no_hook() -> None:
    layer = nn.Linear(3, 2)
    summary = LayerSummary(layer)
    assert layer._forward_hooks
    summary.detach_hook()
    summary.detach_hook()
    assert not layer._forward_hooks
    another = LayerSummary(layer)
    del another
    gc.collect()
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0  "),
        (999, "999  "),
        (1000, "1.0 K"),
        (12345, "12.3 K"),
        (99_940, "99.9 K"),
        (999_999, "999 K"),
        (123_456_789, "123 M"),
        (3e9, "3.0 B"),
        (4e14, "400 T"),
        (5e15, "5,000 T"),
    ],
)
def test_counts_are_readable(number: int, text: str) -> None:
    assert get_human_readable_count(number) == text


def test_negative_count_raises() -> None:
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        get_human_readable_count(-1)


def test_sizes_have_three_decimals() -> None:
    assert [get_formatted_model_size(size) for size in (0, 0.0001, 1.23456, 1234.5)] == ["0.000", "0.000", "1.235", "1,234.500"]


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        (torch.zeros(2, 3), [2, 3]),
        (torch.tensor(1.0), []),
        (np.zeros((4, 1)), [4, 1]),
        ([torch.zeros(2), (torch.zeros(3), None)], [[2], [[3], "?"]]),
        ({"a": torch.zeros(3)}, "?"),
        ("text", "?"),
        ([], []),
    ],
)
def test_batch_shapes(batch: Any, shape: Any) -> None:
    assert parse_batch_shape(batch) == shape
