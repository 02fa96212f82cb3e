"""Saves on storage that fails at every place, one after another: run with the compiled ``storage.c`` preloaded.

``python storm.py SCENARIO FAULT [--every N]`` prints a summary as JSON, or says what was lost. A child process is forked for each place, so
that a fault costs milliseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import pickle
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lightning.fabric.checkpoint import io, sharded
from lightning.fabric.checkpoint.async_io import AsyncCheckpointIO
from lightning.fabric.checkpoint.generations import newest_valid
from lightning.fabric.checkpoint.io import CheckpointIO, TorchCheckpointIO
from lightning.fabric.checkpoint.temporary import sweep, temporary_name
from lightning.pytorch.callbacks import checkpoint_files

KILLS = {"kill-before": -1, "kill-half": -2, "kill-after": -3}
ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES")
SAVED, REFUSED, BROKEN = 0, 10, 11  # how a child ends

storage = ctypes.CDLL(None)


def content(step: int) -> dict[str, Any]:
    return {"epoch": 0, "global_step": step, "state_dict": {"w": torch.full((300, 100), float(step)), "b": torch.full((7,), float(step))}}


def same(path: str, step: int) -> bool:
    loaded = io.load(path)
    expected = content(step)["state_dict"]
    return loaded["global_step"] == step and all(torch.equal(loaded["state_dict"][key], value) for key, value in expected.items())


# ---- scenarios: how the first checkpoint comes, and what replaces it ---------------------------------------------------


def save_sharded(step: int, target: str) -> None:
    folder = os.path.join(os.path.dirname(target), temporary_name())
    os.makedirs(folder)
    try:
        tensors = content(step)["state_dict"]
        plain = {**content(step), "state_dict": {key: sharded.stand_in(value, key) for key, value in tensors.items()}}
        sharded.write_shards(tensors, folder)
        sharded.commit(plain, folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def overwrite(writer: CheckpointIO, folder: str, step: int) -> None:
    writer.save_checkpoint(content(step), os.path.join(folder, "last.ckpt"))


def rotate(writer: CheckpointIO, folder: str, step: int) -> None:
    """What ModelCheckpoint does with ``save_top_k=1``: the old one goes when the new one is there."""
    writer.save_checkpoint(content(step), os.path.join(folder, "deeper", f"step={step}.ckpt"))
    if step > 1:
        writer.remove_checkpoint(os.path.join(folder, "deeper", f"step={step - 1}.ckpt"))


def rotate_linked(writer: CheckpointIO, folder: str, step: int) -> None:
    """The same with ``save_last="link"``."""
    path, last = os.path.join(folder, f"step={step}.ckpt"), os.path.join(folder, "last.ckpt")
    writer.save_checkpoint(content(step), path)
    writer.after_saves(last, partial(checkpoint_files.make_link, path, last))
    if step > 1:
        writer.remove_checkpoint(os.path.join(folder, f"step={step - 1}.ckpt"))


def overwrite_sharded(writer: CheckpointIO, folder: str, step: int) -> None:
    save_sharded(step, os.path.join(folder, "last.ckpt"))


SCENARIOS: dict[str, tuple[Callable[[CheckpointIO, str, int], None], type[CheckpointIO], str]] = {
    "overwrite": (overwrite, TorchCheckpointIO, ""),
    "rotate": (rotate, TorchCheckpointIO, "deeper"),
    "rotate-linked": (rotate_linked, TorchCheckpointIO, ""),
    "async-overwrite": (overwrite, AsyncCheckpointIO, ""),
    "async-rotate": (rotate, AsyncCheckpointIO, "deeper"),
    "async-rotate-linked": (rotate_linked, AsyncCheckpointIO, ""),
    "sharded": (overwrite_sharded, TorchCheckpointIO, ""),
}


# ---- one place after another -------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None], n: int, kind: int, sticky: bool) -> tuple[int, str, int]:
    """Fork, fail at the n-th call, and return how the child ended, what it said, and how many calls it made."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code, said = SAVED, ""
        storage.storage_arm(n, kind, int(sticky))
        try:
            work()
        except OSError as error:
            code, said = REFUSED, f"{error.errno} {error}"
        except BaseException:
            code, said = BROKEN, traceback.format_exc()
        calls = storage.storage_disarm()
        os.write(writing, pickle.dumps((said, calls)))
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    said, calls = pickle.loads(answer) if answer else ("", -1)
    return os.waitstatus_to_exitcode(status), said, calls


def examine(folder: str, inner: str, code: int, saved: bool) -> str:
    """Which checkpoint is there: ``old`` or ``new``; anything else raises."""
    place = os.path.join(folder, inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no torn file may be seen
        path = newest_valid(place)
    which = "new" if same(path, 2) else "old"
    assert which == "new" or same(path, 1), f"{path} is neither the old nor the new checkpoint"
    assert which == "new" or not saved, "the save said that it was done, and the old checkpoint is there"
    last = os.path.join(place, "last.ckpt")
    assert os.path.exists(last) or not os.path.islink(last), "last.ckpt leads nowhere"
    left = [name for name in os.listdir(place) if not name.endswith(".ckpt")]
    if code not in (SAVED, REFUSED):
        sweep(place)
        left = [name for name in os.listdir(place) if not name.endswith(".ckpt") and not name.endswith(".tmp")]
        assert not left, f"sweep has left {left}"
    return which


def storm(scenario: str, fault: str, every: int, where: str | None) -> dict[str, Any]:
    act, kind_of_writer, inner = SCENARIOS[scenario]
    kill = KILLS.get(fault)
    number = kill if kill is not None else getattr(errno, fault)
    outcomes: Counter[str] = Counter()

    def work(folder: str) -> None:
        writer = kind_of_writer()
        act(writer, folder, 2)
        writer.teardown()

    def prepared() -> str:
        folder = tempfile.mkdtemp(dir=where)
        writer = kind_of_writer()
        act(writer, folder, 1)
        writer.teardown()
        return folder

    folder = prepared()
    code, said, calls = in_child(partial(work, folder), 10**9, -1, False)
    assert code == SAVED, said
    assert calls > 3
    assert examine(folder, inner, code, True) == "new"
    shutil.rmtree(folder)
    for n in range(1, calls + 1, every):
        for sticky in (False,) if kill is not None else (False, True):
            folder = prepared()
            code, said, _ = in_child(partial(work, folder), n, number, sticky)
            try:
                if kill is not None:
                    assert code == -9, f"the child was not killed: {code} {said}"
                else:
                    assert code in (SAVED, REFUSED), f"no clear error: {said}"
                    assert code == SAVED or str(number) in said.split()[0], f"not the error that happened: {said}"
                outcomes[examine(folder, inner, code, code == SAVED)] += 1
                outcomes["refused" if code == REFUSED else "survived" if code == SAVED else "killed"] += 1
                act(TorchCheckpointIO(), folder, 3)  # and the next save is as any other
                assert same(newest_valid(os.path.join(folder, inner)), 3)
            except BaseException:
                print(f"{scenario}, {fault} at call {n} of {calls}, sticky {sticky}, left {os.listdir(folder)}", file=sys.stderr)
                raise
            shutil.rmtree(folder)
    return {"scenario": scenario, "fault": fault, "calls": calls, **outcomes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", nargs="+")
    parser.add_argument("--faults", nargs="+", default=[*KILLS, *ERRORS])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--where", default=None, help="a folder of the file system to use")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for scenario in options.scenario:
        for fault in options.faults:
            print(json.dumps(storm(scenario, fault, options.every, options.where)), flush=True)


if __name__ == "__main__":
    main()
