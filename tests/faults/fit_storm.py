"""A training run that saves at every step, killed at the n-th system call that changes files, for every n; then it goes on.

``python fit_storm.py sync|async [--every N]``, with the compiled ``storage.c`` preloaded. What must hold: each resumed run ends with the
bits of the run that nobody killed, and a later kill never finds an earlier checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import warnings
from functools import partial

import storm
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning.fabric.checkpoint.generations import generation_of, newest_valid
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(folder: str, how: str, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = Line()
    data = DataLoader(TensorDataset(torch.randn(16, 4), torch.randn(16, 1)), batch_size=4)
    callback = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last="link")
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, plugins=[AsyncCheckpointIO()] if how == "async" else [],
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in model.state_dict().items()}


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
    code, said, calls = storm.in_child(lambda: fit(tempfile.mkdtemp(dir=options.where), options.how) and None, 10**9, -1, False)
    assert code == storm.SAVED, said
    killed = resumed = reached = 0
    for n in range(1, calls + 1, options.every):
        folder = tempfile.mkdtemp(dir=options.where)
        code, said, _ = storm.in_child(partial(fit, folder, options.how), n, storm.KILLS["kill-half"], False)  # type: ignore[arg-type]
        if code == storm.SAVED:  # threads do not make the same number of calls every time
            continue
        assert code == -9, said
        killed += 1
        try:
            path = newest_valid(folder)
        except FileNotFoundError:
            assert reached == 0, f"killed at call {n} of {calls}, and no checkpoint is left"
            shutil.rmtree(folder)
            continue
        generation = generation_of(path)
        assert generation is not None
        assert generation.global_step >= reached - (options.how == "async"), f"killed at call {n}: a later kill has lost steps"
        reached = max(reached, generation.global_step)
        weights = fit(folder, options.how, "last" if os.path.lexists(os.path.join(folder, "last.ckpt")) else path)
        assert all(torch.equal(weights[name], value) for name, value in expected.items()), f"killed at call {n}: other weights"
        resumed += 1
        shutil.rmtree(folder)
    print(json.dumps({"how": options.how, "calls": calls, "killed": killed, "resumed": resumed, "steps reached": reached}))


if __name__ == "__main__":
    main()
