"""``Trainer(compile="step")`` does what steps do without it, bit by bit, and waits for nothing."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning.pytorch as L
from lightning.pytorch.loops import graph_recording

from .common import NETS, Batches, Check, Place, assert_equal, batches, deterministic
from .running_ahead import STEP_AND_EPOCH, Guard, Rows

RATE = 2**-8  # exact in single precision, in which a device keeps it, as are its halves
WARM_UP = 2  # steps of a kind before it is recorded


# ---- what is trained ----------------------------------------------------------------------------------------------


class Task(L.LightningModule):
    """A small network for 8 x 8 images, whose step leaves no trace on the host.

    Args:
        net: ``"mlp"`` or ``"conv"``.
        dropout: before the last layer.
        log: keywords for ``self.log`` of the loss; None logs nothing.
        schedule: halve the learning rate every few of these: ``"step"`` or ``"epoch"``.
        flags: of AdamW; None for those that a recording needs.
    """

    def __init__(
        self,
        net: str = "conv",
        dropout: float = 0.0,
        log: dict[str, Any] | None = None,
        schedule: str | None = None,
        flags: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = NETS[net](dropout)
        self.log_options, self.schedule, self.flags = log, schedule, flags

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.log_options is not None:
            self.log("loss", loss, **self.log_options)
            self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        on_cuda = next(self.parameters()).is_cuda
        flags = {"fused": True, "capturable": on_cuda} if self.flags is None else self.flags
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, **flags)
        if self.schedule is None:
            return optimizer
        every = 3 if self.schedule == "step" else 1
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, every, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}


class Losses(L.Callback):
    """Keeps the losses, as somebody would who does not know that steps are replayed."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])


class Ema(L.Callback):
    """An exponential moving average of the weights, updated after each batch."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.average = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        torch._foreach_lerp_(self.average, [p.detach() for p in module.parameters()], 0.1)

    def seen(self) -> list[Tensor]:
        return self.average


class Hooks(L.Callback):
    """Looks at gradients inside of the step, and changes them."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.calls: list[str] = []

    def on_before_zero_grad(self, *_: Any) -> None:
        self.calls.append("zero")

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.calls.append("backward")

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.calls.append("after")
        self.norms.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]).clone())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.calls.append("step")
        for parameter in module.parameters():
            parameter.grad.mul_(0.5)

    def seen(self) -> list[Tensor]:
        return self.norms


