"""What all strategies on XLA devices share: when work is sent to the device, and how modules and checkpoints get there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning.fabric.accelerators.xla import has_torch_xla
from lightning.fabric.plugins.io.xla import on_cpu
from lightning.fabric.strategies.strategy import Strategy


class XLADeviceStrategy(Strategy):
    """On XLA devices operations are recorded, and run when the record is sent to the device: after each optimizer step and each batch.

    What one process reads by itself, such as a metric for a progress bar, is read between these points, so that the programs of
    all processes stay the same.
    """

    has_inference_mode = False
    _seed: int | None = None  # that of the device's random numbers

    def setup_environment(self) -> None:
        """Make the device ready; its random numbers follow the seed of ``torch.manual_seed``, which does not reach it by itself."""
        super().setup_environment()
        if torch.initial_seed() != self._seed:
            import torch_xla

            self._seed = torch.initial_seed()
            torch_xla.manual_seed(self._seed % 2**63, str(self.root_device))

    def compile_with(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None) -> None:
        if compiler is not None:
            raise ValueError("XLA compiles each step by itself: leave out `compile`.")
        super().compile_with(compiler)

    def module_to_device(self, module: Module) -> None:
        """Move the module; weights that layers share stay shared."""
        move_module(module, self.root_device)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Return the batch on the device. What was recorded for the last one is sent off before."""
        sync()
        return super().batch_to_device(batch, device, dataloader_idx)

    def backward(self, tensor: Tensor, module: Module | None = None, *args: Any, **kwargs: Any) -> None:
        """Run backward on a scalar.

        Raises:
            RuntimeError: if this process, or the one that it was forked from, has computed gradients before it used an XLA device.
        """
        try:
            super().backward(tensor, module, *args, **kwargs)
        except RuntimeError as error:
            if "device_ready_queues_" not in str(error):
                raise
            raise RuntimeError(
                "PyTorch has looked for devices when this program first computed gradients, and there was no XLA device in use. Train on "
                "XLA devices in a program, or a notebook kernel, that has trained on nothing else before."
            ) from error

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer with a closure that computes the gradients, and send all of it to the device."""
        result = super().optimizer_step(optimizer, closure, **kwargs)
        sync()
        return result

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint of CPU tensors; every process must call it."""
        sync()
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(on_cpu(checkpoint), filepath, storage_options=storage_options)

    def teardown(self) -> None:
        if self.module is not None:
            move_module(self.module, torch.device("cpu"))
        super().teardown()


def require_torch_xla(what: str) -> None:
    """Refuse to go on without torch_xla.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    if not has_torch_xla():
        raise ModuleNotFoundError(f'{what} needs the package torch_xla: `pip install "torch_xla[tpu]"`.')


def sync() -> None:
    """Send what was recorded to the device. The host goes on at once."""
    import torch_xla

    torch_xla.sync()


def current_device() -> torch.device:
    """The device of this process, or thread."""
    import torch_xla

    return torch_xla.device()  # type: ignore[no-any-return]


def move_module(module: Module, device: torch.device) -> None:
    """Move a module. Its parameters stay the objects that they are: for layers that share them, and for optimizers."""
    # Between the CPU and XLA, `Module.to` would make a new parameter in each place that has one.
    outer = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(outer)


def as_device_data(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, as an argument of programs; zeros and ones would else become a part of them."""
    import torch_xla.core.xla_model as xm

    return xm.send_cpu_data_to_device([tensor], device)[0]  # type: ignore[no-any-return]
