"""Export a module: TorchScript, ONNX, TensorRT. Each function is a method of LightningModule."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import torch

from lightning.fabric.utilities.apply_func import move_data_to_device

if TYPE_CHECKING:
    from lightning.pytorch.core.module import LightningModule


@contextmanager
def _ready_for_export(module: LightningModule) -> Generator[None, None, None]:
    """Evaluation mode, no gradients, and no trainer to be dragged along; everything is put back afterwards."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    trainer, metrics = module.__dict__["_trainer"], module.__dict__["_metrics"]
    module.eval()
    type(module)._jit_is_scripting = True
    module.trainer = None  # type: ignore[assignment]
    try:
        with torch.no_grad():
            yield
    finally:
        type(module)._jit_is_scripting = False
        module.__dict__["_trainer"], module.__dict__["_metrics"] = trainer, metrics
        for submodule, training in modes.items():
            submodule.training = training


def _example(module: LightningModule, given: Any, method: str, argument: str) -> Any:
    example = module.example_input_array if given is None else given
    if example is None:
        raise ValueError(
            f"`{method}` needs an example input: pass `{argument}=`, or set `self.example_input_array` in {type(module).__qualname__}."
        )
    return move_data_to_device(example, module.device)


def to_torchscript(
    self: LightningModule,
    file_path: Union[str, Path] | None = None,
    method: str | None = "script",
    example_inputs: Any | None = None,
    **kwargs: Any,
) -> Any:
    """Compile the module to TorchScript, in evaluation mode.

    Args:
        file_path: where to save it; None saves nothing.
        method: ``"script"`` compiles the code, ``"trace"`` records one call of ``forward``.
        example_inputs: the input to trace with; None takes ``example_input_array``.
        **kwargs: arguments of :func:`torch.jit.script` or :func:`torch.jit.trace`.

    Returns:
        the ScriptModule.

    Raises:
        ValueError: for another ``method``, or for tracing without an input.
    """
    if method not in ("script", "trace"):
        raise ValueError(f"`to_torchscript(method={method!r})`: accepted are 'script' and 'trace'.")
    if method == "trace":
        example_inputs = _example(self, example_inputs, "to_torchscript(method='trace')", "example_inputs")
    with _ready_for_export(self):
        if method == "script":
            compiled = torch.jit.script(self, **kwargs)
        else:
            compiled = torch.jit.trace(func=self, example_inputs=example_inputs, **kwargs)
    if file_path is not None:
        from lightning.fabric.utilities.cloud_io import get_filesystem

        with get_filesystem(file_path).open(str(file_path), "wb") as file:
            torch.jit.save(compiled, file)
    return compiled


def to_onnx(
    self: LightningModule, file_path: Union[str, Path, Any] | None = None, input_sample: Any | None = None, **kwargs: Any
) -> Any:
    """Export the module to ONNX, in evaluation mode.

    Args:
        file_path: a path or a binary file to write to; may be None with ``dynamo=True``.
        input_sample: arguments of ``forward``; None takes ``example_input_array``.
        **kwargs: arguments of :func:`torch.onnx.export`.

    Returns:
        what :func:`torch.onnx.export` returns: an ``ONNXProgram`` with ``dynamo=True``, else None.

    Raises:
        ModuleNotFoundError: without the package ``onnx``, or, for ``dynamo=True``, ``onnxscript``.
        ValueError: without an input.
    """
    needed = ["onnx"] + (["onnxscript"] if kwargs.get("dynamo", False) else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"`to_onnx` needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if file_path is None and not kwargs.get("dynamo", False):
        raise ValueError("`to_onnx(file_path=None)` is possible with `dynamo=True` only: pass a file path.")
    kwargs.setdefault("dynamo", False)
    example = _example(self, input_sample, "to_onnx", "input_sample")
    with _ready_for_export(self):
        arguments = (example,) if isinstance(example, torch.Tensor) else example
        return torch.onnx.export(self, arguments, str(file_path) if isinstance(file_path, Path) else file_path, **kwargs)


def to_tensorrt(
    self: LightningModule,
    file_path: Union[str, Path] | None = None,
    input_sample: Any | None = None,
    ir: Literal["default", "dynamo", "ts"] = "default",
    output_format: Literal["exported_program", "torchscript"] = "exported_program",
    retrace: bool = False,
    default_device: Union[str, torch.device] = "cuda",
    **compile_kwargs: Any,
) -> Any:
    """Compile the module with Torch-TensorRT, in evaluation mode.

    Args:
        file_path: where to save it; None saves nothing.
        input_sample: arguments of ``forward``; None takes ``example_input_array``.
        ir: the front end of the compiler.
        output_format: the format of the file.
        retrace: whether to export the compiled graph anew before it is saved.
        default_device: where to compile, for a module that is on the CPU.
        **compile_kwargs: arguments of ``torch_tensorrt.compile``.

    Raises:
        ModuleNotFoundError: without the package ``torch_tensorrt``.
        ValueError: without an input.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise ModuleNotFoundError("`to_tensorrt` needs torch_tensorrt: pip install torch-tensorrt")
    import torch_tensorrt

    device = self.device if self.device.type == "cuda" else torch.device(default_device)
    example = _example(self, input_sample, "to_tensorrt", "input_sample")
    example = move_data_to_device([example] if isinstance(example, torch.Tensor) else list(example), device)
    with _ready_for_export(self):
        compiled = torch_tensorrt.compile(self.to(device), ir=ir, inputs=example, **compile_kwargs)
    if file_path is not None:
        torch_tensorrt.save(compiled, str(file_path), inputs=example, output_format=output_format, retrace=retrace)
    return compiled
