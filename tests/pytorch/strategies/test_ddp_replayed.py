"""``Trainer(compile="step")`` in several processes gives what DDP gives without it: by a recorder for the CPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from tape import SmallNet, record_on_tapes

from lightning.fabric.precision import MixedPrecision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy


class Model(SmallNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((outputs["loss"].item(), [buffer.tolist() for buffer in self.net.buffers()]))

    def on_train_epoch_end(self) -> None:
        self.seen.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})


class ReadsOnRank1(Model):
    """A step that can be replayed in one of the two processes only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.device.type == "cpu" and torch.distributed.get_rank() == 1:
            batch[0].sum().item()
        return super().training_step(batch, batch_idx)


class Talks(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        return loss


class Gathers(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.all_gather(loss.detach())
        return loss


class Looks(Callback):
    """Sees gradients as the optimizer does."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        self.norms.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())


def data(rank: int, sizes: list[int]) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(rank)
    found = []
    for size in sizes:
        x = torch.randn(size, 5, generator=generator)
        found.append((x, x.sum(1, keepdim=True)))
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


def fit(
    rank: int, size: int, kind: Callable[[], Model], compile: Any, sizes: list[int], path: Any = None, val: Any = None, **arguments: Any
) -> Any:
    """The model, and what it is told about replays."""
    model = kind()
    torch.manual_seed(rank)
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": size, "max_epochs": 4, "logger": False, "enable_progress_bar": False, "strategy": DDPStrategy(),
        "enable_model_summary": False, "use_distributed_sampler": False, "enable_checkpointing": False, "log_every_n_steps": 2,
    }  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(**{**options, **arguments}, compile=compile).fit(model, data(rank, sizes), val and data(rank, val), ckpt_path=path)
    return model, [str(each.message) for each in caught if "compile='step'" in str(each.message)]


def outcome(model: Model) -> Any:
    return [{name: value.tolist() for name, value in model.state_dict().items()}, model.seen]


EVEN, UNEQUAL = [8] * 5, [8, 8, 8, 8, 5]


def overflowing() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}


CASES: dict[str, tuple[Callable[[], Model], list[int], Callable[[], dict[str, Any]], bool]] = {
    # model, sizes of batches, arguments, whether both processes replay
    "plain": (Model, EVEN, dict, True),
    "last batch smaller": (Model, UNEQUAL, dict, True),
    "clipping": (Model, EVEN, lambda: {"gradient_clip_val": 0.3}, True),
    "accumulation": (Model, UNEQUAL, lambda: {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, True),
    "16-mixed": (Model, EVEN, overflowing, True),
    "gradients are looked at": (Model, EVEN, lambda: {"callbacks": [Looks()]}, True),
    "buffers are not broadcast": (Model, EVEN, lambda: {"strategy": DDPStrategy(broadcast_buffers=False)}, True),
    "one process can't": (ReadsOnRank1, EVEN, dict, False),
}  # fmt: skip


def all_cases(rank: int, size: int) -> dict[str, Any]:
    used, found = record_on_tapes(), {}
    for name, (kind, sizes, arguments, replayed) in CASES.items():
        first, second = arguments(), arguments()
        plain, _ = fit(rank, size, kind, None, sizes, **first)
        used.clear()
        model, told = fit(rank, size, kind, "step", sizes, **second)
        looked = [[callback.norms for callback in each.get("callbacks", [])] for each in (first, second)]
        replays = sum(recorder.replays for recorder in used)
        found[name] = {
            "equal": outcome(plain) == outcome(model) and looked[0] == looked[1],
            "expected": not told and (replays >= 10 if replayed or rank == 0 else replays == 0),
            "told": told,
            "replays": replays,
        }
    return found


@pytest.fixture(scope="module")
def in_two() -> list[dict[str, Any]]:
    return run(all_cases, 2, timeout=120)


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_end_with_the_same_bits_as_without(in_two: list[dict[str, Any]], name: str) -> None:
    for found in in_two:
        assert found[name]["equal"], name
        assert found[name]["expected"], (found[name]["told"], found[name]["replays"])


def other_sizes(rank: int, size: int) -> Any:
    """Each process has batches of another size last: one of them replays while the other does not yet."""
    record_on_tapes()
    sizes = [8, 8, 8, 8, 4 + rank] if rank else [8] * 5
    plain, _ = fit(rank, size, Model, None, sizes)
    model, told = fit(rank, size, Model, "step", sizes)
    return outcome(plain) == outcome(model), told


def test_processes_with_batches_of_other_sizes() -> None:
    assert run(other_sizes, 2) == [(True, [])] * 2


def three(rank: int, size: int) -> Any:
    used = record_on_tapes()
    plain, _ = fit(rank, size, Model, None, EVEN)
    model, told = fit(rank, size, Model, "step", EVEN)
    again, _ = fit(rank, size, Model, "step", EVEN)
    far = max((a - b).abs().max().item() for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
    return far < 1e-4, outcome(model) == outcome(again), told, used[-1].replays >= 10


def test_three_processes_round_otherwise_and_always_the_same() -> None:
    assert run(three, 3) == [(True, True, [], True)] * 3


def talking(rank: int, size: int) -> list[Any]:
    record_on_tapes()
    found = []
    for kind in (Talks, Gathers):
        plain, _ = fit(rank, size, kind, None, EVEN)
        model, told = fit(rank, size, kind, "step", EVEN)
        found.append((outcome(plain) == outcome(model), told))
    return found


def test_a_step_that_communicates_runs_as_always_and_its_line_is_named() -> None:
    first, second = run(talking, 2)
    assert [equal for equal, _ in (*first, *second)] == [True] * 4
    ((_, of_reducing), (_, of_gathering)) = first
    assert len(of_reducing) == len(of_gathering) == 1
    assert "it communicates with other processes in the middle of a step" in of_reducing[0]
    assert "torch.distributed.all_reduce(total)" in of_reducing[0]
    assert "self.all_gather(loss.detach())" in of_gathering[0]


class FreeFlags(ReadsOnRank1):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Scheduled(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.0123, fused=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SetsRate(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 7:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.0123


def differences(rank: int, size: int) -> dict[str, float]:
    """How far apart the weights of the processes are in the end."""
    record_on_tapes()
    found = {}
    for kind in (FreeFlags, Scheduled, SetsRate):
        model, _ = fit(rank, size, kind, "step", EVEN if rank == 0 else [8, 7, 6, 5, 4])
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        everybodys = [torch.empty_like(weights) for _ in range(size)]
        torch.distributed.all_gather(everybodys, weights)
        found[kind.__name__] = (everybodys[0] - everybodys[1]).abs().max().item()
    return found


def test_processes_that_replay_and_that_do_not_keep_the_same_weights() -> None:
    assert run(differences, 2) == [{"FreeFlags": 0.0, "Scheduled": 0.0, "SetsRate": 0.0}] * 2


class OfNoOptimizer(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net[4].parameters(), 0.01, fused=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Before it, all gradients are let go of."""


class Sparse(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.seen = nn.Embedding(10, 3, sparse=True), []  # type: ignore[var-annotated]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.words(batch[0][:, 0].abs().long()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def unusual_gradients(rank: int, size: int) -> list[bool]:
    record_on_tapes()
    found = []
    for kind, val in ((OfNoOptimizer, EVEN), (Sparse, None)):
        plain, _ = fit(rank, size, kind, None, EVEN, val=val)  # type: ignore[arg-type]
        model, _ = fit(rank, size, kind, "step", EVEN, val=val)  # type: ignore[arg-type]
        found.append(outcome(plain) == outcome(model))
    return found


def test_parameters_without_optimizer_and_sparse_gradients() -> None:
    assert run(unusual_gradients, 2) == [[True, True]] * 2


def resumed(rank: int, size: int, folder: str) -> list[bool]:
    """From every batch, also within windows, with a recorder or without."""
    record_on_tapes()
    arguments: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 3}
    keep = {"enable_checkpointing": True, "default_root_dir": folder}
    saver = ModelCheckpoint(folder, "{step}-{epoch}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = fit(rank, size, Model, "step", EVEN, callbacks=[saver, EachBatch(folder)], **arguments, **keep)
    found = []
    for index in (2, 3, 6, 7):
        for compile in ("step", None):
            model, _ = fit(rank, size, Model, compile, EVEN, path=f"{folder}/batch{index}.ckpt", **arguments)
            found.append([v.tolist() for v in model.state_dict().values()] == [v.tolist() for v in whole.state_dict().values()])
    return found


class EachBatch(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/batch{trainer.fit_loop.progress.total_batches}.ckpt")


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    for found in run(resumed, 2, str(tmp_path), timeout=120):
        assert all(found), found


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (lambda: DDPStrategy(find_unused_parameters=True), "find_unused_parameters communicates"),
        (lambda: "fsdp", "the strategy FSDPStrategy"),
    ],
)
def test_strategies_that_talk_within_a_pass_are_refused(strategy: Callable[[], Any], message: str) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=strategy(), compile="step", max_epochs=1, logger=False, enable_checkpointing=False
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Model(), DataLoader(TensorDataset(torch.ones(4, 5), torch.ones(4, 1)), 2))
    assert not torch.distributed.is_initialized()  # the error comes before the processes meet
