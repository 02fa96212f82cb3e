"""Steps that can't be replayed run as always, and say why; ``compile="default"`` and collecting garbage on a schedule."""

from __future__ import annotations

import gc
import random
import re
from typing import Any

import torch
from torch import Tensor

import lightning.pytorch as L

from .common import Check, Place, assert_equal, deterministic
from .compiled import Run, Task, close, data_of, recorders, seeded_task, trained, weights_of
from .running_ahead import STEP_AND_EPOCH


class Reads(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss.item() > 100 else loss  # the line that is named


class Selects(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0]
        positive = images[(images > 0).nonzero(as_tuple=True)]  # as many as there are
        return super().training_step(batch, batch_idx) + 0 * positive.mean()


class Counts(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 if batch_idx % 2 else 0.5)


class Appends(Task):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.detach())
        return loss


class Throws(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (0.5 + random.random())


class Changes(Task):
    """An attribute that the step reads has another value in each batch."""

    factor = 1.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor

    def on_train_batch_end(self, *_: Any) -> None:
        self.factor *= 0.5


class ChangesOnce(Changes):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.factor = 1.0 if self.current_epoch == 0 else 0.25


class OnHost(torch.optim.SGD):
    """An optimizer that counts its steps on the host, and steps less and less."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.01, fused=True)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 0.01 / self.steps
        return super().step(closure)


class HostOptimizer(Task):
    def configure_optimizers(self) -> Any:
        return OnHost(self.parameters())


class Waits(Task):
    """What no warning of torch tells of, and no recording can hold."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        torch.cuda.synchronize()  # the line that is named
        return loss


class Refuses(Task):
    """An error of Python's own, while a recording goes on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not in a recording")  # the line that is named
        return loss


class ReadsBackward(Task):
    """A read from the device in autograd's own thread."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(lambda gradient: gradient if gradient.sum().item() > 0 else None)
        return loss


class FromHost(Task):
    """A tensor on the host is moved to the device in the middle of the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.tensor([0.5, 2.0]).to(loss.device).mean()


# What: (module, a pattern of the reason, whether the line has to be named, whether only CUDA shows it)
FALLBACKS: dict[str, tuple[type[Task], str, bool, bool]] = {
    "item() in the step": (Reads, "reads from the device.*loss.item", True, False),
    "shapes that depend on data": (Selects, "reads from the device.*images > 0", True, False),
    "batch_idx is used": (Counts, "batch_idx.*batch_idx % 2", True, False),
    "a list on the host grows": (Appends, "changes `self.seen", False, False),
    "random numbers on the host": (Throws, "random numbers on the host", False, False),
    "an attribute changes again and again": (Changes, "self.factor.*again and again", False, False),
    "an optimizer that counts on the host": (HostOptimizer, "OnHost changes", False, False),
    "the step waits for the device": (Waits, "can't be recorded.*torch.cuda.synchronize", True, True),
    "an error while recording": (Refuses, "can't be recorded.*not in a recording", True, True),
    "backward reads from the device": (ReadsBackward, "reads from the device|can't be recorded", False, True),
    "a tensor comes from the host": (FromHost, "reads from the device|can't be recorded", False, True),
}


def checks(place: Place) -> list[Check]:
    return [
        *((f"falls back: {name}", lambda n=name: falls_back(place, *FALLBACKS[n])) for name in FALLBACKS),
        ("recorded anew: an attribute changes once", lambda: changes_once(place)),
        ("eight kinds of steps are replayed, more are not", lambda: many_shapes(place)),
        ("no warning but ours, as errors", lambda: warnings_are_errors(place)),
        ('a module compiled by torch.compile inside of compile="step"', lambda: compiled_inside(place)),
        ('compile="default"', lambda: default(place, "default")),
        ('compile with torch.compile and "step"', lambda: default(place, {"step": True, "dynamic": False})),
        ("garbage is collected between batches only", lambda: garbage(place)),
    ]


def falls_back(place: Place, kind: type[Task], pattern: str, named: bool, needs_cuda: bool) -> str:
    """It says why once, trains as without, and leaves CUDA as it was, random numbers too."""
    if needs_cuda:
        place.require_cuda()
    runs, numbers = [], []
    with deterministic():
        for compile in (None, "step"):
            random.seed(0)
            torch.manual_seed(0)
            module = kind(dropout=0.3, log=STEP_AND_EPOCH)
            runs.append(trained(place, module, data_of(place), compile))
            numbers.append(torch.rand(3, device=place.device))
    eager, replayed = runs
    assert len(replayed.told) == 1, replayed.told
    assert re.search(pattern, replayed.told[0], re.DOTALL), replayed.told[0]
    assert not named or "fallbacks.py:" in replayed.told[0], f"no line is named: {replayed.told[0]}"
    assert not eager.told
    assert_equal(replayed.losses, [loss.item() for loss in eager.losses], weights_of(replayed.module), weights_of(eager.module))
    assert replayed.rows == eager.rows
    assert torch.equal(*numbers), f"random numbers after the run differ: {numbers}"
    allocates_as_before(place)
    after = trained(place, seeded_task(dropout=0.3), data_of(place), "step")  # another module in the same process
    assert not after.told, after.told
    assert after.replays >= 25, after.replays
    return replayed.told[0]


def allocates_as_before(place: Place) -> None:
    """After a recording that failed, memory that several streams used is taken back, and what is cached can be given back."""
    if not place.is_cuda:
        return
    gc.collect()
    torch.cuda.synchronize()
    before, other = torch.cuda.memory_allocated(), torch.cuda.Stream()
    for _ in range(3):
        block = torch.zeros(2**24, device=place.device)
        block.record_stream(other)
        del block
        torch.cuda.synchronize()
    small = torch.zeros(1, device=place.device)  # allocating is when blocks are taken back
    assert torch.cuda.memory_allocated() - before < 2**25, "blocks that a second stream used are never taken back"
    del small
    torch.cuda.empty_cache()


def changes_once(place: Place) -> str:
    runs = []
    with deterministic():
        for compile in (None, "step"):
            torch.manual_seed(0)
            runs.append(trained(place, ChangesOnce(), data_of(place), compile))
    assert not runs[1].told, runs[1].told
    same_end(*runs)
    assert runs[1].recordings == 2, runs[1].recordings
    return f"{runs[1].recordings} recordings, {runs[1].replays} replays"


def same_end(eager: Run, other: Run) -> None:
    assert_equal(other.losses, [loss.item() for loss in eager.losses], weights_of(other.module), weights_of(eager.module))


def many_shapes(place: Place) -> str:
    runs = []
    with deterministic():
        for compile in (None, "step"):
            data = data_of(place, 12)
            data.data = [(x[: 10 + index], y[: 10 + index]) for index, (x, y) in enumerate(data.data)]
            runs.append(trained(place, seeded_task(log=STEP_AND_EPOCH), data, compile, max_epochs=5))
    assert len(runs[1].told) == 1, runs[1].told
    assert "8 kinds" in runs[1].told[0], runs[1].told
    same_end(*runs)
    assert runs[1].recordings == 8, runs[1].recordings
    return f"{runs[1].recordings} recordings, {runs[1].replays} replays of 60 batches"


def warnings_are_errors(place: Place) -> None:
    """A program that turns warnings into errors can use it."""
    import warnings

    with recorders(place) as made, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*num_workers|.*log_every_n_steps")
        place.trainer(compile="step", max_epochs=2).fit(seeded_task(log=STEP_AND_EPOCH), data_of(place), data_of(place, 2))
    assert made[-1].replays >= 15, made[-1].replays


class Compiled(Task):
    """Its network is compiled by the user."""

    def __init__(self, inside: bool) -> None:
        super().__init__("mlp")
        if inside:
            self.net.compile()


def compiled_inside(place: Place) -> str:
    place.require_cuda()
    runs = []
    for inside, compile in ((False, None), (True, "step")):
        torch.manual_seed(0)
        runs.append(trained(place, Compiled(inside), data_of(place), compile))
    torch._dynamo.reset()
    assert not runs[1].told, runs[1].told
    assert runs[1].replays >= 25, runs[1].replays
    close(runs[1], runs[0], 1e-2)
    return f"{runs[1].replays} replays"


def default(place: Place, compile: Any) -> str:
    """The same but for rounding, and nothing is compiled after the first epoch."""
    from torch._dynamo.utils import counters

    if compile != "default":
        place.require_cuda()
    compiled: list[int] = []

    class Count(L.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            compiled.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    chosen: Any = compile if place.is_cuda else {"backend": "aot_eager"}  # a compiler for the CPU takes its time
    runs = []
    for each in (None, chosen):
        module, val = seeded_task(net="mlp", log=STEP_AND_EPOCH, schedule="step"), data_of(place, 2)
        callbacks = [Count()] if each is not None else []
        runs.append(trained(place, module, data_of(place), each, val=val, max_epochs=4, callbacks=callbacks, gradient_clip_val=0.5))
    torch._dynamo.reset()
    assert not runs[1].told, runs[1].told
    assert list(runs[0].module.state_dict()) == list(runs[1].module.state_dict())
    close(runs[1], runs[0], 1e-2)
    keys = [list(row) for _, row in runs[1].rows]
    assert keys == [list(row) for _, row in runs[0].rows]
    assert compiled[0] > 0, compiled
    assert compiled[1:] == compiled[1:2] * 3, f"compiled so far, at the end of each epoch: {compiled}"
    if compile != "default" and not runs[1].replays:
        raise AssertionError("nothing was replayed")
    return f"graphs at the end of each epoch: {compiled}, {runs[1].replays} replays"


def garbage(place: Place) -> str:
    """Automatic collection is off in a run, and there are as many collections as asked for, none inside of a step."""
    inside, found, was = [False], [0, 0], gc.isenabled()

    class Steps(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inside[0] = True
            cycles: list[Any] = []
            for _ in range(2000):  # of which Python would collect some
                cycle: list[Any] = []
                cycle.append(cycle)
                cycles.append(cycle)
            loss = super().training_step(batch, batch_idx)
            inside[0] = False
            return loss

    def heard(phase: str, info: Any) -> None:
        if phase == "start":
            found[inside[0]] += 1

    module = Steps("mlp")
    gc.callbacks.append(heard)
    try:
        place.trainer(max_epochs=1, gc_interval=4).fit(module, data_of(place, 12))
    finally:
        gc.callbacks.remove(heard)
    assert found[1] == 0, f"{found[1]} collections inside of steps"
    assert found[0] >= 3, found
    assert gc.isenabled() == was
    return f"{found[0]} collections"
