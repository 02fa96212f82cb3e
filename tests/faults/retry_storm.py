"""A training run with ``on_save_error="retry"`` that saves at every step, on a disk that refuses the n-th system call, for every n.

``python retry_storm.py sync|async [--every N]``, with the compiled ``storage.c`` preloaded. What must hold: the run goes on to its end with
the same weights; its last checkpoint is there, whole; and no link leads nowhere.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shutil
import tempfile
import warnings
from functools import partial

import fit_storm
import storm
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric.checkpoint.background import BackgroundCheckpointIO
from lightning.fabric.checkpoint.generations import generation_of, newest_valid
from lightning.fabric.checkpoint.io import load
from lightning.fabric.checkpoint.writable import check_writable
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

STEPS = 8


def fit(folder: str, how: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = fit_storm.Line()
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 1)), batch_size=4)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last="link")],
        async_checkpointing=how == "async", on_save_error="retry",
    )  # fmt: skip
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, BackgroundCheckpointIO)
    writer.first_pause = writer.longest_pause = 0.01
    trainer.fit(model, data)
    return {name: value.clone() for name, value in model.state_dict().items()}


def compared(folder: str, how: str, expected: dict[str, torch.Tensor]) -> None:
    weights = fit(folder, how)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("how", choices=["sync", "async"])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--where", default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    expected = fit(tempfile.mkdtemp(dir=options.where), options.how)
    work = partial(compared, how=options.how, expected=expected)
    code, said, calls = storm.in_child(partial(work, tempfile.mkdtemp(dir=options.where)), 10**9, -1, False)
    assert code == storm.SAVED, said
    # A folder that can't be written to is an error before the first step: what looks for that is left in peace.
    looking = storm.in_child(partial(check_writable, tempfile.mkdtemp(dir=options.where)), 10**9, -1, False)[2]
    runs = left = 0
    for n in range(looking + 1, calls + 1, options.every):
        for number in (errno.ENOSPC, errno.EIO):
            folder = tempfile.mkdtemp(dir=options.where)
            code, said, _ = storm.in_child(partial(work, folder), n, number, False)
            where = f"call {n} of {calls} refused ({number}); left: {sorted(os.listdir(folder))}"
            assert code == storm.SAVED, f"{where}: the run did not go on: {said}"
            path = newest_valid(folder)
            generation = generation_of(path)
            assert generation is not None
            assert generation.global_step == STEPS, f"{where}: {path}"
            assert load(os.path.join(folder, "last.ckpt"))["global_step"] == STEPS, where
            assert all(torch.equal(load(path)["state_dict"][name], value) for name, value in expected.items()), where
            names = os.listdir(folder)
            assert len(names) <= 3, where  # a file whose removal was refused, perhaps
            runs, left = runs + 1, left + (len(names) > 2)
            shutil.rmtree(folder)
    print(json.dumps({"how": options.how, "calls": calls, "runs": runs, "with a file that could not be removed": left}))


if __name__ == "__main__":
    main()
