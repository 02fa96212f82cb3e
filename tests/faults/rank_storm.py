"""A run of several processes, in which some are told to end, killed, or stopped at random, and which is started again by the same call.

``python rank_storm.py --size 2 --strikes 30 --seed 1``. In turns, to a subset of the processes:

- SIGTERM: all save one checkpoint together and end with exit code 143, whoever got it;
- SIGKILL: the others end by themselves, with an error;
- an exception in a hook: the same.

In the end weights, optimizer, and the order of all samples are those of the run that nobody disturbed, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from itertools import combinations
from typing import Any

import kill_storm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

PREEMPTED = 143
PATIENCE = 90.0  # seconds after which processes that should have ended have not


class Net(kill_storm.Net):
    """The same, which counts what all processes are given."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        numbers, x = batch
        everyones = self.all_gather(numbers).flatten()
        self.taken[self.current_epoch, everyones] += 1
        start = int(self.count)
        self.order[start : start + len(everyones)] = everyones
        self.count += len(everyones)
        time.sleep(0.01)
        loss = torch.nn.functional.mse_loss(self.layers(x), x.sum(1, keepdim=True))
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = torch.nn.functional.mse_loss(self.layers(batch[1]), batch[1].sum(1, keepdim=True))
        self.log("val_loss", loss, sync_dist=True)

    def train_dataloader(self) -> Any:
        return DataLoader(Subset(kill_storm.Numbered(), range(18)), batch_size=1, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Subset(kill_storm.Numbered(), range(18)), batch_size=3)


class Victim(Callback):
    """Tells that training has begun, and raises where it is asked to."""

    def __init__(self, folder: str, raise_at: int) -> None:
        self.folder, self.raise_at, self.count = folder, raise_at, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with open(os.path.join(self.folder, f"started-{trainer.global_rank}"), "w"):
            pass

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        self.count += 1
        if self.count == self.raise_at:
            raise ValueError("asked for")


def fit(folder: str, size: int, raise_at: int) -> None:
    seed_everything(7, workers=True, verbose=False)
    # Three addends are summed in an order that depends on DDP's buckets, which it lays out anew after its first step, unless told this.
    strategy = DDPStrategy()
    trainer = Trainer(
        max_epochs=kill_storm.EPOCHS, accelerator="cpu", strategy=strategy, devices=size, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, accumulate_grad_batches=2, val_check_interval=4, num_sanity_val_steps=1,
        callbacks=[Victim(folder, raise_at), ModelCheckpoint(f"{folder}/steps", every_n_train_steps=2)],
    )  # fmt: skip
    model = Net(0)
    trainer.fit(model, ckpt_path="auto")
    if trainer.global_rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}, os.path.join(folder, "final.tmp"))
        os.replace(os.path.join(folder, "final.tmp"), os.path.join(folder, "final.pt"))


# ---- starting and striking -----------------------------------------------------------------------------------------------


def start(folder: str, size: int, raise_at: dict[int, int]) -> list[int]:
    """Fork the processes as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in os.listdir(folder):
        if name.startswith(("started-", "error-")):
            os.unlink(os.path.join(folder, name))
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(
                {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "storm"}
            )
            code = 0
            try:
                fit(folder, size, raise_at.get(rank, -1))
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
                with open(os.path.join(folder, f"error-{rank}"), "w") as file:
                    file.write(traceback.format_exc())
            except BaseException:
                code = 1
                with open(os.path.join(folder, f"error-{rank}"), "w") as file:
                    file.write(traceback.format_exc())
            os._exit(code)
        children.append(child)
    return children


def ends(children: list[int], folder: str) -> list[int]:
    """How each process ended.

    Raises:
        AssertionError: if one of them does not.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            raise AssertionError(f"these have not ended after {PATIENCE} seconds: {[c for c in children if c not in codes]}, {codes}")
        time.sleep(0.002)
    return [codes[child] for child in children]


def wait_for_training(folder: str, size: int, children: list[int]) -> None:
    deadline = time.monotonic() + 4 * PATIENCE
    while not all(os.path.exists(os.path.join(folder, f"started-{rank}")) for rank in range(size)):
        assert time.monotonic() < deadline, "training has not begun"
        time.sleep(0.002)


