"""What users do around and within recorded steps that a recording can't know of: the numbers stay those of steps that run as always."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from tape import SmallNet, TapeRecorder, record_on_tapes
from trainers import quiet

from lightning.fabric.precision import MixedPrecision
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback, ModelSummary


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[TapeRecorder]:
    """Let the CPU record; gives the recorders that were used."""
    return record_on_tapes(monkeypatch.setattr)


class Model(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, *_ = batch
        return (self.net(x) - y + self.center).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1, fused=True)


def fitted(kind: Callable[[], Any], compile: Any, data: list[Any], val: Any = None, **arguments: Any) -> tuple[Any, list[str]]:
    """A model, and what it is told about replays."""
    model = kind()
    torch.manual_seed(1)
    loader = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet(**{"max_epochs": 3, **arguments}, compile=compile)
        trainer.fit(model, loader, None if val is None else DataLoader(val, batch_size=None))
    return model, [str(each.message) for each in caught if "compile='step'" in str(each.message)]


def batches(count: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(8, 5, generator=generator) for _ in range(count)]
    return [(x, x.sum(1, keepdim=True)) for x in xs]


def compared(
    kind: Callable[[], Any], data: list[Any] | None = None, close: float = 0.0, given: Callable[[], dict[str, Any]] = dict, **arguments: Any
) -> tuple[Any, list[str]]:
    """Fit with and without; the weights, and what the model has seen, must be the same."""
    data = batches() if data is None else data
    plain, _ = fitted(kind, None, data, **given(), **arguments)
    model, told = fitted(kind, "step", data, **given(), **arguments)
    for (name, ours), theirs in zip(model.state_dict().items(), plain.state_dict().values()):
        assert (ours.double() - theirs.double()).abs().max().item() <= close, name
    assert model.seen == plain.seen
    return model, told


def scaled(**scaler: Any) -> Callable[[], dict[str, Any]]:
    """16-mixed on the CPU."""
    return lambda: {"plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **scaler))}


# ---- 16-mixed ---------------------------------------------------------------------------------------------------------


class FreeFlags(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Reads(FreeFlags):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].sum().item()
        return super().training_step(batch, batch_idx)


def test_an_optimizer_that_was_made_fused_for_recordings_trains_on_without_them() -> None:
    _, told = compared(Reads, given=scaled(init_scale=2.0**10, growth_interval=3), close=1e-6)
    assert "reads from the device" in told[0]


class Unfreezes(FreeFlags):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net[4].parameters(), 0.01)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})


def test_groups_that_are_added_in_mid_run_get_the_flags_too(recorders: list[TapeRecorder]) -> None:
    _, told = compared(Unfreezes, given=scaled(init_scale=2.0**10, growth_interval=3), close=1e-6)
    assert not told
    assert recorders[-1].replays >= 16


class Momentum(Model):
    dampening = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, dampening=self.dampening)

    def on_train_batch_end(self, *_: Any) -> None:
        states = self.trainer.optimizers[0].state.values()
        self.seen.append(
            max([v["momentum_buffer"].abs().max().item() for v in states if v.get("momentum_buffer") is not None], default=0.0)
        )


class Dampened(Momentum):
    dampening = 0.5


@pytest.mark.parametrize("kind", [Momentum, Dampened])
def test_momentum_begins_with_zero_where_the_first_gradients_overflow(kind: type[Momentum]) -> None:
    junk = [torch.full((size,), 7e30) for size in (30, 6, 6, 6, 1) * 50]  # what memory that is not filled may hold
    del junk
    plain, _ = fitted(kind, None, batches(), **scaled(init_scale=2.0**24)())
    model, _ = fitted(kind, "step", batches(), **scaled(init_scale=2.0**24)())
    assert plain.seen[0] == 0.0
    torch.testing.assert_close(torch.tensor(model.seen), torch.tensor(plain.seen), rtol=1e-4, atol=1e-6)


class Clips(Model):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, 0.3, "norm")


class Unscales(Model):
    def on_after_backward(self) -> None:
        self.trainer.precision_plugin.unscale_gradients(self.trainer.optimizers[0])


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_hook_that_clips_does_not_unscale_again(recorders: list[TapeRecorder], arguments: dict[str, Any]) -> None:
    _, told = compared(Clips, given=scaled(init_scale=2.0**24, growth_interval=2), **arguments)
    assert not told
    assert recorders[-1].replays >= 16


def test_a_hook_that_unscales_in_the_middle_of_a_step_is_noticed() -> None:
    _, told = compared(Unscales, given=scaled(init_scale=2.0**10, growth_interval=3))
    assert "a hook in the middle of a step unscales gradients" in told[0]


# ---- parameters -------------------------------------------------------------------------------------------------------


class OfNoOptimizer(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net[4].parameters(), 0.01, fused=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Before it, all gradients are let go of."""

    def on_after_backward(self) -> None:
        self.seen.append([None if p.grad is None else p.grad.tolist() for p in self.parameters()])


@pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 3}], ids=str)
def test_gradients_of_parameters_without_optimizer_add_up_as_always(recorders: list[TapeRecorder], arguments: dict[str, Any]) -> None:
    _, told = compared(OfNoOptimizer, val=batches(1), **arguments)
    assert not told
    assert recorders[-1].replays >= 16


class FreezesEarly(Model):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].weight.requires_grad_(False)


def test_what_is_frozen_before_anything_is_recorded_is_not_decayed() -> None:
    compared(FreezesEarly, batches(2), accumulate_grad_batches=2)


class FreezesAtStart(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 7:
            self.net[0].requires_grad_(False)


class FreezesInStep(Model):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        if self.global_step == 7:
            self.net[0].requires_grad_(False)


class ReplacesInStep(Model):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        self.center = self.center * 0.9 + 0.1


class ReplacesWithin(Model):
    def on_after_backward(self) -> None:
        self.center = self.center * 0.9 + 0.1


class SwitchesWithin(Model):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.global_step == 7:
            self.net[1].eval()


class SetsDropout(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[3].p = 0.1 if self.global_step < 12 else 0.4


@pytest.mark.parametrize("kind", [FreezesAtStart, FreezesInStep, ReplacesInStep, ReplacesWithin, SwitchesWithin, SetsDropout])
def test_what_hooks_freeze_replace_or_switch_in_mid_epoch_is_taken_up(kind: type[Model]) -> None:
    compared(kind)


def freeze(trainer: Any, module: Any, *_: Any) -> None:
    module.net[0].weight.requires_grad = trainer.global_step < 9


class OwnBar(ModelSummary):
    """One of ours, with a hook of the user's."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        freeze(trainer, module)


@pytest.mark.parametrize("callback", [lambda: LambdaCallback(on_train_batch_start=freeze), OwnBar])
def test_callbacks_of_ours_that_run_code_of_the_users_count_as_theirs(callback: Callable[[], Callback]) -> None:
    compared(Model, given=lambda: {"callbacks": [callback()]})


def test_outputs_that_a_function_keeps_are_its_own() -> None:
    kept: list[Any] = []
    keep = LambdaCallback(on_train_batch_end=lambda trainer, module, outputs, *_: kept.append(outputs["loss"]))
    compared(Model, given=lambda: {"callbacks": [keep]})
    plain, replayed = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    assert len({loss.item() for loss in replayed}) > 20
    assert all(map(torch.equal, plain, replayed))


class Heads(Model):
    """Two kinds of steps train two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 1), "b": nn.Linear(5, 1)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, head = batch
        return (self.heads[head](x) - y).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([name for name, parameter in self.named_parameters() if parameter.grad is not None])


class HeadsOfTheirOwn(Heads):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)


@pytest.mark.parametrize("kind", [Heads, HeadsOfTheirOwn])
def test_gradients_of_another_kind_of_step_are_gone(kind: type[Model], recorders: list[TapeRecorder]) -> None:
    _, told = compared(kind, [(*batch, "ab"[index % 2]) for index, batch in enumerate(batches())])
    assert not told
    assert recorders[-1].replays >= 16


@pytest.mark.parametrize("kind", [Heads, HeadsOfTheirOwn])
def test_windows_that_train_different_parameters_run_as_always(kind: type[Model]) -> None:
    data = [(*batch, "ab"[index // 2 % 2]) for index, batch in enumerate(batches())]
    _, told = compared(kind, data, accumulate_grad_batches=2)
    assert "some parameters get gradients in some batches of an accumulation window only" in told[0]


class Sparse(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 3, sparse=True)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.words(batch[0][:, 0].abs().long()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_sparse_gradients_run_as_always() -> None:
    _, told = compared(Sparse)
    assert "a module gives sparse gradients" in told[0]


class Interrupted(Model):
    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        Interrupted.calls += 1  # not an attribute of the instance, whose change would be noticed
        if Interrupted.calls == 3:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


def test_an_interrupt_in_the_middle_of_a_recording_ends_it(recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupted, "calls", 0)
    with pytest.raises(KeyboardInterrupt):
        fitted(Interrupted, "step", batches())
    assert recorders[-1].recordings == 1
    assert recorders[-1].tape is None
