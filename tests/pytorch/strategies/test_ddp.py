"""The Trainer over DDPStrategy, in processes that something else has started and joined."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from training import batches, largest_difference, part, plain

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        self.validated = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(rank: int, size: int, folder: str, **trainer: Any) -> dict[str, Any]:
    data: list[Any] = [part(batch, rank, size) for batch in batches()]
    module = Regression()
    run = Trainer(
        accelerator="cpu", devices=size, max_epochs=2, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=0.5, accumulate_grad_batches=2, use_distributed_sampler=False, **trainer,
    )  # fmt: skip
    # The numbers of samples validated differ, as they may: validation has no collective of its own.
    run.fit(module, _loader(data), _loader(data[: 1 + rank]))
    saved = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"] if run.is_global_zero else None  # type: ignore[union-attr]
    return {
        "weights": plain(module.state_dict()),
        "saved": None if saved is None else plain(saved),
        "rank": (run.global_rank, run.world_size, run.is_global_zero),
        "steps": run.global_step,
    }


def _loader(data: list[Any]) -> Any:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def fit_in_processes(rank: int, size: int, folder: str) -> dict[str, Any]:
    return fit(rank, size, folder, strategy=DDPStrategy())


def fit_alone(rank: int, size: int, folder: str) -> dict[str, Any]:
    return fit(rank, size, folder)


def test_weights_and_checkpoint_are_those_of_one_process(tmp_path: Path) -> None:
    first, second = run(fit_in_processes, 2, str(tmp_path / "two"))
    (alone,) = run(fit_alone, 1, str(tmp_path / "one"))
    assert first["weights"] == second["weights"]
    assert largest_difference(first["weights"], alone["weights"]) < 1e-6
    assert first["saved"] == first["weights"]
    assert [result["rank"] for result in (first, second)] == [(0, 2, True), (1, 2, False)]
    assert first["steps"] == second["steps"] == alone["steps"] == 4
