"""The host never waits for the GPU between two batches, nothing that is logged is lost for it, and no memory is wasted."""

from __future__ import annotations

import csv
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning.pytorch as L
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from .common import AUTOCAST, Batches, Check, Classifier, Place, Skip, adamw, batches, seeded
from .parity import TwoNets

STEP_AND_EPOCH = {"on_step": True, "on_epoch": True, "prog_bar": True}


class Rows(Logger):
    """A logger that keeps what it gets, in the order in which it gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class EagerBar(TQDMProgressBar):
    """A bar that is drawn for each batch, however fast they are."""

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.mininterval = 0
        return bar


WINDOWS = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}

# what: (precision, arguments of the model, arguments of the trainer, progress bar, whether loggers and monitor are on)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any, bool]] = {
    "32-true": ("32-true", {}, {}, None, False),
    "32-true, AdamW not fused": ("32-true", {"fused": False}, {}, None, False),
    "bf16-mixed": ("bf16-mixed", {}, {}, None, False),
    "accumulation, clipping by norm": ("32-true", {}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}, None, False),
    "clipping by value": ("32-true", {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, None, False),
    "log": ("32-true", {"log": STEP_AND_EPOCH}, {}, None, False),
    "log, loggers, learning rates": ("32-true", {"log": STEP_AND_EPOCH, "schedule": True}, {}, None, True),
    "log, tqdm": ("32-true", {"log": STEP_AND_EPOCH}, {}, EagerBar, False),
    "log, rich": ("32-true", {"log": STEP_AND_EPOCH}, {}, RichProgressBar, False),
    "all, tqdm, bf16-mixed": ("bf16-mixed", {"log": STEP_AND_EPOCH, "schedule": True}, WINDOWS, EagerBar, True),
    "all, rich, 16-mixed": ("16-mixed", {"log": STEP_AND_EPOCH, "schedule": True}, WINDOWS, RichProgressBar, True),
    "16-mixed, profiler": ("16-mixed", {}, {"gradient_clip_val": 0.5, "profiler": "simple"}, None, False),
    "16-true": ("16-true", {"eps": 1e-4}, {"gradient_clip_val": 0.5}, None, False),
}  # fmt: skip


def checks(place: Place) -> list[Check]:
    return [
        ("the guard against waiting catches loss.item()", lambda: guard_works(place)),
        *((f"no read from the device, {case}", lambda c=case: no_read(place, c)) for case in CASES),
        ("no read from the device, two optimizers by hand, 16-mixed", lambda: no_read_by_hand(place)),
        ("no read from the device, validation batches", lambda: no_read_in_validation(place)),
        ("16-mixed without a fused optimizer waits as torch does", lambda: scaler_waits(place)),
        *((f"the host runs ahead of the GPU, {case}", lambda c=case: runs_ahead(place, c)) for case in CASES if "fused" not in case),
        ("rows of loggers as on the CPU", lambda: rows_as_on_cpu(place, every=3, monitor=False)),
        ("rows of loggers as on the CPU, every step", lambda: rows_as_on_cpu(place, every=1, monitor=False)),
        ("rows of loggers as on the CPU, LearningRateMonitor", lambda: rows_as_on_cpu(place, every=2, monitor=True)),
        ("rows of loggers as on the CPU, LearningRateMonitor, every step", lambda: rows_as_on_cpu(place, every=1, monitor=True)),
        *((f"peak memory, {p}", lambda p=p: peak_memory(place, p)) for p in ("32-true", "bf16-mixed", "16-mixed")),
    ]


# ---- operations that wait are errors ------------------------------------------------------------------------------


class Guard(L.Callback):
    """From the second batch of each epoch to its last, an operation that makes the host wait for the GPU raises."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.guarded = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.guarded += batch_idx > 0
        if batch_idx == 1:
            self.place.sync_errors(True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        read_metrics(trainer)

    def on_train_epoch_end(self, *_: Any) -> None:  # after the last batch and its rows, before the epoch's values are read
        self.place.sync_errors(False)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 1 and not trainer.sanity_checking:
            self.place.sync_errors(True)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.guarded += batch_idx > 0 and not trainer.sanity_checking
        if batch_idx + 1 == trainer.num_val_batches[0]:
            self.place.sync_errors(False)

    def on_exception(self, *_: Any) -> None:
        self.place.sync_errors(False)


def read_metrics(trainer: L.Trainer) -> None:
    """What callbacks may do at any time without waiting for the GPU; a bar does it when it is drawn."""
    for metrics in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
        dict(metrics)


def assemble(place: Place, case: str, watch: L.Callback, folder: str, **options: Any) -> tuple[L.Trainer, Classifier, Rows]:
    """Trainer and model of one of the cases."""
    precision, model_options, trainer_options, bar, logs = CASES[case]
    rows = Rows()
    callbacks: list[L.Callback] = [watch]
    if bar is not None:
        callbacks.append(bar())
        trainer_options = {**trainer_options, "enable_progress_bar": True}
    if logs:
        callbacks.append(LearningRateMonitor())
        trainer_options = {**trainer_options, "logger": [rows, CSVLogger(folder), TensorBoardLogger(folder)], "log_every_n_steps": 5}
    trainer_options = {"max_epochs": 2, "default_root_dir": folder, "callbacks": callbacks, **trainer_options, **options}
    return place.trainer(precision, **trainer_options), seeded("conv", **model_options), rows


def guard_works(place: Place) -> str:
    place.require_cuda()

    class Reads(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            loss.item()
            return loss

    message = waiting(lambda: place.trainer(callbacks=[Guard(place)]).fit(Reads(), batches(3)))
    assert message, "loss.item() went unnoticed"
    return message


def waiting(run: Callable[[], Any]) -> str:
    """What the guard says of ``run``, which may wait for the GPU; empty if it does not."""
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    return ""


def no_read(place: Place, case: str) -> str:
    guard = Guard(place)
    with tempfile.TemporaryDirectory() as folder:
        trainer, model, rows = assemble(place, case, guard, folder)
        trainer.fit(model, batches(12, pin=place.is_cuda))
    assert guard.guarded == 22
    assert len(model.losses) == 24
    drawn = sys.stdout.getvalue().count("loss_step")  # type: ignore[attr-defined]
    assert drawn >= {None: 0, EagerBar: 22, RichProgressBar: 2}[CASES[case][3]], f"the bar was drawn {drawn} times"
    return f"{guard.guarded} steps" + (f", {len(rows.rows)} rows" if rows.rows else "") + (f", {drawn} drawings" if drawn else "")


def no_read_by_hand(place: Place) -> None:
    guard = Guard(place)
    place.trainer("16-mixed", callbacks=[guard]).fit(TwoNets(), batches(12, pin=place.is_cuda))
    assert guard.guarded == 11


def no_read_in_validation(place: Place) -> str:
    guard, rows = Guard(place), Rows()
    options = {"logger": rows, "log_every_n_steps": 2, "val_check_interval": 0.5, "enable_progress_bar": True}
    trainer = place.trainer("bf16-mixed", callbacks=[guard, TQDMProgressBar()], **options)

    class Steps(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            place.sync_errors(False)  # only validation is looked at here

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("on_step", batch[0].mean(), on_step=True, on_epoch=True, prog_bar=True)

    torch.manual_seed(0)
    trainer.fit(Steps(log=STEP_AND_EPOCH), batches(8, pin=place.is_cuda), batches(6, pin=place.is_cuda))
    assert guard.guarded == 7 + 2 * 5
    assert sum("on_step_step" in values for _, values in rows.rows) == 2 * 6
    return "10 validation batches"


def scaler_waits(place: Place) -> str:
    """``GradScaler.step`` reads whether gradients overflowed, unless the optimizer is fused and decides that on the GPU."""
    place.require_cuda()
    answers = {}
    for fused in (True, False):
        net = seeded("conv").net.to(place.device)
        optimizer, scaler = adamw(net.parameters(), fused), torch.amp.GradScaler("cuda")
        x, y = batches(1, device=place.device)[0]
        for step in range(3):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            place.sync_errors(step == 2)
            alone = waiting(lambda: scaler.step(optimizer))  # noqa: B023
            place.sync_errors(False)
            if not alone:
                scaler.update()
        trainer = place.trainer("16-mixed", callbacks=[Guard(place)])
        answers[fused] = bool(alone), bool(waiting(lambda: trainer.fit(seeded("conv", fused=fused), batches(4))))  # noqa: B023
    assert answers[True] == (False, False), answers
    assert answers[False][0] == answers[False][1], answers
    return f"torch's own GradScaler.step waits with a fused optimizer: {answers[True][0]}, with another: {answers[False][0]}"


# ---- the host is really ahead -------------------------------------------------------------------------------------


class Sleeper(L.Callback):
    """In the second epoch the GPU gets a long task before the second batch; is it still busy when the host has done the last?

    This also finds what the guard does not know of: waiting for an event or a stream, and pinning memory.
    """

    SECONDS = 0.4

    def __init__(self, place: Place) -> None:
        self.place = place
        self.host_seconds = 0.0
        self.ahead = False

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            torch.cuda.synchronize()
            self.place.sleep(self.SECONDS)
            self.event = torch.cuda.Event()
            self.event.record()
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        read_metrics(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.host_seconds = time.perf_counter() - self.start
            self.ahead = not self.event.query()


def runs_ahead(place: Place, case: str) -> str:
    place.require_cuda()
    sleeper = Sleeper(place)
    with tempfile.TemporaryDirectory() as folder:
        trainer, model, _ = assemble(place, case, sleeper, folder, **({"log_every_n_steps": 2} if CASES[case][-1] else {}))
        trainer.fit(model, batches(8, pin=True))  # more would fill the GPU's queue of about 1,000 kernels, and then the host waits
    note = f"the host took {sleeper.host_seconds * 1e3:.1f} ms for 7 steps while the GPU slept {sleeper.SECONDS * 1e3:.0f} ms"
    assert sleeper.ahead, "the host waited for the GPU: " + note
    return note


# ---- rows ---------------------------------------------------------------------------------------------------------


class Logs(Classifier):
    """A model that logs in many ways, on a GPU that is slower than the host."""

    def __init__(self, place: Place) -> None:
        super().__init__("mlp", schedule=True, log=STEP_AND_EPOCH)
        self.place = place

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.place.sleep(0.002)
        self.log("number", float(batch_idx))
        if batch_idx % 2:
            self.log("odd", loss * 0 + batch_idx, reduce_fx="max", on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_step", batch[0].mean() * 0 + batch_idx, on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        self.log("epochs", float(self.current_epoch))


def logged_rows(place: Place, every: int, monitor: bool) -> tuple[list[Any], list[int]]:
    torch.manual_seed(0)
    rows = Rows()
    with tempfile.TemporaryDirectory() as folder:
        table = CSVLogger(folder, flush_logs_every_n_steps=1)
        options = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 4, "log_every_n_steps": every}
        callbacks = [LearningRateMonitor()] if monitor else []
        place.trainer(logger=[rows, table], callbacks=callbacks, **options).fit(Logs(place), batches(10), batches(3))
        with Path(table.log_dir, "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
    return rows.rows, steps


def rows_as_on_cpu(place: Place, every: int, monitor: bool) -> str:
    expected, expected_steps = logged_rows(Place(torch.device("cpu")), every, monitor)
    found, steps = logged_rows(place, every, monitor)
    shape, expected_shape = ([(step, tuple(values)) for step, values in rows] for rows in (found, expected))
    if shape != expected_shape:
        same = sorted(map(str, shape)) == sorted(map(str, expected_shape))
        first = next(i for i, (a, b) in enumerate(zip([*shape, None], [*expected_shape, None])) if a != b)
        what = "the same rows in another order" if same else f"{len(shape)} rows, {len(expected_shape)} on the CPU"
        raise AssertionError(f"{what}; row {first} is {shape[first : first + 1]}, on the CPU {expected_shape[first : first + 1]}")
    assert steps == expected_steps
    for (_, ours), (_, theirs) in zip(found, expected):
        for name, value in theirs.items():
            assert abs(ours[name] - value) <= 5e-3 * max(1.0, abs(value)), (name, ours[name], value)
    return f"{len(found)} rows"


# ---- memory -------------------------------------------------------------------------------------------------------


class Wide(L.LightningModule):
    """A network with large activations and many weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(4096, 2048), nn.ReLU(), nn.Linear(2048, 10),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters(), fused=True)


def peak_of(run: Any) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(place: Place, precision: str) -> str:
    data = Batches([(torch.randn(64, 3, 64, 64), torch.randint(10, (64,))) for _ in range(6)])

    def by_trainer() -> None:
        place.trainer(precision, gradient_clip_val=1.0, logger=Rows(), log_every_n_steps=2).fit(Wide(), data)

    def by_hand(zero_first: bool = False) -> None:
        net = Wide().net.to(place.device)
        optimizer, scaler = adamw(net.parameters(), True), torch.amp.GradScaler(place.device.type, enabled=precision == "16-mixed")
        for batch in data:
            x, y = (tensor.to(place.device, non_blocking=True) for tensor in batch)
            if zero_first:
                optimizer.zero_grad()
            with torch.autocast(place.device.type, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST):
                loss = nn.functional.cross_entropy(net(x), y)
            if not zero_first:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

    if not place.is_cuda:
        data = Batches([(x[:2, :, :16, :16], y[:2]) for x, y in data])
        by_trainer()
        by_hand()
        raise Skip("needs CUDA")
    by_hand()  # cuBLAS and cuDNN take their workspaces
    ours, theirs, zero_first = peak_of(by_trainer), peak_of(by_hand), peak_of(lambda: by_hand(zero_first=True))
    note = f"{ours / 2**20:.1f} MiB, by hand {theirs / 2**20:.1f}, with zero_grad before the forward pass {zero_first / 2**20:.1f}"
    assert ours <= 1.01 * theirs, note
    return note
