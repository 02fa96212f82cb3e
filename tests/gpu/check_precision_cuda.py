"""Check accelerators and precisions on a CUDA machine: ``python tests/gpu/check_precision_cuda.py``.

A plain script that needs torch only, so that it runs where nothing can be installed. Each check asserts and prints a line.
``--device cpu`` runs what does not need a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from torch import Tensor, nn

from lightning.fabric.accelerators import CUDAAccelerator, choose_accelerator, find_usable_cuda_devices
from lightning.fabric.accelerators.cuda import get_nvidia_gpu_stats, is_cuda_available, num_cuda_devices
from lightning.fabric.precision import MixedPrecision, Precision, build_precision
from lightning.fabric.utilities.exceptions import MisconfigurationException

STEPS = 60
CLIPS: tuple[tuple[str, float] | None, ...] = (None, ("norm", 0.05), ("value", 0.001))


def make_model(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 16)).to(device, dtype)


def make_batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 64, generator=generator).to(device) for _ in range(STEPS)]
    return [(x, x[:, :16].argmax(1)) for x in inputs]


def train(
    precision: Precision, device: torch.device, fused: bool, clip: tuple[str, float] | None, eps: float = 1e-8
) -> tuple[list[float], list[Tensor]]:
    """Train through the precision, as the Trainer does."""
    model = precision.convert_module(make_model(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=eps, fused=fused)

    def closure(batch: Any) -> Tensor:
        x, y = precision.convert_input(batch)
        with precision.forward_context():
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        precision.backward(precision.pre_backward(loss, model), model)
        precision.unscale_gradients(optimizer)
        if clip is not None:
            precision.clip_gradients(optimizer, clip[1], clip[0])
        return loss

    losses = [
        precision.optimizer_step(optimizer, model=model, closure=lambda batch=batch: closure(batch)).detach()
        for batch in make_batches(device)
    ]
    return [loss.item() for loss in losses], [parameter.detach().clone() for parameter in model.parameters()]


def train_by_hand(device: torch.device, dtype: torch.dtype | None, scale: bool, fused: bool, clip: tuple[str, float] | None) -> Any:
    """The same training, as PyTorch's documentation writes it."""
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=scale)
    losses: list[Tensor] = []
    for x, y in make_batches(device):
        with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip is not None and clip[0] == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), clip[1])
        elif clip is not None:
            nn.utils.clip_grad_value_(model.parameters(), clip[1])
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return [loss.item() for loss in losses], [parameter.detach().clone() for parameter in model.parameters()]


def check_accelerator(device: torch.device) -> None:
    assert is_cuda_available()
    assert num_cuda_devices() == torch.cuda.device_count() == CUDAAccelerator.auto_device_count()
    accelerator = choose_accelerator("auto")
    assert isinstance(accelerator, CUDAAccelerator)
    assert isinstance(choose_accelerator("gpu"), CUDAAccelerator)
    everything = list(range(num_cuda_devices()))
    assert accelerator.parse_devices("auto") == accelerator.parse_devices(-1) == everything
    assert accelerator.get_parallel_devices(accelerator.parse_devices("0,")) == [torch.device("cuda", 0)]
    try:
        accelerator.parse_devices(num_cuda_devices() + 1)
    except MisconfigurationException as error:
        print("   ", error)
    else:
        raise AssertionError("more devices than there are must be refused")
    assert not torch.cuda.is_initialized(), "nothing so far may make a CUDA context"
    accelerator.setup_device(device)
    assert torch.cuda.current_device() == device.index
    assert find_usable_cuda_devices(1) == [0]
    torch.zeros(1, device=device)
    held = torch.ones(1024, device=device)
    assert accelerator.get_device_stats(device)["allocated_bytes.all.current"] >= held.nbytes
    try:
        print("   ", get_nvidia_gpu_stats(device))
    except FileNotFoundError as error:
        print("   ", error)
    accelerator.teardown()


def check_parity(name: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """Losses and weights bit-equal to the hand-written loop, for every optimizer and every way of clipping."""
    ends = {}
    for fused, clip in itertools.product((False, True), CLIPS):
        precision = MixedPrecision(name, device) if dtype else Precision()
        losses, weights = train(precision, device, fused, clip)
        plain_losses, plain_weights = train_by_hand(device, dtype, name == "16-mixed", fused, clip)
        assert losses == plain_losses, (name, fused, clip, losses, plain_losses)
        assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights)), (name, fused, clip)
        assert sum(losses[-5:]) / 5 < 0.9 * losses[0], losses
        ends[fused, clip] = weights[0]
    # Fused and plain updates round differently, and training drifts apart from there: each is held to its own loop above.
    assert not torch.equal(ends[True, None], ends[True, CLIPS[2]])


def check_true(name: str, dtype: torch.dtype, device: torch.device) -> None:
    precision = build_precision(name, device)
    with precision.module_init_context():
        assert nn.Linear(1, 1).weight.dtype is dtype
    for clip in CLIPS:
        # Adam's usual eps is 0 in float16.
        losses, weights = train(precision, device, fused=device.type == "cuda", clip=clip, eps=1e-4)
        assert sum(losses[-5:]) / 5 < 0.9 * losses[0], losses
        assert {weight.dtype for weight in weights} == {dtype}
        assert all(torch.isfinite(weight).all() for weight in weights)
    assert torch.get_default_dtype() is torch.float32


