"""Check errors of memory, batches in parts, and values that are not finite on a GPU: ``python tests/gpu/check_memory_cuda.py``.

A plain script that needs torch only. Each check asserts and prints a line. ``--device cpu`` runs what needs no GPU.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.finite import NonFiniteError

WIDTH, LAYERS, BATCH, STEPS = 1024, 8, 4096, 24
ROOM = 160 * 2**20  # bytes that a limited run may take beside weights and optimizer states


def take_much(gradient: Tensor) -> None:
    """Need more memory in the backward pass than there is under a limit."""
    torch.empty(64 * ROOM, dtype=torch.uint8, device=gradient.device)


class Net(LightningModule):
    """Layers whose activations take much more than their weights."""

    def __init__(self, drop: float = 0.0, device: str = "cuda") -> None:
        super().__init__()
        torch.manual_seed(1)
        width = WIDTH if device == "cuda" else 16
        layers = [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(drop)) for _ in range(LAYERS)]
        self.layers = nn.Sequential(*layers)
        self.sizes: list[int] = []
        self.norms: list[Tensor] = []
        self.drawn: list[Tensor] = []
        self.bad = -1
        self.where = "loss"

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.sizes.append(len(batch))
        self.drawn.append(torch.rand((), device=batch.device))
        hidden = self.layers(batch)
        if batch_idx == self.bad and self.where == "module":
            hidden = self.layers(batch * float("inf"))
        loss = hidden.square().mean()
        self.log("loss", loss)
        if batch_idx == self.bad and self.where == "loss":
            loss = loss * float("nan")
        if batch_idx == self.bad and self.where == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        if self.where == "memory":
            loss.register_hook(take_much)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.stack(list(torch._foreach_norm(gradients))))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-4, foreach=True)


class Syncs(Callback):
    """Counts, from the third step to the last but one, how often the host waits for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn" if 2 <= batch_idx < STEPS - 1 else "default")

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter())


def fit(module: Net, device: str, batch: int, count: int = STEPS, **arguments: Any) -> tuple[Trainer, list[str]]:
    """A trainer after a run over batches that lie on the device, and all warnings."""
    width = module.layers[0][0].in_features  # type: ignore[index,union-attr]
    generator = torch.Generator().manual_seed(2)
    data = [torch.randn(batch, width, generator=generator).to(device) for _ in range(2)]
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5, **arguments,
    )  # fmt: skip
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader([data[i % 2] for i in range(count)], batch_size=None))  # type: ignore[arg-type]
    return trainer, [str(warning.message) for warning in caught]


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limited(bytes_more: int) -> Any:
    """Bound what this process may take of the GPU."""
    free()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + bytes_more) / total))


def check_report(place: str) -> None:
    """The error of the GPU's allocator names phase, batch, owners, and what the allocator knows."""
    module = Net()
    module.where = "memory" if place == "backward" else ""
    limited(ROOM + 12 * sum(p.numel() * 4 for p in module.parameters()))
    try:
        fit(module, "cuda", BATCH * (4 if place == "forward" else 1))
    except torch.OutOfMemoryError as error:
        text, cause = str(error), error.__cause__
    else:
        raise AssertionError("memory sufficed")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(text)
    assert isinstance(cause, torch.OutOfMemoryError)
    assert f"Out of memory in the {place} pass" in text, text
    assert "of training (epoch 0, batch 0" in text, text
    assert "CUDA out of memory" in text
    assert f"float32 [{BATCH * (4 if place == 'forward' else 1)}, {WIDTH}]" in text
    assert "cuda:0:" in text
    assert "allocated" in text
    assert "parameters 32.0 MiB" in text, text


def check_parts(precision: str) -> None:
    """Under a limit the gradients are those of the whole batch without one."""
    whole = Net()
    fit(whole, "cuda", BATCH, 6, precision=precision)
    free()
    split = Net()
    weights = sum(p.numel() * 4 for p in split.parameters())
    limited(6 * weights + ROOM)
    try:
        _, told = fit(split, "cuda", BATCH, 6, precision=precision, on_out_of_memory="split_batch")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("Memory ran out, so training batches are run in parts" in text for text in told), told
    assert split.sizes[0] == BATCH
    assert split.sizes[-1] < BATCH
    print(f"    sizes {sorted(set(split.sizes), reverse=True)}, {len(split.sizes)} passes for 6 steps")
    tolerance = 1e-4 if precision == "32-true" else 3e-2
    for one, other in zip(whole.norms, split.norms):
        assert torch.allclose(one, other, rtol=tolerance, atol=1e-6), (one, other)