class Rates(L.Callback):
    """What everybody sees as the learning rate."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        assert isinstance(rate, float), f"the learning rate is a {type(rate).__name__}"
        self.rates.append(rate)

    def seen(self) -> list[Tensor]:
        return [torch.tensor(rate) for rate in self.rates]


def data_of(place: Place, count: int = 10, smaller: bool = False) -> Batches:
    """Batches in pinned memory; the last one may be smaller."""
    data = batches(count, pin=place.is_cuda)
    if smaller:
        x, y = data.data[-1]
        data.data[-1] = (x[:7].pin_memory(), y[:7].pin_memory()) if place.is_cuda else (x[:7], y[:7])
    return data


# ---- runs ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorders(place: Place) -> Iterator[list[Any]]:
    """Inside of it, recorders count; gives those that were made. On the CPU a stand-in for CUDA graphs records."""
    made: list[Any] = []
    if place.is_cuda:

        class Counted(graph_recording.CudaRecorder):
            recordings = replays = 0

            def begin(self) -> None:
                self.recordings += 1
                super().begin()

            def end(self) -> Callable[[], Any]:
                replay = super().end()

                def counted() -> None:
                    self.replays += 1
                    replay()

                return counted

        kind: Any = Counted
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))
        from tape import TapeRecorder

        def kind(device: torch.device) -> Any:
            return TapeRecorder()

    own = graph_recording.recorder_of

    def recorder_of(device: torch.device) -> Any:
        made.append(kind(device))
        return made[-1]

    graph_recording.recorder_of = recorder_of
    try:
        yield made
    finally:
        graph_recording.recorder_of = own


@dataclass
class Run:
    """What a fit has left."""

    trainer: L.Trainer
    module: Any
    losses: list[Tensor]
    rows: list[Any]
    told: list[str] = field(default_factory=list)
    replays: int = 0
    recordings: int = 0


def trained(
    place: Place, module: Any, data: Any, compile: Any, precision: str | None = "32-true", val: Any = None, path: Any = None, **options: Any
) -> Run:
    """A fit from the same random numbers on."""
    losses, rows = Losses(), Rows()
    options = {"max_epochs": 3, "logger": rows, "log_every_n_steps": 2, **options}
    options["callbacks"] = [*options.get("callbacks", ()), losses]
    torch.manual_seed(1)
    with recorders(place) as made, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = place.trainer(precision, compile=compile, **options)
        trainer.fit(module, data, val, ckpt_path=path)
    told = [str(each.message) for each in caught if "compile='step'" in str(each.message)]
    place.synchronize()
    run = Run(trainer, module, losses.losses, rows.rows, told)
    if made:
        run.replays, run.recordings = made[-1].replays, made[-1].recordings
    return run


def weights_of(module: Any) -> list[Tensor]:
    return [value.detach().cpu().clone() for value in module.state_dict().values()]


def states_of(run: Run) -> list[Tensor]:
    """What the optimizer keeps."""
    return [torch.as_tensor(value).cpu() for state in run.trainer.optimizers[0].state.values() for _, value in sorted(state.items())]


def same(eager: Run, replayed: Run) -> None:
    """Losses, weights, optimizer states and what loggers got are equal bit by bit."""
    assert_equal(replayed.losses, [loss.item() for loss in eager.losses], weights_of(replayed.module), weights_of(eager.module))
    for ours, theirs in zip(states_of(replayed), states_of(eager), strict=True):
        assert torch.equal(ours, theirs), "optimizer states differ"
    assert replayed.rows == eager.rows, next((a, b) for a, b in zip([*replayed.rows, None], [*eager.rows, None]) if a != b)
    ours, theirs = ({key: float(value) for key, value in run.trainer.callback_metrics.items()} for run in (replayed, eager))
    assert ours == theirs, (ours, theirs)
    flags = [{name: group.get(name) for name in ("fused", "capturable")} for group in replayed.trainer.optimizers[0].param_groups]
    given = [{name: group.get(name) for name in ("fused", "capturable")} for group in eager.trainer.optimizers[0].param_groups]
    assert flags == given, (flags, given)
    theirs, ours = (run.trainer.precision_plugin.state_dict() for run in (eager, replayed))
    assert ours == theirs, (ours, theirs)


# ---- equal --------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One kind of run.

    Args:
        task: arguments of the module.
        options: arguments of the trainer.
        precision: of the trainer.
        smaller: whether the last batch is.
        least: how many replays there must be.
        watch: makes a callback with ``seen()``, of which both runs must be equal.
        val: whether there are validation batches.
        scaler: arguments of a scaler for 16-mixed.
    """

    task: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    smaller: bool = False
    least: int = 25
    watch: Callable[[], Any] | None = None
    val: bool = False
    scaler: dict[str, Any] | None = None


