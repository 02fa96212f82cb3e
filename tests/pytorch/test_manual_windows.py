"""Accumulation windows of one's own, in manual optimization: a run that is interrupted within them goes on to the same bits."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run

from lightning.pytorch import Callback, LightningModule, Trainer

BATCHES = 10


class Manual(LightningModule):
    """Two networks, whose optimizers step after every third and every fourth batch."""

    def __init__(self, toggles: bool = False, syncs: bool = True, raw: bool = False, zeroes_late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        self.toggles, self.syncs, self.raw, self.zeroes_late = toggles, syncs, raw, zeroes_late

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            every = 3 + index
            last = (batch_idx + 1) % every == 0
            if self.zeroes_late and batch_idx % every == 0:
                optimizer.zero_grad()
            if self.toggles:
                with optimizer.toggle_model(sync_grad=last or self.syncs):
                    self.backward_of(batch, index)
            else:
                self.backward_of(batch, index)
            if last:
                optimizer.step()
                if not self.zeroes_late:
                    optimizer.zero_grad()

    def backward_of(self, batch: Tensor, index: int) -> None:
        loss = (self.parts[0](batch) + self.parts[1](batch) - batch.sum(1, keepdim=True)).square().mean() * (1 + index)
        loss.backward() if self.raw else self.manual_backward(loss)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.parts[0](batch)

    def train_dataloader(self) -> Any:
        data = torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(5))
        return torch.utils.data.DataLoader(data, batch_size=2)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.parts[0].parameters(), lr=0.1), torch.optim.SGD(self.parts[1].parameters(), lr=0.01, momentum=0.9)]


class SaveAfterEachBatch(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(f"{batch_idx}.ckpt")


class SaveAtTheStart(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint("again.ckpt")


def weights_after(ckpt_path: str | None, size: int = 1, callbacks: Any = (), settings: Any = None, **options: Any) -> dict[str, Tensor]:
    model = Manual(**options)
    Trainer(
        max_epochs=1, accelerator="cpu", devices=size, limit_train_batches=BATCHES, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks), **(settings or {}),
    ).fit(model, val_dataloaders=torch.ones(2, 3), ckpt_path=ckpt_path)  # fmt: skip
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


OPTIONS: list[dict[str, Any]] = [{}, {"toggles": True}, {"raw": True}, {"zeroes_late": True}, {"toggles": True, "zeroes_late": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("every", [None, 2])
def test_gradients_within_the_users_own_windows_are_kept(options: dict[str, Any], every: int | None) -> None:
    settings = {"val_check_interval": every}
    whole = weights_after(None, callbacks=[SaveAfterEachBatch()], settings=settings, **options)
    for batch in range(BATCHES - 1):
        resumed = weights_after(f"{batch}.ckpt", callbacks=[SaveAtTheStart()], settings=settings, **options)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), batch
        again = weights_after("again.ckpt", settings=settings, **options)
        assert all(torch.equal(value, again[name]) for name, value in whole.items()), batch


def test_gradients_that_a_step_has_used_are_not_kept() -> None:
    weights_after(None, callbacks=[SaveAfterEachBatch()], toggles=True, zeroes_late=True)
    kept = [set(torch.load(f"{batch}.ckpt", weights_only=True)["keraunos"].get("gradients", ())) for batch in range(BATCHES)]
    # The first optimizer has stepped after batch 2, and the second one ran its backward pass in that batch too.
    assert {name.split(".")[1] for name in kept[3]} == {"0"}  # the second one stepped last
    assert {name.split(".")[1] for name in kept[4]} == {"0", "1"}


def test_validation_within_a_window_leaves_its_gradients_alone() -> None:
    whole = weights_after(None)
    validated = weights_after(None, settings={"val_check_interval": 2})
    assert all(torch.equal(value, validated[name]) for name, value in whole.items())


def resume_everywhere(rank: int, size: int, folder: str, options: dict[str, Any], strategy: Any) -> list[int]:
    import os

    os.chdir(folder)
    warnings.filterwarnings("ignore", "FSDPStrategy was given no auto_wrap_policy")
    settings = {"strategy": strategy}
    whole = weights_after(None, size, [SaveAfterEachBatch()], settings, **options)
    wrong = []
    for batch in range(BATCHES - 1):
        resumed = weights_after(f"{batch}.ckpt", size, (), settings, **options)
        if not all(torch.equal(value, resumed[name]) for name, value in whole.items()):
            wrong.append(batch)
    return wrong


@pytest.mark.parametrize("options", [{"toggles": True, "syncs": False}, {"zeroes_late": True}], ids=str)
def test_two_processes_go_on_with_the_gradients_of_their_own(tmp_path: Path, options: dict[str, Any]) -> None:
    assert run(resume_everywhere, 2, str(tmp_path), options, "ddp_find_unused_parameters_true", timeout=200) == [[], []]


def test_two_processes_with_divided_weights_go_on_within_a_window(tmp_path: Path) -> None:
    assert run(resume_everywhere, 2, str(tmp_path), {"toggles": False}, "fsdp", timeout=200) == [[], []]
