"""Hyperparameters and metrics in the forms that loggers can write."""

from __future__ import annotations

import dataclasses
import enum
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lightning.fabric.utilities.logger import add_prefix, convert_params, flatten_dict, metric_value, plain_data, sanitize_params


@dataclasses.dataclass
class Config:
    width: int = 8
    nested: dict[str, int] = dataclasses.field(default_factory=lambda: {"depth": 2})


class Color(enum.Enum):
    RED = 1


def activation(x: int) -> int:
    return x


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, {}), ({"a": 1}, {"a": 1}), (Namespace(a=1), {"a": 1}), (Config(), {"width": 8, "nested": {"depth": 2}})],
)
def test_convert_params_takes_every_kind_of_named_values(given: Any, expected: dict[str, Any]) -> None:
    assert convert_params(given) == expected


def test_convert_params_does_not_share_the_dict_with_the_caller() -> None:
    params = {"a": 1}
    convert_params(params)["b"] = 2
    assert params == {"a": 1}


@pytest.mark.parametrize("given", [[1], "text", 3, Config])
def test_convert_params_refuses_values_without_names(given: Any) -> None:
    with pytest.raises(TypeError, match="`params` must be a dict"):
        convert_params(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"a": {"b": {"c": 1}}, "d": 2}, {"a/b/c": 1, "d": 2}),
        ({"a": Namespace(x=1)}, {"a/x": 1}),
        ({"a": Config()}, {"a/width": 8, "a/nested/depth": 2}),
        ({1: {2: 3}}, {"1/2": 3}),
        ({"a": [1, {"x": 2}], "b": {}}, {"a": [1, {"x": 2}]}),
        ({"a": Config}, {"a": Config}),
    ],
)
def test_flatten_dict_names_values_by_their_path(given: dict[Any, Any], expected: dict[str, Any]) -> None:
    assert flatten_dict(given) == expected


def test_flatten_dict_takes_another_delimiter() -> None:
    assert flatten_dict({"a": {"b": 1}}, delimiter=".") == {"a.b": 1}


def test_sanitize_params_leaves_numbers_and_writes_the_rest_as_text() -> None:
    given = {
        "int": 1, "float": 0.5, "bool": True, "str": "x", "none": None, "list": [1], "path": Path("a/b"), "enum": Color.RED,
        "np_float": np.float64(2), "np_int": np.int64(1), "scalar": torch.tensor(1.5), "vector": torch.zeros(2),
        "function": activation, "class": Config, "module": torch.nn.ReLU(),
    }  # fmt: skip
    assert sanitize_params(given) == {
        "int": 1, "float": 0.5, "bool": True, "str": "x", "none": "None", "list": "[1]", "path": "a/b", "enum": "Color.RED",
        "np_float": 2.0, "np_int": 1, "scalar": 1.5, "vector": "tensor([0., 0.])",
        "function": f"{__name__}.activation", "class": f"{__name__}.Config", "module": "ReLU()",
    }  # fmt: skip


def test_plain_data_survives_yaml_and_json_unchanged() -> None:
    given = {
        "tuple": (1, (2,)), "set": {"b", "a"}, "path": Path("a"), "enum": Color.RED, "tensor": torch.tensor([1, 2]), "config": Config(),
        "namespace": Namespace(a=Namespace(b=1)), "np": np.float32(0.5), "function": activation, "none": None, "ä": "ö\n",
        "omega": OmegaConf.create({"a": 1, "b": "${a}", "c": ["${a}", 2]}), "nan": float("inf"), Color.RED: 1,
    }  # fmt: skip
    expected = {
        "tuple": [1, [2]], "set": ["a", "b"], "path": "a", "enum": "Color.RED", "tensor": "tensor([1, 2])",
        "config": {"width": 8, "nested": {"depth": 2}}, "namespace": {"a": {"b": 1}}, "np": 0.5, "function": f"{__name__}.activation",
        "none": None, "ä": "ö\n", "omega": {"a": 1, "b": 1, "c": [1, 2]}, "nan": float("inf"), "Color.RED": 1,
    }  # fmt: skip
    plain = plain_data(given)
    assert plain == expected
    assert yaml.safe_load(yaml.safe_dump(plain)) == expected
    assert json.loads(json.dumps(plain)) == expected


def test_plain_data_keeps_interpolations_that_cannot_be_resolved() -> None:
    assert plain_data({"c": OmegaConf.create({"a": "${nowhere}", "b": "???"})}) == {"c": {"a": "${nowhere}", "b": "???"}}


@pytest.mark.parametrize(
    ("value", "number"), [(0.5, 0.5), (torch.tensor(2), 2), (torch.tensor([1.5]), 1.5), (np.float32(0.5), 0.5), ("text", "text")]
)
def test_metric_value_is_a_python_number(value: Any, number: Any) -> None:
    assert metric_value("loss", value) == number
    assert type(metric_value("loss", value)) is type(number)


def test_metric_value_names_the_metric_with_several_elements() -> None:
    with pytest.raises(ValueError, match=r"'val/acc' is a tensor of shape \(2, 3\)"):
        metric_value("val/acc", torch.zeros(2, 3))


def test_add_prefix_changes_nothing_without_a_prefix() -> None:
    assert add_prefix({"a": 1}, "p", "-") == {"p-a": 1}
    assert add_prefix({"a": 1}, "", "-") == {"a": 1}
