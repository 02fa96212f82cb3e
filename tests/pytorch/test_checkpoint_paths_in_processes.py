"""Checkpoints that are looked for in a run of several processes: what rank 0 finds counts for all."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run, run_to_end
from trainers import Numbers, Weight, joined

from lightning.pytorch.callbacks import ModelCheckpoint


def resumed(rank: int, size: int, root: str, ckpt_path: str) -> list[Any]:
    """The steps of a run that goes on from what a first one has left in ``root``, which only rank 0 sees."""
    warnings.filterwarnings("ignore", "The checkpoint folder .* is not empty")
    model = Weight()
    folder = str(Path(root) / str(rank))  # the disk of another machine
    saver = ModelCheckpoint(dirpath=f"{root}/0", save_last=True)
    joined(max_epochs=1, enable_checkpointing=True, callbacks=[saver]).fit(model, DataLoader(Numbers(8)))
    # A name of the callback's own folder is looked for before rank 0's is known to all.
    again = ModelCheckpoint(dirpath=folder, save_last=True)
    trainer = joined(max_epochs=2, enable_checkpointing=True, callbacks=[again], default_root_dir=folder)
    if ckpt_path == "best":
        again.best_model_path = saver.best_model_path if rank == 0 else "/nowhere"
    trainer.fit(model, DataLoader(Numbers(8)), ckpt_path=ckpt_path)
    return [trainer.global_step, trainer.ckpt_path]


@pytest.mark.parametrize("ckpt_path", ["last", "best"])
def test_checkpoint_that_only_rank_0_finds_is_loaded_everywhere(tmp_path: Path, ckpt_path: str) -> None:
    first, second = run(resumed, 2, str(tmp_path), ckpt_path)
    assert first == second
    assert first[0] == 8
    assert first[1].startswith(f"{tmp_path}/0/")


@pytest.mark.parametrize("ckpt_path", ["hpc", "best"])
def test_nothing_to_be_found_is_the_same_error_in_every_process(tmp_path: Path, ckpt_path: str) -> None:
    outcomes = run_to_end(missing, 2, str(tmp_path), ckpt_path)
    assert [outcome.error for outcome in outcomes] == ["ValueError"] * 2
    assert outcomes[0].message == outcomes[1].message
    assert f"ckpt_path={ckpt_path!r}" in outcomes[0].message


def missing(rank: int, size: int, root: str, ckpt_path: str) -> None:
    saver = ModelCheckpoint(dirpath=root)
    joined(enable_checkpointing=True, callbacks=[saver], default_root_dir=root).fit(Weight(), DataLoader(Numbers(8)), ckpt_path=ckpt_path)
