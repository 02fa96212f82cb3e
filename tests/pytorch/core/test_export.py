"""Export of modules: TorchScript, ONNX, TensorRT."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    r"ignore:.*isinstance\(treespec, LeafSpec\):FutureWarning",
    "ignore:Saving ONNX model to a BytesIO object is deprecated:DeprecationWarning",
)

INPUT = torch.arange(4.0).reshape(1, 4)


class Inner(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x))  # type: ignore[no-any-return]


class Model(LightningModule):
    """A module in a module, with something that differs between training and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.inner = Inner()
        self.example_input_array = INPUT
        self.inner.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Adds(LightningModule):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y


class TakesDict(LightningModule):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"] + 2 * batch["y"]


PAIR = (torch.ones(1), torch.full((1,), 3.0))
BY_NAME = {"y": PAIR[1], "x": PAIR[0]}


def expected(model: Model) -> Tensor:
    return model.inner.layer(INPUT)  # type: ignore[no-any-return]


# ---- TorchScript -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript_computes_the_same_in_evaluation_mode(method: str, tmp_path: Path) -> None:
    model = Model()
    script = model.to_torchscript(tmp_path / "model.pt", method=method)
    loaded = torch.jit.load(tmp_path / "model.pt")
    for compiled in (script, loaded):
        assert isinstance(compiled, torch.jit.ScriptModule)
        assert not compiled.training
        torch.testing.assert_close(compiled(INPUT), expected(model))


@pytest.mark.filterwarnings("ignore:.*are in evaluation mode at the start of training")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_export_in_mid_run_leaves_the_run_as_it_was(method: str, make_trainer: Callable[..., Any]) -> None:
    class Trained(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before = [module.training for module in self.modules()]
            self.to_torchscript(method=method)
            assert [module.training for module in self.modules()] == before
            assert self.training
            assert not self.inner.training
            assert self.inner.trainer is self.trainer
            self.log("loss", 1.0)
            return self(INPUT).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer()
    trainer.fit(Trained(), DataLoader(range(2)))
    assert trainer.callback_metrics["loss"] == 1
    assert trainer.global_step == 2


def test_a_failed_export_leaves_the_module_as_it_was(make_trainer: Callable[..., Any]) -> None:
    class Unscriptable(Model):
        def forward(self, x: Tensor) -> Tensor:
            return eval("x")  # type: ignore[no-any-return]

    model = Unscriptable()
    model.trainer = make_trainer()
    with pytest.raises(RuntimeError, match="eval"):
        model.to_torchscript()
    assert model.training
    assert model.inner.trainer is model.trainer
    model.trainer = None
    with pytest.raises(RuntimeError, match="is not attached to a `Trainer`"):
        model.inner.trainer  # noqa: B018


@pytest.mark.parametrize("example", [PAIR, list(PAIR), BY_NAME])
def test_tracing_takes_several_arguments_by_place_or_by_name(example: Any) -> None:
    traced = Adds().to_torchscript(method="trace", example_inputs=example)
    assert traced(*PAIR).item() == 7


def test_a_dict_that_names_no_arguments_is_the_argument() -> None:
    traced = TakesDict().to_torchscript(method="trace", example_inputs=BY_NAME, strict=False)
    assert traced(BY_NAME).item() == 7


def test_example_inputs_come_the_way_of_batches() -> None:
    calls: list[str] = []

    class Hooked(Model):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("before")
            return batch

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            calls.append(f"to {device}")
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("after")
            return batch

    Hooked().to_torchscript(method="trace")
    assert calls == ["before", "to cpu", "after"]


def test_arguments_of_torch_are_passed_on() -> None:
    with pytest.raises(TypeError, match="colour"):
        Model().to_torchscript(colour="red")


@pytest.mark.parametrize("method", ["compile", None, "Script"])
def test_another_method_is_refused(method: Any) -> None:
    with pytest.raises(ValueError, match=f"to_torchscript\\(method={method!r}\\)`: accepted are 'script' and 'trace'"):
        Model().to_torchscript(method=method)


def test_tracing_without_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs an example input: pass `example_inputs=`, or set `self.example_input_array` in Adds"):
        Adds().to_torchscript(method="trace")


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def evaluate(file: Any, *inputs: Tensor) -> Tensor:
    """What the exported model computes, by onnx's own interpreter."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(file)
    names = [value.name for value in model.graph.input]
    assert len(names) == len(inputs)
    (result,) = ReferenceEvaluator(model).run(None, {name: value.numpy() for name, value in zip(names, inputs)})
    return torch.from_numpy(result)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_computes_the_same_in_evaluation_mode(dynamo: bool, tmp_path: Path) -> None:
    model = Model()
    program = model.to_onnx(tmp_path / "model.onnx", dynamo=dynamo)
    assert (program is not None) is dynamo
    torch.testing.assert_close(evaluate(tmp_path / "model.onnx", INPUT), expected(model).detach())
    assert model.training


def test_onnx_is_written_to_a_file_that_is_open() -> None:
    file = io.BytesIO()
    model = Model()
    model.to_onnx(file, dynamo=False)
    file.seek(0)
    torch.testing.assert_close(evaluate(file, INPUT), expected(model).detach())


def test_onnx_without_a_file_gives_the_program() -> None:
    assert len(Model().to_onnx().model_proto.graph.output) == 1


@pytest.mark.parametrize("example", [PAIR, BY_NAME])
def test_onnx_takes_several_arguments_by_place_or_by_name(example: Any, tmp_path: Path) -> None:
    Adds().to_onnx(str(tmp_path / "adds.onnx"), example, dynamo=False)
    assert evaluate(tmp_path / "adds.onnx", *PAIR).item() == 7


def test_onnx_without_a_file_needs_the_new_exporter() -> None:
    with pytest.raises(ValueError, match="is possible with `dynamo=True` only: pass a file path"):
        Model().to_onnx(dynamo=False)


def test_onnx_without_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`to_onnx` needs an example input: pass `input_sample=`"):
        Adds().to_onnx("adds.onnx")


@pytest.mark.parametrize(
    ("absent", "dynamo", "named"),
    [
        (["onnx"], False, "onnx: pip install onnx$"),
        (["onnxscript"], True, "onnxscript: pip install onnxscript$"),
        (["onnx", "onnxscript"], True, "onnx and onnxscript: pip install onnx onnxscript$"),
    ],
)
def test_a_missing_package_is_named(absent: list[str], dynamo: bool, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    there = util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else there(name))
    with pytest.raises(ModuleNotFoundError, match=f"`to_onnx` needs {named}"):
        Model().to_onnx("model.onnx", dynamo=dynamo)


# ---- TensorRT --------------------------------------------------------------------------------------------------------


def test_tensorrt_needs_its_package() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install torch-tensorrt"):
        Model().to_tensorrt()


def test_tensorrt_needs_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("torch_tensorrt")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    with pytest.raises(MisconfigurationException, match=r"`to_tensorrt\(default_device='cpu'\)`: TensorRT needs a CUDA device"):
        Model().to_tensorrt(default_device="cpu")
