"""Checkpoints of very many processes: their states packed, which goes on as exactly as a list of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run
from torch.utils.data import DataLoader
from trainers import Numbers, joined, quiet

from lightning.fabric import collectives
from lightning.pytorch import Callback, LightningModule, packed


class Noisy(LightningModule):
    """Its steps draw numbers of each process's own, and log what each process sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(1, 1)
        self.drawn: list[float] = []

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            torch.manual_seed(100 + self.trainer.global_rank)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noise = torch.rand(())
        self.drawn.append(noise.item())
        self.log("noise", noise, on_epoch=True, sync_dist=True)
        return (self.layer(batch.float().reshape(-1, 1)) + noise).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    def __init__(self, batch_idx: int, path: str) -> None:
        self.batch_idx, self.path = batch_idx, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def goes_on(rank: int, size: int, folder: str) -> list[Any]:
    packed.MANY = 2
    path = f"{folder}/a.ckpt"
    whole, rest = Noisy(), Noisy()
    loader = lambda: DataLoader(Numbers(12), shuffle=True)  # noqa: E731
    first = joined(max_epochs=2, callbacks=[SaveAt(2, path)])
    first.fit(whole, loader())
    second = joined(max_epochs=2)
    second.fit(rest, loader(), ckpt_path=path)
    same = [torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values())]
    means = [trainer.callback_metrics["noise_epoch"].item() for trainer in (first, second)]
    return [all(same), whole.drawn[3:] == rest.drawn, means[0] == means[1], whole.drawn[0]]


def test_a_run_with_packed_states_goes_on_exactly(tmp_path: Path) -> None:
    first, second = run(goes_on, 2, str(tmp_path))
    assert first[:3] == second[:3] == [True, True, True]
    assert first[3] != second[3]
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["keraunos"]["processes"]
    assert sorted(kept) == ["ends", "packed"]
    states = packed.opened(kept)
    assert len(states) == len(list(states)) == 2
    assert not torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])
    assert torch.equal(states[-1]["random"]["torch"], states[1]["random"]["torch"])
    with pytest.raises(IndexError):
        states[2]


@pytest.mark.filterwarnings("ignore")  # of another number of processes
def test_another_number_of_processes_goes_on_from_packed_states(tmp_path: Path) -> None:
    run(goes_on, 2, str(tmp_path))
    model = Noisy()
    trainer = quiet(max_epochs=2)
    trainer.fit(model, DataLoader(Numbers(12)), ckpt_path=str(tmp_path / "a.ckpt"))
    assert trainer.current_epoch == 2


def gathered(rank: int, size: int) -> Any:
    found = collectives.gather_bytes(torch.arange(rank + 1, dtype=torch.uint8))
    return None if found is None else (found[0].tolist(), found[1])


def test_bytes_of_all_processes_reach_one_of_them() -> None:
    assert run(gathered, 3) == [([0, 0, 1, 0, 1, 2], [1, 2, 3]), None, None]


def test_states_that_run_code_are_refused() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    import io
    import pickle

    buffer = io.BytesIO()
    torch.save(Evil(), buffer, pickle_module=pickle)
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    states = packed.opened({"packed": data, "ends": torch.tensor([data.numel()])})
    with pytest.raises(pickle.UnpicklingError):
        states[0]


def test_no_states_are_none_in_either_form() -> None:
    assert len(packed.opened(None)) == len(packed.opened([])) == 0
    assert packed.opened([{"a": 1}]) == [{"a": 1}]