NORM, VALUE = {"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
LOG = {"log": STEP_AND_EPOCH}
CASES = {
    "bare": Case(),
    "logs on step and epoch": Case(LOG),
    "accumulation": Case(options={"accumulate_grad_batches": 2}, least=20),
    "accumulation, last window incomplete": Case(LOG, {"accumulate_grad_batches": 4, **NORM}, least=8),
    "clipping by norm": Case(options=NORM),
    "clipping by value": Case(options=VALUE),
    "16-mixed": Case(precision="16-mixed"),
    "16-mixed, clipping, accumulation, logs": Case(LOG, {"accumulate_grad_batches": 2, **NORM}, "16-mixed", least=20),
    "16-mixed, overflows": Case(LOG, precision="16-mixed", scaler={"init_scale": 2.0**24, "growth_interval": 2}),
    "16-mixed, overflows, clipping": Case(LOG, NORM, "16-mixed", scaler={"init_scale": 2.0**24, "growth_interval": 2}),
    "bf16-mixed": Case(precision="bf16-mixed"),
    "bf16-mixed, clipping by norm": Case(options=NORM, precision="bf16-mixed"),
    "dropout": Case({"dropout": 0.3}),
    "dropout, bf16-mixed, accumulation": Case({"dropout": 0.3}, {"accumulate_grad_batches": 2}, "bf16-mixed", least=20),
    "last batch smaller": Case(LOG, smaller=True, least=20),
    "last batch smaller, dropout, accumulation": Case({"dropout": 0.3, **LOG}, {"accumulate_grad_batches": 3}, smaller=True, least=8),
    "scheduler per step": Case({"schedule": "step", **LOG}, watch=Rates),
    "scheduler per epoch": Case({"schedule": "epoch", **LOG}, watch=Rates),
    "hooks inside of the step": Case(LOG, NORM, watch=Hooks),
    "hooks inside of the step, 16-mixed": Case(LOG, NORM, "16-mixed", watch=Hooks),
    "average of the weights": Case(watch=Ema),
    "validation between": Case(LOG, {"val_check_interval": 3}, val=True),
    "validation between, dropout, EMA": Case({"dropout": 0.3}, {"val_check_interval": 4}, val=True, watch=Ema),
    "garbage on a schedule": Case(LOG, {"gc_interval": 3}),
    "hooks inside of the step, validation between": Case(LOG, {**NORM, "val_check_interval": 3}, watch=Hooks, val=True),
    "copies beside steps": Case(LOG, {"overlap_transfer": True}, smaller=True, least=20),
}  # fmt: skip


def checks(place: Place) -> list[Check]:
    return [
        *((f"replayed as eager: {name}", lambda n=name: equal(place, CASES[n])) for name in CASES),
        ("dropout differs from step to step", lambda: dropout_differs(place)),
        ("flags of the optimizer are set where the user left them open", lambda: flags_are_set(place)),
        ("an optimizer that is not fused, by another rate in each step", lambda: sgd(place)),
        *(
            (f"resumed in the middle: {who}", lambda w=who: resumed(place, *w))
            for who in (("step", "step"), ("step", None), (None, "step"))
        ),
        *((f"no read from the device while replaying: {name}", lambda n=name: no_read(place, CASES[n])) for name in GUARDED),
        ("a second fit with the same trainer", lambda: fitted_twice(place)),
        ("peak memory of replayed steps", lambda: peak_memory(place)),
        ("launches of a replayed step", lambda: launches(place)),
        *((f"memory of batches while the host runs ahead: {name}", lambda o=o: running_ahead(place, o)) for name, o in AHEAD.items()),
    ]


RESUMED = (("step", "step"), ("step", None), (None, "step"))
GUARDED = (
    "bare", "logs on step and epoch", "accumulation, last window incomplete", "clipping by value", "16-mixed, clipping, accumulation, logs",
    "bf16-mixed, clipping by norm", "dropout", "last batch smaller", "scheduler per step",
)  # fmt: skip


def runs_of(place: Place, case: Case) -> tuple[Run, Run, list[Any]]:
    """The same run without and with replays."""
    found, watched = [], []
    for compile in (None, "step"):
        torch.manual_seed(0)
        module, callbacks = Task(**case.task), []
        if case.watch is not None:
            callbacks.append(case.watch())
        val = data_of(place, 2) if case.val else None
        data = data_of(place, smaller=case.smaller)
        options = {"precision": case.precision, **case.options}
        if case.scaler is not None:
            options |= place.scaled(**case.scaler)
        found.append(trained(place, module, data, compile, val=val, callbacks=callbacks, **options))
        watched.append(callbacks)
    return found[0], found[1], watched


def equal(place: Place, case: Case) -> str:
    with deterministic():
        eager, replayed, watched = runs_of(place, case)
    assert not replayed.told, replayed.told
    assert replayed.replays >= case.least, f"{replayed.replays} replays of {replayed.recordings} recordings"
    same(eager, replayed)
    if case.watch is not None:
        theirs, ours = (callbacks[0].seen() for callbacks in watched)
        assert len(ours) == len(theirs) > 0
        for index, (a, b) in enumerate(zip(ours, theirs)):
            assert torch.equal(a, b), f"what the callback saw differs at {index}: {a}, {b}"
        assert getattr(watched[0][0], "calls", None) == getattr(watched[1][0], "calls", None), "hooks ran in another order"
    return f"{len(replayed.losses)} batches, {replayed.recordings} recordings, {replayed.replays} replays"


def dropout_differs(place: Place) -> str:
    """One batch again and again, at a learning rate of 0: only dropout changes the loss."""
    torch.manual_seed(0)
    module, data = Task("mlp", dropout=0.5), data_of(place, 1)
    data = Batches(data.data * 12)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), 0.0, fused=True)  # type: ignore[method-assign]
    run = trained(place, module, data, "step", max_epochs=1)
    assert not run.told, run.told
    values = {loss.item() for loss in run.losses}
    assert run.replays >= 9, run.replays
    assert len(values) == 12, f"{len(values)} different losses in 12 steps"
    return f"{run.replays} replays, {len(values)} different losses"


