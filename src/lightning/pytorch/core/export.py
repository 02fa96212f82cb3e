"""Export a module: TorchScript, ONNX, TensorRT. Each function is a method of LightningModule."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import torch

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch.core.module import LightningModule


@contextmanager
def _ready_for_export(module: LightningModule) -> Generator[None, None, None]:
    """Evaluation mode, no gradients, and no trainer to be dragged along; everything is put back afterwards."""
    from lightning.pytorch.core.module import LightningModule

    modes = {submodule: submodule.training for submodule in module.modules()}
    trainer = module.__dict__["_trainer"]
    module.eval()
    LightningModule._jit_is_scripting = True  # submodules may be LightningModules too
    module.trainer = None
    try:
        with torch.no_grad():
            yield
    finally:
        LightningModule._jit_is_scripting = False
        module.trainer = trainer
        for submodule, training in modes.items():
            submodule.training = training


def _example(module: LightningModule, given: Any, method: str, argument: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``forward``, as its batches come: through the hooks, on the module's device."""
    example = module.example_input_array if given is None else given
    if example is None:
        raise ValueError(
            f"`{method}` needs an example input: pass `{argument}=`, or set `self.example_input_array` in {type(module).__qualname__}."
        )
    example = module.on_before_batch_transfer(example, 0)
    example = module.transfer_batch_to_device(example, module.device, 0)
    example = module.on_after_batch_transfer(example, 0)
    if isinstance(example, Mapping) and set(example) <= set(inspect.signature(module.forward).parameters):
        return (), dict(example)  # otherwise the mapping itself is what forward takes
    return tuple(example) if isinstance(example, (list, tuple)) else (example,), {}


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
        arguments, keywords = _example(self, example_inputs, "to_torchscript(method='trace')", "example_inputs")
        kwargs.update({"example_kwarg_inputs": keywords} if keywords else {"example_inputs": arguments})
    with _ready_for_export(self):
        compiled = torch.jit.script(self, **kwargs) if method == "script" else torch.jit.trace(self, **kwargs)
    if file_path is not None:
        from lightning.fabric.utilities.cloud_io import get_filesystem

        with get_filesystem(file_path).open(str(file_path), "wb") as file:
            torch.jit.save(compiled, file)
    return compiled


def to_onnx(self: LightningModule, file_path: Union[str, Path, Any] | None = None, input_sample: Any | None = None, **kwargs: Any) -> Any:
    """Export the module to ONNX, in evaluation mode.

    Args:
        file_path: a path or a binary file to write to; may be None where torch exports with ``dynamo=True``, its default.
        input_sample: arguments of ``forward``: a tensor, a tuple, or a dict; None takes ``example_input_array``.
        **kwargs: arguments of :func:`torch.onnx.export`.

    Returns:
        what :func:`torch.onnx.export` returns: an ``ONNXProgram`` with ``dynamo=True``, else None.

    Raises:
        ModuleNotFoundError: without the package ``onnx``, or, for ``dynamo=True``, ``onnxscript``.
        ValueError: without an input.
    """
    dynamo = kwargs.get("dynamo", inspect.signature(torch.onnx.export).parameters["dynamo"].default)
    needed = ["onnx", "onnxscript"] if dynamo else ["onnx"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"`to_onnx` needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if file_path is None and not dynamo:
        raise ValueError("`to_onnx(file_path=None)` is possible with `dynamo=True` only: pass a file path.")
    arguments, keywords = _example(self, input_sample, "to_onnx", "input_sample")
    if keywords:
        kwargs["kwargs"] = keywords
    with _ready_for_export(self):
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
        MisconfigurationException: if neither the module nor ``default_device`` is on a CUDA device.
        ValueError: without an input.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise ModuleNotFoundError("`to_tensorrt` needs torch_tensorrt: pip install torch-tensorrt")
    device = self.device if self.device.type == "cuda" else torch.device(default_device)
    if device.type != "cuda":
        raise MisconfigurationException(f"`to_tensorrt(default_device={default_device!r})`: TensorRT needs a CUDA device, such as 'cuda'.")
    arguments, keywords = _example(self, input_sample, "to_tensorrt", "input_sample")
    example = move_data_to_device([*arguments, *keywords.values()], device)
    import torch_tensorrt

    with _ready_for_export(self):
        compiled = torch_tensorrt.compile(self.to(device), ir=ir, inputs=example, **compile_kwargs)
    if file_path is not None:
        torch_tensorrt.save(compiled, str(file_path), inputs=example, output_format=output_format, retrace=retrace)
    return compiled