def check_nothing_changes() -> None:
    """Where memory suffices, the results are the same bits; random numbers of the GPU included."""
    modules = [Net(drop=0.3), Net(drop=0.3), Net(drop=0.3)]
    arguments: list[dict[str, Any]] = [{}, {"on_out_of_memory": "split_batch"}, {"on_nonfinite": "error"}]
    for module, more in zip(modules, arguments):
        fit(module, "cuda", 256, **more)
    for module in modules[1:]:
        assert all(torch.equal(a, b) for a, b in zip(module.norms, modules[0].norms))
        assert all(torch.equal(a, b) for a, b in zip(module.drawn, modules[0].drawn))


def check_search(where: str, device: str) -> None:
    """The error names the place; the second pass draws the same numbers on the device."""
    module = Net(drop=0.3, device=device)
    module.bad, module.where = 3, where
    try:
        fit(module, device, 256, on_nonfinite="error")
    except NonFiniteError as error:
        text = str(error)
    else:
        raise AssertionError("nothing was noticed")
    print(f"    {text}")
    assert "in epoch 0, batch 3 (global step 3)" in text
    assert {"loss": "in the code of `training_step` itself", "module": "is `layers.0.0` (Linear)", "gradient": "the gradient of `layers"}[
        where
    ] in text
    assert torch.equal(module.drawn[3], module.drawn[4])


def check_skip(device: str) -> None:
    module = Net(device=device)
    module.bad, module.where = 3, "gradient"
    before: list[list[Tensor]] = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            states = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
            before.append([t.detach().clone() for t in (*module.parameters(), *states)])

    _, told = fit(module, device, 256, 6, on_nonfinite="skip", callbacks=Copies())
    assert any("The update is left out." in text for text in told), told
    same = [all(torch.equal(a, b) for a, b in zip(one, other)) for one, other in pairwise(before)]
    assert same == [False, False, True, False, False], same


def check_waits(policy: str | None, waits: int) -> None:
    """How often a step waits for the device."""
    syncs = Syncs()
    _, told = fit(Net(), "cuda", 256, on_nonfinite=policy, callbacks=syncs)
    torch.cuda.set_sync_debug_mode("default")
    found = [text for text in told if "called a synchronizing" in text]
    assert len(found) == waits * (STEPS - 3), (policy, len(found), set(found))


def check_deferred_warning() -> None:
    module = Net()
    module.bad = 3
    _, told = fit(module, "cuda", 256, on_nonfinite="warn")
    assert any("The loss is not finite (nan) in epoch 0, batch 3 (global step 3). Its batch is gone" in text for text in told), told
    assert any(f"{STEPS - 3} updates were done that were not finite" in text for text in told), told


def show_cost() -> None:
    """The time of a step with and without checks, beside each other; a figure, not a check."""
    ways: dict[str, dict[str, Any]] = {name: {"on_nonfinite": name} for name in ("error", "warn", "skip")}
    ways = {"none": {}, **ways, "split_batch": {"on_out_of_memory": "split_batch"}}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, arguments in ways.items():
            module = Net()
            module.on_before_optimizer_step = lambda optimizer: None  # type: ignore[method-assign]
            torch.cuda.synchronize()
            start = time.perf_counter()
            fit(module, "cuda", 1024, 200, **arguments)
            torch.cuda.synchronize()
            best[name] = min(best[name], (time.perf_counter() - start) / 200)
    print("    ms of a step, start of the run included: " + ", ".join(f"{name} {value * 1e3:.3f}" for name, value in best.items()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    checks: list[tuple[str, Callable[[], None]]] = []
    checks += [(f"not finite: {where}", partial(check_search, where, device)) for where in ("loss", "module", "gradient")]
    checks += [("not finite: left out", partial(check_skip, device))]
    if device == "cuda":
        checks += [
            (f"waits of on_nonfinite={p}", partial(check_waits, p, n)) for p, n in ((None, 0), ("warn", 0), ("error", 1), ("skip", 1))
        ]
        checks += [("warning that waits for nothing", check_deferred_warning), ("same bits", check_nothing_changes)]
        checks += [(f"report, {place}", partial(check_report, place)) for place in ("forward", "backward")]
        checks += [(f"parts, {precision}", partial(check_parts, precision)) for precision in ("32-true", "bf16-mixed", "16-mixed")]
        checks += [("cost", show_cost)]
    for title, check in checks:
        check()
        free()
        print(f"ok  {title}", flush=True)
    print(f"all {len(checks)} checks passed, torch {torch.__version__}")


if __name__ == "__main__":
    main()