def flags_are_set(place: Place) -> str:
    """During the run the groups have what a recording needs; what is saved, and what is left, is what the user gave."""
    saved: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            group = trainer.optimizers[0].state_dict()["param_groups"][0]
            used = trainer.optimizers[0].param_groups[0]
            saved.append((group["fused"], group["capturable"], used["fused"], used["capturable"]))

    torch.manual_seed(0)
    run = trained(place, Task("mlp", flags={}), data_of(place), "step", callbacks=[Look()])
    assert not run.told, run.told
    assert run.replays >= 25, run.replays
    assert saved[-1] == (None, False, True, place.is_cuda), saved[-1]
    group = run.trainer.optimizers[0].param_groups[0]
    assert (group["fused"], group["capturable"]) == (None, False), group
    eager = trained(place, seeded_task(net="mlp", flags={}), data_of(place), None)
    close(run, eager)
    return "fused, capturable" if place.is_cuda else "fused"


def seeded_task(**options: Any) -> Task:
    torch.manual_seed(0)
    return Task(**options)


def close(run: Run, other: Run, tolerance: float = 2e-3) -> None:
    """The same but for rounding."""
    for ours, theirs in zip(weights_of(run.module), weights_of(other.module), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def sgd(place: Place) -> str:
    """Without ``capturable``, and with a rate that no float32 holds exactly."""
    runs = []
    for compile in (None, "step"):
        module = seeded_task(net="mlp")

        def optimizers(module: Any = module) -> Any:
            optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97), "interval": "step"}]

        module.configure_optimizers = optimizers  # type: ignore[method-assign]
        runs.append(trained(place, module, data_of(place), compile, callbacks=[Rates()]))
    assert not runs[1].told, runs[1].told
    assert runs[1].replays >= 25, runs[1].replays
    close(runs[1], runs[0])
    return f"{runs[1].replays} replays"


# ---- checkpoints --------------------------------------------------------------------------------------------------


class SaveAt(L.Callback):
    """Saves a checkpoint in the middle of an epoch."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def resumed(place: Place, first: str | None, then: str | None) -> str:
    """Saved with one setting and resumed with another, it ends where a run ends that was never interrupted."""
    with deterministic(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "middle.ckpt")
        options = {"dropout": 0.3, "schedule": "epoch", **LOG}
        whole = trained(place, seeded_task(**options), data_of(place), None)
        interrupted = trained(place, seeded_task(**options), data_of(place), first, callbacks=[SaveAt(path, 15)])
        saved = torch.load(path, weights_only=False)["optimizer_states"][0]["param_groups"][0]
        rest = trained(place, seeded_task(**options), data_of(place), then, path=path)
    assert (saved["fused"], saved["capturable"], type(saved["lr"])) == (True, place.is_cuda, float), saved
    for run, compile in ((interrupted, first), (rest, then)):
        assert not run.told, run.told
        assert run.replays >= 8 or compile is None, run.replays
    assert len(rest.losses) == 15
    assert_equal(rest.losses, [loss.item() for loss in whole.losses[15:]], weights_of(rest.module), weights_of(whole.module))
    return f"15 steps, {rest.replays} replays after resuming"


def fitted_twice(place: Place) -> str:
    with deterministic():
        ends = []
        for compile in (None, "step"):
            module, data = seeded_task(**LOG), data_of(place)
            run = trained(place, module, data, compile)
            run.trainer.fit_loop.max_epochs = 5
            with recorders(place) as made:
                run.trainer.fit(module, data)
            ends.append(weights_of(module))
    assert made[-1].replays >= 15, made[-1].replays
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)
    return f"{made[-1].replays} replays in the second fit"


# ---- nothing waits, little is launched ----------------------------------------------------------------------------


class ReplayGuard(Guard):
    """From where each kind of step is recorded, an operation that makes the host wait for the GPU raises."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.guarded += trainer.current_epoch > 2
        if batch_idx == 0 and trainer.current_epoch > 2:  # accumulation: WARM_UP epochs, and one to record the last window
            self.place.sync_errors(True)


