"""A training run that is killed again and again, anywhere, and started again by the same call: ``fit(ckpt_path="auto")``.

``python kill_storm.py --kills 1000 --workers 0 --seed 1``. Each start is a fork of this process, which has imported everything. Half of
the kills come by the clock, anywhere in the program, and half at an event: a hook, or a file that is opened, renamed or removed. What
must hold: every start goes on from a checkpoint that is at least as far as the newest that was on the disk before; no checkpoint is torn;
weights, optimizer, metrics, and the order of all samples are in the end those of the run that nobody killed, bit by bit.

``--replay 5,12,3`` kills at these events, one start after another: so a failure can be looked at again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning.fabric.checkpoint.generations import generation_of, newest_valid
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

EPOCHS, SAMPLES, BATCH, ACCUMULATE = 2, 22, 2, 3  # 11 batches, so that the last window of an epoch is a short one
FINISHED, BROKEN = 0, 3  # how a start ends that is not killed
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir")


class Numbered(Dataset[Any]):
    """Samples that know their number, with noise from the process that reads them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.linspace(0, index, 4) + 0.01 * torch.randn(4) + random.random()


class Net(LightningModule):
    """Uses everything that a resumed run can get wrong, and keeps the history of what it was given."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        self.register_buffer("taken", torch.zeros(EPOCHS, SAMPLES, dtype=torch.long))
        self.register_buffer("order", torch.zeros(EPOCHS * SAMPLES, dtype=torch.long))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("means", torch.zeros(EPOCHS))
        self.register_buffer("validated", torch.zeros(EPOCHS))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        numbers, x = batch
        self.taken[self.current_epoch, numbers] += 1
        start = int(self.count)
        self.order[start : start + len(numbers)] = numbers
        self.count += len(numbers)
        loss = torch.nn.functional.mse_loss(self.layers(x + 0.01 * torch.randn_like(x)), x.sum(1, keepdim=True))
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.layers(batch[1]), batch[1].sum(1, keepdim=True)))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated[self.current_epoch] += self.trainer.callback_metrics["val_loss"]

    def on_train_epoch_end(self) -> None:
        self.means[self.current_epoch] = self.trainer.callback_metrics["loss"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(Numbered(), batch_size=BATCH, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> Any:
        return DataLoader(Numbered(), batch_size=11)


class Killer(Callback):
    """Ends the process at its n-th event: a hook, or a change to a file. Counts on if there is none."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        sys.addaudithook(self.watch)

    def happens(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and (event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            self.happens()


def _hook(name: str) -> Callable[..., None]:
    def hook(self: Killer, *arguments: Any, **more: Any) -> None:
        self.happens()

    hook.__name__ = name
    return hook


HOOKS = (
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_start"),
    *("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end"),
)
for _name in HOOKS:
    setattr(Killer, _name, _hook(_name))


class Noted(Callback):
    """Writes down which steps have been saved, once they have: none of these may be lost."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "saved")

    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        callback = trainer.checkpoint_callbacks[0]
        if callback.best_model_path:
            with open(self.path, "a") as file:
                file.write(f"{callback._last_global_step_saved}\n")


def fit(folder: str, workers: int, kill_at: int = -1) -> int:
    """The command that is started again and again; returns how many events there were."""
    seed_everything(7, workers=True, verbose=False)
    killer = Killer(kill_at)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        accumulate_grad_batches=ACCUMULATE, val_check_interval=4, num_sanity_val_steps=1,
        callbacks=[
            killer,
            Noted(folder),
            ModelCheckpoint(f"{folder}/steps", every_n_train_steps=1),
            ModelCheckpoint(f"{folder}/often", train_time_interval=timedelta(milliseconds=1)),  # in the middle of windows, too
            ModelCheckpoint(f"{folder}/best", monitor="val_loss", save_top_k=2),
        ],
    )  # fmt: skip
    model = Net(workers)
    trainer.fit(model, ckpt_path="auto")
    torch.save({"model": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}, os.path.join(folder, "final.tmp"))
    os.replace(os.path.join(folder, "final.tmp"), os.path.join(folder, "final.pt"))
    return killer.count


# ---- starting and killing ------------------------------------------------------------------------------------------------


def start(folder: str, workers: int, kill_at: int, delay: float | None) -> int:
    """Fork, kill at an event or after a time, and return how it ended: minus the signal's number if it was killed."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            count = fit(folder, workers, kill_at)
            with open(os.path.join(folder, "events"), "w") as file:
                file.write(str(count))
            os._exit(FINISHED)
        except BaseException:
            with open(os.path.join(folder, "error"), "w") as file:
                file.write(traceback.format_exc())
            os._exit(BROKEN)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    end = os.waitstatus_to_exitcode(status)
    if workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # its data workers, which would notice after some seconds
    return end


def reached(folder: str) -> int:
    """The step of the newest checkpoint, -1 if there is none; a warning about a broken one is an error here."""
    paths = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names if name.endswith(".ckpt")]
    if not paths:
        return -1
    generation = generation_of(newest_valid(paths))
    assert generation is not None
    return generation.global_step


def noted(folder: str) -> int:
    path = os.path.join(folder, "saved")
    if not os.path.exists(path):
        return -1
    with open(path) as file:
        return max((int(line) for line in file.read().split("\n")[:-1]), default=-1)


def compare(folder: str, expected: dict[str, Any]) -> None:
    final = torch.load(os.path.join(folder, "final.pt"), weights_only=True)
    for name, value in expected["model"].items():
        assert torch.equal(value, final["model"][name]), f"{name} differs:\n{value}\n{final['model'][name]}"
    assert (final["model"]["taken"] == 1).all(), "samples were missed or repeated"
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, final["optimizer"]["state"][index][name]), f"{name} of the optimizer differs"
    assert final["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"], "another learning rate"


