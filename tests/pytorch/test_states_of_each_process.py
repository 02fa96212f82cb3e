"""What processes have otherwise than rank 0 goes through a checkpoint: buffers that nothing makes equal, and callbacks."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy


class Net(LightningModule):
    """Normalises by a running mean of its own process; another buffer is the same in all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(2, 1)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("same", torch.zeros(1000))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * batch.mean(0)
        return (self.layer(batch - self.mean) - 1.0).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counter(Callback):
    """Counts in steps of its rank."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.count += 1 + trainer.global_rank

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Saver(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(f"{batch_idx}.ckpt")


def fit(size: int, ckpt_path: str | None, broadcast: bool = False, **settings: Any) -> Any:
    model, counter = Net(), Counter()
    callbacks = [counter, Saver()] if ckpt_path is None else [counter]
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    strategy = DDPStrategy() if broadcast else DDPStrategy(broadcast_buffers=False)
    data = torch.randn(16, 2, generator=torch.Generator().manual_seed(5))
    Trainer(
        max_epochs=1, accelerator="cpu", devices=size, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **settings,
    ).fit(model, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=ckpt_path)  # type: ignore[arg-type]  # fmt: skip
    return {name: value.tolist() for name, value in model.state_dict().items()}, counter.count


def resume_with(rank: int, size: int, folder: str) -> Any:
    os.chdir(folder)
    whole = fit(size, None)
    return [fit(size, f"{batch}.ckpt") == whole for batch in range(3)], whole[1]


def test_processes_go_on_with_buffers_and_callbacks_of_their_own(tmp_path: Path) -> None:
    assert run(resume_with, 2, str(tmp_path), timeout=200) == [([True] * 3, 4), ([True] * 3, 8)]
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    assert saved["callbacks"]["Counter"] == {"count": 2}
    first, second = (part["apart"] for part in saved["keraunos"]["processes"])
    assert first == {}
    assert set(second["buffers"]) == {"mean"}
    assert set(second["callbacks"]) == {"Counter"}


def resume_alone(rank: int, size: int, folder: str) -> list[str]:
    os.chdir(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(size, "1.ckpt")
    return [str(each.message) for each in caught if "different states of" in str(each.message)]


def test_another_number_of_processes_takes_those_of_rank_zero_and_says_so(tmp_path: Path) -> None:
    run(resume_with, 2, str(tmp_path), timeout=200)
    (told,) = run(resume_alone, 1, str(tmp_path), timeout=200)
    assert len(told) == 1
    assert "['Counter', 'mean']: those of rank 0 are used" in told[0]


def save_alike(rank: int, size: int, folder: str) -> None:
    os.chdir(folder)
    fit(size, None, broadcast=True)


def test_buffers_that_ddp_makes_equal_are_not_stored_again(tmp_path: Path) -> None:
    run(save_alike, 2, str(tmp_path), timeout=200)
    parts = torch.load(tmp_path / "1.ckpt", weights_only=True)["keraunos"]["processes"]
    assert ["buffers" in part["apart"] for part in parts] == [False, False]


def resume_within_windows(rank: int, size: int, folder: str) -> Any:
    os.chdir(folder)
    whole = fit(size, None, broadcast=True, accumulate_grad_batches=3)
    return [fit(size, f"{batch}.ckpt", broadcast=True, accumulate_grad_batches=3) == whole for batch in range(3)]


def test_buffers_that_ddp_makes_equal_after_a_window_are_apart_within_it(tmp_path: Path) -> None:
    assert run(resume_within_windows, 2, str(tmp_path), timeout=200) == [[True] * 3] * 2
    saved = [torch.load(tmp_path / f"{batch}.ckpt", weights_only=True)["keraunos"]["processes"][1]["apart"] for batch in range(3)]
    assert ["buffers" in apart for apart in saved] == [True, True, False]
