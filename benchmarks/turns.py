"""Loops that take turns: blocks of hand-written loops between blocks of a trainer's steps, inside of one ``fit``.

Whatever slows the machine down then slows all of them, and the times of one round can be compared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


class TurnTaking:
    """An iterable of batches which lets hand-written loops run between two blocks of them; each block ends by waiting for the device.

    Args:
        device: what the loops compute on.
        batches: of a block.
        blocks: measured blocks of each loop.
        others: run a hand-written loop over some batches, by name.
        warm_up: blocks before, which are not measured.

    Attributes:
        times: microseconds per step in each block, by name; those of the trainer under ``"trainer"``.
    """

    def __init__(
        self,
        device: torch.device,
        batches: list[Any],
        blocks: int,
        others: dict[str, Callable[[list[Any]], None]],
        warm_up: int | None = None,
    ) -> None:
        self.device, self.batches, self.blocks, self.others = device, batches, blocks, others
        self.warm_up = max(2, blocks // 6) if warm_up is None else warm_up
        self.times: dict[str, list[float]] = {name: [] for name in (*others, "trainer")}

    def __len__(self) -> int:
        return (self.blocks + self.warm_up) * len(self.batches) + 1  # one batch more: asking for it ends the last block

    def __iter__(self) -> Iterator[Any]:
        turns = list(self.others.items())
        for block in range(-self.warm_up, self.blocks):
            start = self.now()
            turns.reverse()  # what runs just before a block can make it slower or faster
            for name, run in turns:
                run(self.batches)
                start = self.note(name, start, block)
            yield from self.batches
            self.note("trainer", start, block)
        yield self.batches[0]

    def note(self, name: str, start: float, block: int) -> float:
        """Take the time of a block that ends here."""
        end = self.now()
        if block >= 0:
            self.times[name].append((end - start) / len(self.batches) * 1e6)
        return end

    def now(self) -> float:
        """The time when the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """A context in which nothing is printed."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def be_quiet() -> None:
    """Say nothing but errors, and compute in one thread."""
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def run_elsewhere(python: str, script: str, arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A script by another interpreter, which sees its own packages alone.

    Args:
        python: the interpreter.
        script: its path.
        arguments: of the script.
        options: of ``subprocess.run``.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([python, script, *arguments], text=True, env=environment, **options)


def run_here(script: str, arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A script in a new process of this interpreter, with the same flags and packages."""
    flags = ["-S"] if sys.flags.no_site else []
    return subprocess.run([sys.executable, *flags, script, *arguments], text=True, **options)