class Storm:
    """Runs that are killed ``per_run`` times each, until there have been ``kills``."""

    def __init__(self, where: str | None, workers: int, seed: int) -> None:
        self.where, self.workers, self.chance = where, workers, random.Random(seed)
        self.counts: Counter[str] = Counter()
        fit(tempfile.mkdtemp(dir=where), 0)  # which imports what is imported when it is needed, for all the forks
        folder = tempfile.mkdtemp(dir=where)
        begun = time.monotonic()
        assert start(folder, workers, -1, None) == FINISHED, self.error_of(folder)
        self.seconds = time.monotonic() - begun
        with open(os.path.join(folder, "events")) as file:
            self.events = int(file.read())
        self.expected = torch.load(os.path.join(folder, "final.pt"), weights_only=True)
        compare(folder, self.expected)
        self.steps = reached(folder)
        assert noted(folder) > 0, "nothing was saved"
        shutil.rmtree(folder)

    def error_of(self, folder: str) -> str:
        path = os.path.join(folder, "error")
        if not os.path.exists(path):
            return "no error was left"
        with open(path) as file:
            return file.read()

    def run(self, kills: list[tuple[int, float | None]]) -> None:
        """One run, killed at these events or after these times, and then left alone."""
        folder = tempfile.mkdtemp(dir=self.where)
        done: list[Any] = []
        last = -1
        try:
            for kill_at, delay in kills:
                end = start(folder, self.workers, kill_at, delay)
                done.append(kill_at if delay is None else round(delay, 4))
                assert end in (FINISHED, -signal.SIGKILL), self.error_of(folder)
                if end == FINISHED:
                    break
                self.counts["killed"] += 1
                now = reached(folder)
                assert now >= max(last, noted(folder)), f"steps were lost: {last} and {noted(folder)} were on the disk, {now} is"
                self.counts["resumed"] += last >= 0
                self.counts[f"at step {now}"] += 1
                last = now
            assert start(folder, self.workers, -1, None) == FINISHED, self.error_of(folder)
            compare(folder, self.expected)
            self.counts["runs"] += 1
        except BaseException:
            print(f"workers {self.workers}, kills {done} (numbers of events, seconds), left {os.listdir(folder)}", file=sys.stderr)
            raise
        shutil.rmtree(folder)

    def drawn(self, number: int) -> list[tuple[int, float | None]]:
        """So many kills, by events or by the clock, each within a third of what a whole run takes."""
        return [
            (-1, self.chance.uniform(0, self.seconds / 3))
            if self.chance.random() < 0.5
            else (self.chance.randrange(1, self.events // 3), None)
            for _ in range(number)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--per-run", type=int, default=25)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", help="numbers of events, with commas between them")
    parser.add_argument("--sweep", type=int, help="instead: one run for each event, or each so many of them, killed there")
    parser.add_argument("--where", default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "Of the .* checkpoints found")  # a torn one
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    storm = Storm(options.where, options.workers, options.seed)
    if options.replay:
        storm.run([(int(number), None) for number in options.replay.split(",")])
    elif options.sweep:
        for number in range(1, storm.events + 1, options.sweep):
            storm.run([(number, None)])
    else:
        while storm.counts["killed"] < options.kills:
            storm.run(storm.drawn(min(options.per_run, options.kills - storm.counts["killed"])))
    assert storm.counts["killed"] > 0
    steps = {name: count for name, count in storm.counts.items() if name.startswith("at step")}
    summary = {name: count for name, count in storm.counts.items() if name not in steps}
    facts = {"workers": options.workers, "seconds of a run": round(storm.seconds, 2), "events of a run": storm.events, "steps": storm.steps}
    print(json.dumps({**facts, **summary, "steps seen": len(steps)}))


if __name__ == "__main__":
    main()
