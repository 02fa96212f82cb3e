"""What an error says when memory has run out: doing what, with which batch, and who holds the memory.

Nothing of this runs before the error. What the run was doing is read from the error's traceback.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning.pytorch.loops.replay import tensors_in
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.memory import is_cuda_out_of_memory, is_out_of_cpu_memory

if TYPE_CHECKING:
    from lightning.pytorch.trainer.trainer import Trainer

MIB = 2**20
LARGEST = 8  # tensors that are named
SHOWN = 8  # tensors of a batch that are described
HEAD = "Out of memory"

TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent)

FETCHING, MOVING = "fetching a batch", "moving a batch to its device"

# What a frame of the traceback means, by the end of its file and its function; the innermost one that means something counts.
PHASES = {
    (f"{TORCH}/_tensor.py", "backward"): "the backward pass",
    (f"{TORCH}/autograd/__init__.py", "backward"): "the backward pass",
    (f"{TORCH}/autograd/__init__.py", "grad"): "the backward pass",
    (f"{TORCH}/nn/utils/clip_grad.py", ""): "clipping gradients",
    (f"{TORCH}/optim/", ""): "the optimizer step",
    (f"{HERE}/fit.py", "closure"): "a hook of the step",
    (f"{HERE}/splitting.py", "closure"): "a hook of the step",
    (f"{HERE}/batches.py", ""): FETCHING,
    (f"{TORCH}/utils/data/", ""): FETCHING,
    (f"{HERE}/bind.py", "through_hooks"): MOVING,
    ("fabric/utilities/apply_func.py", "move_data_to_device"): MOVING,
    ("", "batch_to_device"): MOVING,
    ("", "configure_model"): "`configure_model`",
    ("", "setup_module"): "setting up the module",
    ("pytorch/checkpoint.py", ""): "saving or loading a checkpoint",
    ("", "save_checkpoint"): "saving a checkpoint",
    ("", "load_checkpoint"): "loading a checkpoint",
}
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
STAGES = {
    RunningStage.TRAINING: "training", RunningStage.VALIDATING: "validation", RunningStage.SANITY_CHECKING: "the sanity check",
    RunningStage.TESTING: "testing", RunningStage.PREDICTING: "prediction",
}  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the machine, is not enough."""
    libraries = isinstance(error, RuntimeError) and "STATUS_ALLOC_FAILED" in str(error)  # cuBLAS and cuDNN
    return libraries or is_cuda_out_of_memory(error) or is_out_of_cpu_memory(error)


def explained(trainer: Trainer, error: BaseException) -> BaseException:
    """An error of the same type that says more, if memory has run out; else ``error`` itself.

    Call it before anything is torn down, and raise what it returns ``from`` the error that it was given.
    """
    if not isinstance(error, Exception) or not is_out_of_memory(error) or str(error).startswith(HEAD):
        return error
    try:
        more = type(error)(report(trainer, error))
    except Exception:  # above all there may be no memory for it
        return error
    return more


