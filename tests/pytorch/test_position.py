"""Runs that another number of processes goes on with, in the middle of an epoch."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import DDPStrategy


class Noting(LightningModule):
    """Notes which samples it was given, and in which batch of which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch.tolist()))
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.001)


def fit(rank: int, size: int, folder: str, samples: int, batch_size: int, steps: int, epochs: int, ckpt_path: str | None) -> dict[str, Any]:
    torch.manual_seed(5)
    return fitted(DataLoader(range(samples), batch_size=batch_size), size, folder, steps, epochs, ckpt_path)  # type: ignore[arg-type]


def fitted(loader: Any, size: int, folder: str, steps: int, epochs: int, ckpt_path: str | None) -> dict[str, Any]:
    module = Noting()

    def save(trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(f"{folder}/step={trainer.global_step}.ckpt")

    trainer = Trainer(
        accelerator="cpu", devices=size, strategy=DDPStrategy() if size > 1 else "auto", max_epochs=epochs, max_steps=steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=False, callbacks=LambdaCallback(on_train_batch_end=save),
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return {"seen": module.seen, "steps": trainer.global_step}


def shuffled(rank: int, size: int, folder: str, workers: int, generator: bool, steps: int, ckpt_path: str | None) -> dict[str, Any]:
    torch.manual_seed(5 if ckpt_path is None else 6)
    loader: Any = DataLoader(
        range(24), batch_size=6 // size, shuffle=True, num_workers=workers,
        generator=torch.Generator().manual_seed(9) if generator else None,
    )  # fmt: skip
    return fitted(loader, size, folder, steps, 3, ckpt_path)


def ids(results: list[dict[str, Any]], epoch: int) -> list[int]:
    return sorted(sample for result in results for at, _, batch in result["seen"] if at == epoch for sample in batch)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 3)])
def test_the_rest_of_an_epoch_is_taken_once_by_another_number_of_processes(tmp_path: Path, first: int, second: int) -> None:
    samples, size = 24, 2
    begun = run(fit, first, str(tmp_path), samples, size, 2, 2, None)
    taken = ids(begun, 0)
    assert len(taken) == 2 * size * first
    rest = run(fit, second, str(tmp_path), samples, size, -1, 2, str(tmp_path / "step=2.ckpt"))
    assert sorted(taken + ids(rest, 0)) == list(range(samples))
    assert ids(rest, 1) == list(range(samples))  # and the next epoch is a whole one
    assert min(index for at, index, _ in rest[0]["seen"] if at == 0) == 2 * first // second
    assert len({result["steps"] for result in rest}) == 1


def test_a_number_of_samples_that_does_not_divide_repeats_one_at_most(tmp_path: Path) -> None:
    begun = run(fit, 1, str(tmp_path), 9, 2, 1, 1, None)
    rest = run(fit, 2, str(tmp_path), 9, 2, -1, 1, str(tmp_path / "step=1.ckpt"))
    assert [batch for _, _, batch in rest[0]["seen"]] == [[2, 4], [6, 8]]
    assert [batch for _, _, batch in rest[1]["seen"]] == [[3, 5], [7]]
    assert sorted(ids(begun, 0) + ids(rest, 0)) == list(range(9))


@pytest.mark.parametrize("processes", [(1, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_an_epoch_may_change_hands_again(tmp_path: Path, processes: tuple[int, ...]) -> None:
    taken: list[int] = []
    path = None
    for count, steps in zip(processes, (2, 3, -1)):
        results = run(fit, count, str(tmp_path), 24, 2, steps, 1, path)
        path = str(tmp_path / f"step={steps}.ckpt")
        taken += ids(results, 0)
    assert sorted(taken) == list(range(24))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("generator", [False, True], ids=["the global generator", "a generator of its own"])
def test_the_rest_of_a_shuffled_epoch_of_one_process_is_taken_once_by_several(tmp_path: Path, workers: int, generator: bool) -> None:
    begun = [shuffled(0, 1, str(tmp_path), workers, generator, 5, None)]  # a whole epoch, and one batch
    assert ids(begun, 0) == list(range(24))
    resumed = [shuffled(0, 1, str(tmp_path), workers, generator, 6, str(tmp_path / "step=5.ckpt"))]
    rest = run(shuffled, 2, str(tmp_path), 0, generator, -1, str(tmp_path / "step=6.ckpt"))
    assert sorted(ids(begun, 1) + ids(resumed, 1) + ids(rest, 1)) == list(range(24))
    assert len(ids(rest, 1)) == 12
    assert ids(rest, 2) == list(range(24))


class Backwards(torch.utils.data.Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(23, -1, -1))

    def __len__(self) -> int:
        return 24


def in_own_order(rank: int, size: int, folder: str, steps: int, ckpt_path: str | None) -> dict[str, Any]:
    loader: Any = DataLoader(range(24), batch_size=6 // size, sampler=Backwards())  # type: ignore[arg-type]
    with (
        pytest.warns(UserWarning, match="saved by 1 processes and is gone on from by 2.*begins anew")
        if size > 1 and rank == 0
        else nullcontext()
    ):
        return fitted(loader, size, folder, steps, 1, ckpt_path)


def test_an_epoch_in_an_order_that_cannot_be_told_begins_anew_and_that_is_said(tmp_path: Path) -> None:
    run(in_own_order, 1, str(tmp_path), 2, None)
    rest = run(in_own_order, 2, str(tmp_path), -1, str(tmp_path / "step=2.ckpt"))
    assert ids(rest, 0) == list(range(24))