def no_read(place: Place, case: Case) -> str:
    if case.precision == "16-mixed" and not place.is_cuda:
        return "not on the CPU"
    guard = ReplayGuard(place)
    torch.manual_seed(0)
    options = {**case.options, "max_epochs": 5, "callbacks": [guard]}
    run = trained(place, Task(**case.task), data_of(place, smaller=case.smaller), "step", case.precision, **options)
    assert not run.told, run.told
    assert guard.guarded == 20, guard.guarded
    assert run.replays >= case.least, run.replays
    return f"{guard.guarded} steps, {run.replays} replays"


def peak_memory(place: Place) -> str:
    """What tensors take at the most; what the allocator holds beside is told."""
    place.require_cuda()
    from .running_ahead import Wide, peak_of

    data = Batches([(torch.randn(64, 3, 64, 64).pin_memory(), torch.randint(10, (64,)).pin_memory()) for _ in range(8)])
    peaks, reserved = {}, {}
    for compile in (None, "step"):
        place.trainer(compile=compile).fit(Wide(), data)  # libraries take their workspaces
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peaks[compile] = peak_of(lambda: place.trainer(compile=compile).fit(Wide(), data))  # noqa: B023
        reserved[compile] = torch.cuda.max_memory_reserved()
    note = ", ".join(f"{name}: {peaks[name] / 2**20:.1f} MiB, reserved {reserved[name] / 2**20:.0f}" for name in peaks)
    assert peaks["step"] <= 1.15 * peaks[None], note
    return note


AHEAD: dict[str, dict[str, Any]] = {
    "eager": {"overlap_transfer": False},
    "copies beside steps": {},
    "replayed": {"compile": "step", "overlap_transfer": False},
    "replayed, copies beside steps": {"compile": "step"},
}


class Sleeping(L.LightningModule):
    """Reads a large batch, after which the GPU is busy for long."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.layer = nn.Linear(1024, 1)
        self.busy = place.sleep

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).mean()
        self.busy(0.01)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def running_ahead(place: Place, options: dict[str, Any]) -> str:
    """However many steps the host has launched, no more than a few batches are on the device."""
    place.require_cuda()
    batch = torch.zeros(2**14, 1024).pin_memory()
    size = batch.numel() * batch.element_size()
    place.trainer(**options).fit(Sleeping(place), Batches([batch] * 2))  # libraries take their workspaces
    place.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    place.trainer(**options).fit(Sleeping(place), Batches([batch] * 40))
    count = (torch.cuda.max_memory_reserved() - before) / size
    assert 0.9 < count < 5.5, f"{count:.1f} batches of {size / 2**20:.0f} MiB reserved at the peak"
    return f"{count:.1f} batches of {size / 2**20:.0f} MiB reserved at the peak"


def launches(place: Place) -> str:
    """Calls of CUDA's runtime for one replayed step: those of a longer run less those of a shorter one."""
    place.require_cuda()
    from torch.profiler import ProfilerActivity, profile

    found, replays = [], []
    for count in (12, 32):
        torch.manual_seed(0)
        module, data = Task("mlp", log={"on_step": True, "on_epoch": True}), data_of(place, count)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, recorders(place) as made:
            place.trainer(compile="step", gradient_clip_val=0.5).fit(module, data)
            place.synchronize()
        calls: dict[str, int] = {}
        for event in profiler.events():
            if event.name.startswith(("cuda", "cu")) and ("Launch" in event.name or "Memcpy" in event.name or "Memset" in event.name):
                calls[event.name] = calls.get(event.name, 0) + 1
        found.append(calls)
        replays.append(made[-1].replays)
    more = {name: (number - found[0].get(name, 0)) / 20 for name, number in found[1].items() if number != found[0].get(name, 0)}
    note = ", ".join(f"{number:g} x {name}" for name, number in sorted(more.items())) + " per step"
    assert replays[1] - replays[0] == 20, replays
    assert sum(number for name, number in more.items() if "GraphLaunch" in name) == 1, note
    assert sum(number for name, number in more.items() if "GraphLaunch" not in name) <= 8, note
    return note