def backward(precision: Precision, model: nn.Module, device: torch.device, factor: float = 1.0) -> None:
    with precision.forward_context():
        loss = model(torch.ones(4, 64, device=device)).float().pow(2).mean() * factor
    precision.backward(precision.pre_backward(loss, model), model)


def check_overflow(device: torch.device) -> None:
    for fused, unscale in itertools.product((False, True), repeat=2):
        model = make_model(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        precision = MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device.type, init_scale=256.0))
        before = model[0].weight.detach().clone()
        backward(precision, model, device, factor=float("inf"))
        if unscale:
            precision.unscale_gradients(optimizer)
        precision.optimizer_step(optimizer)
        assert torch.equal(before, model[0].weight), "an overflow leaves the step out"
        state = precision.state_dict()
        assert state["scale"] == 128.0, state
        optimizer.zero_grad()
        backward(precision, model, device)
        precision.optimizer_step(optimizer)
        assert not torch.equal(before, model[0].weight)
        resumed = MixedPrecision("16-mixed", device)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state


def check_two_optimizers(device: torch.device) -> None:
    """Both clipped before both step: neither is unscaled twice; an overflow of one leaves the other's gradients right."""
    for fused, overflow in itertools.product((False, True), repeat=2):
        first, second, alone = (make_model(device) for _ in range(3))
        optimizers = [torch.optim.AdamW(model.parameters(), fused=fused) for model in (first, second, alone)]
        shared, single = (MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device.type, init_scale=256.0)) for _ in range(2))
        backward(shared, first, device, factor=float("inf") if overflow else 1.0)
        backward(shared, second, device)
        for optimizer in optimizers[:2]:
            shared.clip_gradients(optimizer, 0.01)
        for optimizer in optimizers[:2]:
            shared.optimizer_step(optimizer)
        backward(single, alone, device)
        single.clip_gradients(optimizers[2], 0.01)
        single.optimizer_step(optimizers[2])
        assert torch.equal(second[0].weight, alone[0].weight)
        assert torch.equal(first[0].weight, make_model(device)[0].weight) is overflow


def check_no_sync(device: torch.device) -> None:
    """A step with a fused optimizer and clipping reads nothing back from the GPU, with the scaler either."""
    for name in ("bf16-mixed", "16-mixed", "32-true", "bf16-true", "16-true"):
        precision = build_precision(name, device)
        model = precision.convert_module(make_model(device))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batches = make_batches(device)
        for index, (x, y) in enumerate(batches[:6]):
            torch.cuda.set_sync_debug_mode("error" if index > 1 else "default")
            try:
                x = precision.convert_input(x)
                with precision.forward_context():
                    loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                precision.backward(precision.pre_backward(loss, model), model)
                precision.unscale_gradients(optimizer)
                precision.clip_gradients(optimizer, 0.05)
                precision.optimizer_step(optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def check_quantized(device: torch.device) -> None:
    from lightning.fabric.quantization import BitsandbytesPrecision

    for mode in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"):
        precision = BitsandbytesPrecision(mode)  # type: ignore[arg-type]
        model = precision.convert_module(make_model(torch.device("cpu"))).to(device)
        x = torch.randn(8, 64, device=device)
        with precision.forward_context():
            output = model(precision.convert_input(x))
        error = (output.float() - make_model(device)(x)).abs().mean().item()
        assert error < 0.2, (mode, error)
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save(model.state_dict(), file.name)
            other = precision.convert_module(make_model(torch.device("cpu"))).to(device)
            other.load_state_dict(torch.load(file.name, weights_only=True, map_location="cpu"))
        with precision.forward_context():
            assert torch.equal(other(precision.convert_input(x)), output), mode


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    device = torch.device(parser.parse_args().device)
    torch.use_deterministic_algorithms(False)
    checks: list[tuple[str, Callable[[], None]]] = []
    if device.type == "cuda":
        checks.append(("accelerator", lambda: check_accelerator(device)))
    for name, dtype in (("32-true", None), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)):
        checks.append((f"parity {name}", lambda name=name, dtype=dtype: check_parity(name, dtype, device)))  # type: ignore[misc]
    for name, dtype in (("16-true", torch.float16), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)):
        checks.append((f"true {name}", lambda name=name, dtype=dtype: check_true(name, dtype, device)))  # type: ignore[misc]
    checks += [("overflow", lambda: check_overflow(device)), ("two optimizers", lambda: check_two_optimizers(device))]
    if device.type == "cuda":
        checks.append(("no sync", lambda: check_no_sync(device)))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        print("bitsandbytes is not installed: quantized precisions are not checked")
    else:
        checks.append(("quantized", lambda: check_quantized(device)))
    for title, check in checks:
        check()
        print(f"ok  {title}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"all {len(checks)} checks passed on {where}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