def report(trainer: Trainer, error: BaseException) -> str:
    """The text of such an error."""
    frames = list(frames_of(error))
    doing = phase(frames)
    batch, batch_idx = batch_in(frames, doing)
    lines = [f"{HEAD} in {doing} of {where(trainer, batch_idx)}.", f"The first cause: {first_line(error)}"]
    if batch is not None:
        lines.append(f"The batch: {described(batch)}.")
    device = trainer.strategy.root_device
    held = holders(trainer, batch, device)
    totals: dict[str, int] = {}
    alike: dict[str, list[int]] = {}
    for size, kind, name in held:
        totals[kind] = totals.get(kind, 0) + size
        alike.setdefault(name, []).append(size)
    lines.append("Held in tensors: " + ", ".join(f"{kind} {mib(size)}" for kind, size in totals.items()) + ".")
    if device.type == "cuda":
        lines.append(told_by_cuda(device, sum(totals.values())))
    lines.append("The largest of them:")
    for name, sizes in sorted(alike.items(), key=lambda entry: sum(entry[1]), reverse=True)[:LARGEST]:
        lines.append(f"  {mib(sum(sizes)):>14}  {name}" + (f", {len(sizes)} times" if len(sizes) > 1 else ""))
    lines.append(advice(trainer))
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """What the allocator said, with the number of bytes that it tried to get."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ---- what the run was doing ------------------------------------------------------------------------------------------


def frames_of(error: BaseException) -> Iterator[FrameType]:
    """The frames of the traceback, and of those of its causes, from the outermost to the innermost."""
    seen: BaseException | None = error
    while seen is not None:
        traceback = seen.__traceback__
        while traceback is not None:
            yield traceback.tb_frame
            traceback = traceback.tb_next
        seen = seen.__cause__


def phase(frames: list[FrameType]) -> str:
    """What was being done, as the innermost frame with a meaning tells."""
    for frame in reversed(frames):
        file, function = frame.f_code.co_filename.replace("\\", "/"), frame.f_code.co_name
        if function in STEPS:
            return f"the forward pass (`{function}`)"
        for (place, name), meaning in PHASES.items():
            if place in file and name in ("", function) and (place or name):
                return meaning
    return "a step"


def batch_in(frames: list[FrameType], doing: str) -> tuple[Any, int | None]:
    """The batch that the innermost loop was working on, or the part of it, and its number where the frame knows it."""
    if doing == FETCHING:
        return None, None
    for frame in reversed(frames):
        if frame.f_code.co_filename.startswith(HERE):
            for name in ("raw", "batch") if doing == MOVING else ("part", "batch"):
                if name in frame.f_locals:
                    return frame.f_locals[name], frame.f_locals.get("batch_idx")
    return None, None


def where(trainer: Trainer, batch_idx: int | None) -> str:
    """The stage of the run and its position."""
    stage = trainer.state.stage
    if stage is None or trainer.state.fn is None:
        return "the run"
    progress = trainer.fit_loop.progress
    if stage is RunningStage.TRAINING:
        return f"training (epoch {progress.epoch}, batch {progress.batch_idx}, global step {progress.global_step})"
    at = [f"batch {batch_idx}"] if batch_idx is not None else []
    if trainer.state.fn is TrainerFn.FITTING:
        at = [f"epoch {progress.epoch}", *at, f"global step {progress.global_step}"]
    return STAGES[stage] + (f" ({', '.join(at)})" if at else "")


def described(batch: Any) -> str:
    """The shapes and dtypes of the tensors of a batch."""
    tensors = tensors_in(batch)
    if not tensors:
        return f"a {type(batch).__name__} without tensors"
    parts = [f"{path + ': ' if path else ''}{shape_of(tensor)}, {mib(size_of(tensor))}" for path, tensor in tensors[:SHOWN]]
    return "; ".join(parts) + (f"; and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else "")


def shape_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# ---- who holds the memory --------------------------------------------------------------------------------------------


def holders(trainer: Trainer, batch: Any, device: torch.device) -> list[tuple[int, str, str]]:
    """Bytes, kind and name of each tensor on the device that can be found, memory that several share counted once."""
    seen: set[int] = set()
    held: list[tuple[int, str, str]] = []
    for kind, name, tensor in owned(trainer, batch):
        storage = storage_of(tensor, device)
        if storage is not None and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append((storage.nbytes(), kind, f"{name}: {shape_of(tensor)}"))
    return held


def owned(trainer: Trainer, batch: Any) -> Iterator[tuple[str, str, Tensor]]:
    """All tensors that are known by name, then all others that Python can see, which are mostly activations."""
    module, names = trainer.lightning_module, dict[Tensor, str]()
    for name, parameter in module.named_parameters() if module is not None else ():
        names[parameter] = name
        yield "parameters", f"parameter `{name}`", parameter
    for trained, name in names.items():
        if trained.grad is not None:
            yield "gradients", f"gradient of `{name}`", trained.grad
    for optimizer in trainer.strategy.optimizers:
        for owner, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    yield "optimizer states", f"`{key}` of `{names.get(owner, '?')}` in {type(optimizer).__name__}", value
    for name, buffer in module.named_buffers() if module is not None else ():
        yield "buffers", f"buffer `{name}`", buffer
    for path, tensor in tensors_in(batch):
        yield "the batch", f"`batch{path}`", tensor
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            yield "others (activations and the like)", "other", thing


def storage_of(tensor: Tensor, device: torch.device) -> Any:
    """The memory of a tensor, or of the part of it that this process holds; None if it lies elsewhere, or nowhere."""
    from lightning.fabric.strategies.sharding import local_tensor

    try:
        tensor = local_tensor(tensor)
        if tensor.device != device or tensor.layout is not torch.strided or tensor.dim() == 0:  # one number does not matter
            return None
        storage = tensor.untyped_storage()
        return storage if storage.nbytes() > 0 and storage.data_ptr() else None
    except Exception:  # kinds of tensors that have no memory of their own, or no shape yet
        return None


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"


def told_by_cuda(device: torch.device, named: int) -> str:
    """What the allocator of the device knows."""
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    rest = f"; {mib(allocated - named)} of that in tensors that only autograd holds" if allocated > named else ""
    return (
        f"{device}: {mib(allocated)} allocated{rest}; {mib(reserved)} reserved by this process; {mib(free)} of {mib(total)} free. "
        "(Much reserved that is not allocated means fragments: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.)"
    )


def advice(trainer: Trainer) -> str:
    """What helps."""
    if trainer.state.stage is not RunningStage.TRAINING:
        return "What helps: smaller batches in this loader, or a lower precision."
    split = "" if trainer._config.on_out_of_memory == "split_batch" else '`Trainer(on_out_of_memory="split_batch")`, '
    return (
        f"What helps: {split}smaller batches with `accumulate_grad_batches`, `precision='bf16-mixed'`, activation checkpointing, "
        "or a strategy that shards, such as `strategy='fsdp'`."
    )