def errors(folder: str) -> str:
    texts = []
    for name in sorted(os.listdir(folder)):
        if name.startswith("error-"):
            with open(os.path.join(folder, name)) as file:
                texts.append(f"{name}: {file.read()[-1500:]}")
    return "\n".join(texts)


def strike(folder: str, size: int, how: str, ranks: tuple[int, ...], chance: random.Random, seconds: float, steps: int) -> bool:
    """Start, strike, and see how all end; returns whether the run was through."""
    raising = how == "raise"
    children = start(folder, size, dict.fromkeys(ranks, chance.randrange(1, 12)) if raising else {})
    if not raising:
        wait_for_training(folder, size, children)
        time.sleep(chance.uniform(0, seconds))
        for rank in ranks:
            os.kill(children[rank], signal.SIGTERM if how == "term" else signal.SIGKILL)
    codes = ends(children, folder)
    if os.path.exists(os.path.join(folder, "final.pt")):
        return True
    if how == "term" and kill_storm.reached(folder) == steps:  # a signal after the last step is the script's own, in its process alone
        assert all(codes[rank] == PREEMPTED if rank in ranks else codes[rank] in (0, PREEMPTED) for rank in range(size)), codes
    elif how == "term":
        assert codes == [PREEMPTED] * size, f"exit codes {codes}; {errors(folder)}"
    else:
        assert all(codes), codes
        assert all(codes[rank] == (1 if raising else -signal.SIGKILL) for rank in ranks), f"{codes}; {errors(folder)}"
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--strikes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--how", nargs="+", default=["term", "kill", "raise"])
    parser.add_argument("--where", default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "Of the .* checkpoints found")  # a torn one
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    size, chance = options.size, random.Random(options.seed)
    whole = tempfile.mkdtemp(dir=options.where)
    codes = ends(start(whole, size, {}), whole)
    assert codes == [0] * size, errors(whole)
    seconds = os.stat(os.path.join(whole, "final.pt")).st_mtime - os.stat(os.path.join(whole, "started-0")).st_mtime
    expected, steps = torch.load(os.path.join(whole, "final.pt"), weights_only=True), kill_storm.reached(whole)
    subsets = [ranks for count in range(1, size + 1) for ranks in combinations(range(size), count)]
    counts: Counter[str] = Counter()
    folder, last = tempfile.mkdtemp(dir=options.where), -1
    done: list[Any] = []
    number = 0
    while number < options.strikes or last >= 0:
        ranks = subsets[number % len(subsets)]
        how = options.how[number // len(subsets) % len(options.how)] if number < options.strikes else "nothing"
        try:
            through = strike(folder, size, how, ranks if how != "nothing" else (), chance, seconds / 3, steps)
            done.append((how, ranks))
            now = kill_storm.reached(folder)
            assert now >= last, f"steps were lost: {last} was on the disk, {now} is"
            counts["resumed"] += last >= 0
            if through:
                compare(folder, expected)
                counts["runs"] += 1
        except BaseException:
            print(f"{size} processes, {done}, then {how} to {ranks}; left {os.listdir(folder)}", file=sys.stderr)
            raise
        counts[how] += 1
        number += 1
        last = now
        if through:
            shutil.rmtree(folder)
            folder, last = tempfile.mkdtemp(dir=options.where), -1
    print(json.dumps({"size": size, "seconds of a run": round(seconds, 2), **counts}))


def compare(folder: str, expected: dict[str, Any]) -> None:
    taken = expected["model"]["taken"][:, :18]
    assert (taken == 1).all(), taken
    final = torch.load(os.path.join(folder, "final.pt"), weights_only=True)
    for name, value in expected["model"].items():
        assert torch.equal(value, final["model"][name]), f"{name} differs:\n{value}\n{final['model'][name]}"
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            other = final["optimizer"]["state"][index][name]
            assert torch.equal(value, other), f"{name} of the optimizer differs by {(value - other).abs().max()} of {value.abs().max()}"


if __name__ == "__main__":
    main()
