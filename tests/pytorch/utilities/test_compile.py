"""LightningModules that torch.compile has wrapped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.pytorch.core.module import LightningModule
from lightning.pytorch.utilities.compile import from_compiled, maybe_unwrap_optimized, to_uncompiled
from lightning.pytorch.utilities.model_helpers import is_overridden


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).sum()  # type: ignore[no-any-return]


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    """The graphs that the backend below was given to compile."""
    yield []
    torch.compiler.reset()


def compiled(model: nn.Module, graphs: list[Any]) -> Any:
    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    return torch.compile(model, backend=backend)


def test_from_compiled_compiles_forward_and_the_steps(graphs: list[Any]) -> None:
    model = Model()
    expected = model.training_step(torch.ones(1, 2), 0)
    assert from_compiled(compiled(model, graphs)) is model
    assert torch.equal(model.training_step(torch.ones(1, 2), 0), expected)
    assert len(graphs) == 1
    model(torch.ones(1, 2))
    assert len(graphs) == 2
    assert list(inspect.signature(model.training_step).parameters) == ["batch", "batch_idx"]


def test_from_compiled_leaves_steps_that_are_not_there_alone(graphs: list[Any]) -> None:
    model = from_compiled(compiled(Model(), graphs))
    assert is_overridden("training_step", model)
    assert not is_overridden("validation_step", model)


def test_to_uncompiled_brings_the_methods_back(graphs: list[Any]) -> None:
    model = Model()
    wrapped = compiled(model, graphs)
    from_compiled(wrapped)
    assert to_uncompiled(model) is model
    assert model.training_step.__func__ is Model.training_step  # type: ignore[attr-defined]
    model.training_step(torch.ones(1, 2), 0)
    assert graphs == []
    assert to_uncompiled(wrapped) is model


def test_to_uncompiled_brings_back_what_was_set_on_the_instance(graphs: list[Any]) -> None:
    def step(batch: Tensor, batch_idx: int) -> Tensor:
        return batch.sum()

    model = Model()
    model.training_step = step  # type: ignore[method-assign]
    to_uncompiled(from_compiled(compiled(model, graphs)))
    assert model.training_step is step


def test_from_compiled_twice_compiles_once(graphs: list[Any]) -> None:
    wrapped = compiled(Model(), graphs)
    from_compiled(wrapped)
    model = from_compiled(wrapped)
    to_uncompiled(model)
    assert "training_step" not in vars(model)


@pytest.mark.parametrize(("make", "name"), [(Model, "Model"), (lambda: 3, "int")])
def test_from_compiled_of_what_is_not_compiled_raises(make: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"got an object of type {name}"):
        from_compiled(make())


def test_other_compiled_modules_raise(graphs: list[Any]) -> None:
    linear = compiled(nn.Linear(1, 1), graphs)
    with pytest.raises(ValueError, match="got a compiled Linear"):
        from_compiled(linear)
    with pytest.raises(TypeError, match="got a compiled Linear"):
        to_uncompiled(linear)


def test_to_uncompiled_of_what_is_not_compiled_raises() -> None:
    with pytest.raises(ValueError, match="this Model is not compiled"):
        to_uncompiled(Model())
    with pytest.raises(ValueError, match="object of type int"):
        to_uncompiled(3)  # type: ignore[arg-type]


def test_maybe_unwrap_optimized(graphs: list[Any]) -> None:
    model = Model()
    assert maybe_unwrap_optimized(model) is model
    assert maybe_unwrap_optimized(compiled(model, graphs)) is model
    with pytest.raises(TypeError, match="object of type int"):
        maybe_unwrap_optimized(3)
