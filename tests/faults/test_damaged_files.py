"""Bits that flip and files that end early: each is found, or harmless.

500 of them by default; 10,000 of each kind of file with ``KERAUNOS_FAULTS=full`` (``make test-faults``).
"""

from __future__ import annotations

import os
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.fabric.checkpoint import io, sharded
from lightning.fabric.checkpoint.io import DamagedCheckpoint, load, save

FULL = os.environ.get("KERAUNOS_FAULTS") == "full"
TRIES = 10_000 if FULL else 500
# Where a file is no archive any more, it may look like anything.
FOUND = (DamagedCheckpoint, pickle.UnpicklingError)


def content() -> dict[str, Any]:
    return {
        "global_step": 7,
        "epoch": 1,
        "state_dict": {"w": torch.arange(600.0).view(30, 20), "h": torch.arange(9, dtype=torch.float16)},
        "hyper_parameters": {"path": Path("x"), "sizes": [1, 2, 3]},
    }


def same(loaded: Any) -> bool:
    expected = content()
    tensors = loaded["state_dict"]
    return (
        all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in expected["state_dict"].items())
        and {**loaded, "state_dict": None} == {**expected, "state_dict": None}
        and len(tensors) == 2
    )


def damage(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    kind = chance.choice(["flip", "flip", "flip", "flips", "truncated", "zeros", "grown"])
    if kind == "truncated":
        return kind, data[: chance.randrange(len(data))]
    if kind == "grown":
        return kind, data + chance.randbytes(chance.randrange(1, 100))
    changed = bytearray(data)
    if kind == "zeros":  # a block that never reached the disk
        start = chance.randrange(len(data))
        changed[start : start + 512] = bytes(len(changed[start : start + 512]))
    else:
        for _ in range(1 if kind == "flip" else chance.randrange(2, 40)):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return kind, bytes(changed)


def outcomes(path: str, data: bytes, seed: int, **options: Any) -> Counter[str]:
    chance, counted = random.Random(seed), Counter[str]()
    for number in range(TRIES):
        kind, changed = damage(data, chance)
        if changed == data:
            counted["unchanged"] += 1
            continue
        Path(path).write_bytes(changed)
        try:
            loaded = load(path, **options)
        except FOUND:
            counted["found"] += 1
            continue
        assert same(loaded), f"damage {number} ({kind}) was loaded"
        counted["harmless"] += 1
    print(dict(counted))
    return counted


@pytest.mark.parametrize("mmap", [False, True])
def test_damage_of_our_files_is_found(mmap: bool) -> None:
    save(content(), "whole.ckpt")
    counted = outcomes("damaged.ckpt", Path("whole.ckpt").read_bytes(), seed=int(mmap), mmap=mmap)
    assert counted["found"] > 0.98 * TRIES  # a seal that is not known as one any more is harmless


def test_damage_of_files_of_other_programs_is_found_or_harmless() -> None:
    torch.save(content(), "whole.ckpt")
    counted = outcomes("damaged.ckpt", Path("whole.ckpt").read_bytes(), seed=2)
    assert counted["found"] > 0.5 * TRIES


def test_damage_of_any_file_of_a_sharded_checkpoint_is_found() -> None:
    os.mkdir("run.ckpt")
    whole = content()
    tensors = {"a": whole["state_dict"]["w"], "b": whole["state_dict"]["h"]}
    plain = {**whole, "state_dict": {"w": sharded.stand_in(tensors["a"], "a"), "h": sharded.stand_in(tensors["b"], "b")}}
    os.mkdir(".new")
    sharded.write_shards(tensors, ".new")
    sharded.commit(plain, ".new", os.path.abspath("run.ckpt"))
    names = sorted(os.listdir("run.ckpt"))
    assert {".metadata", "__0_0.distcp", "manifest.json", "meta.pt"} == set(names)
    chance = random.Random(3)
    for _ in range(TRIES // 4):
        name = chance.choice(names)
        path = Path("run.ckpt", name)
        data = path.read_bytes()
        _, changed = damage(data, chance)
        if changed == data:
            continue
        path.write_bytes(changed)
        try:
            loaded = io.load("run.ckpt")
        except FOUND as error:
            assert "run.ckpt" in str(error)  # noqa: PT017
        else:
            assert same(loaded), f"damage of {name} was loaded"
        path.write_bytes(data)
    assert same(io.load("run.ckpt"))


@pytest.mark.skipif(not FULL, reason="a part of `make test-faults`: takes a minute")
def test_every_single_bit_of_a_small_file() -> None:
    save({"global_step": 1, "w": torch.arange(4.0)}, "whole.ckpt")
    data = Path("whole.ckpt").read_bytes()
    harmless = 0
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        Path("damaged.ckpt").write_bytes(changed)
        try:
            loaded = load("damaged.ckpt")
        except FOUND:
            continue
        assert torch.equal(loaded["w"], torch.arange(4.0))
        assert loaded["global_step"] == 1
        harmless += 1
    assert harmless <= 8 * 8  # the name of the seal: without it, the archive's own checksums are compared
