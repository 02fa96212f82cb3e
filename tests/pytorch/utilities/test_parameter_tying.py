"""Parameters that a module uses in several places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning.pytorch.utilities import find_shared_parameters, set_shared_parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.n = nn.ModuleDict({"c": self.a, "d": nn.Linear(2, 2)})
        self.n["d"].bias = self.b.bias


SHARED = [["a.weight", "b.weight", "n.c.weight"], ["a.bias", "n.c.bias"], ["b.bias", "n.d.bias"]]


def test_every_name_of_a_shared_parameter_is_found() -> None:
    assert find_shared_parameters(Tied()) == SHARED


def test_module_that_shares_nothing() -> None:
    assert find_shared_parameters(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == []


def test_parameters_are_tied_again() -> None:
    module = Tied()
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        path, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(path), attribute, copy.deepcopy(parameter))
    module.n["c"] = nn.Linear(2, 2)
    assert find_shared_parameters(module) == []
    assert set_shared_parameters(module, SHARED) is module
    assert find_shared_parameters(module) == SHARED
    assert module.b.weight is module.a.weight


def test_own_parameter_of_the_module_is_tied() -> None:
    module = nn.Linear(2, 2)
    module.register_parameter("twin", nn.Parameter(torch.zeros(2, 2)))
    set_shared_parameters(module, [["weight", "twin"]])
    assert module.twin is module.weight


def test_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="q"):
        set_shared_parameters(nn.Linear(1, 1), [["weight", "q.weight"]])
