"""Losses and gradients that are not finite: an error that says where they come from, a warning, or an update that is left out."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from trainers import Rows, quiet

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loops.finite import NonFiniteError, are_finite

NAN, INF = float("nan"), float("inf")


class Root(nn.Module):
    """No number where its input is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Net(LightningModule):
    """A loss that is finite as long as no sample is negative; ``after`` is added to it."""

    def __init__(self, after: float = 0.0, optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.ModuleDict({"root": Root(), "norm": nn.BatchNorm1d(3), "drop": nn.Dropout(0.5), "last": nn.Linear(3, 1)})
        self.after = after
        self.bad_steps: set[int] = set()
        self.optimizer_class = optimizer or torch.optim.SGD
        self.drawn: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.drawn.append(torch.rand(()).item())
        x = self.net["norm"](self.net["root"](batch))
        loss = self.net["last"](self.net["drop"](x)).square().mean()
        self.log("loss_value", loss, on_step=True, on_epoch=True)
        return loss + (self.after if batch_idx in self.bad_steps else 0.0)

    def configure_optimizers(self) -> Any:
        return self.optimizer_class(self.parameters(), lr=0.01)


def data(count: int = 6, negative: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(4, 3, generator=generator) - (2.0 if index in negative else 0.0) for index in range(count)]


def given(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def error_of(module: LightningModule, batches: Any, **arguments: Any) -> str:
    trainer = quiet(on_nonfinite="error", **arguments)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(module, given(batches))
    return str(caught.value)


# ---- error -----------------------------------------------------------------------------------------------------------


def test_error_names_place_and_the_first_module_that_was_not_finite() -> None:
    module = Net()
    text = error_of(module, data(negative=(3,)), max_epochs=2)
    assert "The loss is not finite (nan) in epoch 0, batch 3 (global step 3)." in text
    assert "The first module whose output was not finite is `net.root` (Root): 12 of 12 values are NaN. Its input was finite." in text


def test_error_comes_before_the_step_and_leaves_no_trace() -> None:
    module, good = Net(), Net()
    torch.manual_seed(4)
    error_of(module, data(negative=(3,)))
    torch.manual_seed(4)
    # What three good steps and the failed forward pass give: the search changed nothing after that.
    quiet(max_steps=3).fit(good, given(data()))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), good.parameters()))
    assert int(module.net["norm"].num_batches_tracked) == 4  # the search ran the forward pass of the batch a second time
    assert module.trainer.global_step == 3


def test_search_runs_with_the_same_random_numbers() -> None:
    module = Net()
    error_of(module, data(negative=(3,)))
    assert len(module.drawn) == 5
    assert module.drawn[3] == module.drawn[4]


def test_random_numbers_after_a_search_are_as_without_it() -> None:
    watched, plain = Net(), Net()
    batches = data(negative=(2,))
    for module, arguments in ((watched, {"on_nonfinite": "skip"}), (plain, {})):
        torch.manual_seed(4)
        random.seed(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            quiet(**arguments).fit(module, given(batches))
        module.drawn.append(random.random())
    assert watched.drawn[:3] == plain.drawn[:3]
    assert watched.drawn[3] == watched.drawn[2]  # the search
    assert watched.drawn[4:] == plain.drawn[3:]


def test_error_tells_of_values_in_the_batch() -> None:
    batches: Any = [{"x": value, "y": [torch.zeros(4)]} for value in data()]
    batches[2]["y"][0][0] = INF

    class Dicts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["x"], batch_idx) + batch["y"][0].sum()

    assert "The batch itself holds values that are not finite, in `batch['y'][0]`." in error_of(Dicts(), batches)


def test_error_tells_of_weights_that_were_not_finite_before() -> None:
    module = Net()
    with torch.no_grad():
        module.net["last"].bias.fill_(NAN)
    assert "The weights were not finite before: `net.last.bias`." in error_of(module, data())


def test_error_tells_that_the_code_of_the_step_made_it() -> None:
    module = Net(after=INF)
    module.bad_steps = {1}
    text = error_of(module, data())
    assert "The loss is not finite (inf) in epoch 0, batch 1 (global step 1)" in text
    assert "in the code of `training_step` itself" in text


def test_error_tells_that_it_does_not_come_again() -> None:
    class Once(Net):
        calls = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.calls += 1
            return super().training_step(batch, batch_idx) * (NAN if self.calls == 2 else 1.0)

    assert "A second forward pass of the same batch and random numbers was finite throughout." in error_of(Once(), data())


def test_error_tells_that_an_input_was_bad_already() -> None:
    class Between(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.net["last"](batch.log() * 0).mean()

    batches = data()
    batches[1][0, 0] = 0.0
    text = error_of(Between(), batches)
    assert "is `net.last` (Linear)" in text
    assert "Its input was not: it became so between modules" in text


def test_error_names_the_gradient_where_the_loss_is_finite() -> None:
    class Steep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + (self.weight.square().sum().sqrt() if batch_idx == 2 else self.weight.sum() * 0)

    text = error_of(Steep(), data(), gradient_clip_val=1.0)
    assert "The loss is finite, and the gradient of `weight` is not in epoch 0, batch 2 (global step 2)." in text
    assert "All outputs of the forward pass were finite, so it became so in the backward pass." in text


def test_error_in_an_accumulation_window_names_the_batch_of_the_loss() -> None:
    module = Net()
    text = error_of(module, data(negative=(3,)), accumulate_grad_batches=3)
    assert "in epoch 0, batch 3 (global step 1)" in text
    assert "`net.root` (Root)" in text
    assert module.drawn[3] == module.drawn[-1]


def test_search_leaves_what_was_logged() -> None:
    rows = Rows()
    with pytest.warns(RuntimeWarning):
        quiet(on_nonfinite="warn", logger=rows).fit(Net(), given(data(3, negative=(1,))))
    assert len(rows.of("loss_value_step")) == 3


# ---- warn ------------------------------------------------------------------------------------------------------------


def told(module: LightningModule, batches: Any, policy: str, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(on_nonfinite=policy, **arguments).fit(module, given(batches))
    return [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]


def test_warning_says_the_same_once_and_counts() -> None:
    module = Net(after=INF)
    module.bad_steps = {1, 3}
    first, last = told(module, data(), "warn")
    assert "The loss is not finite (inf) in epoch 0, batch 1 (global step 1)" in first
    assert "The update is done all the same." in first
    assert last == "2 updates were done that were not finite: 2 for a loss."


def test_warnings_change_no_weight() -> None:
    watched, plain = Net(), Net()
    for module, policy in ((watched, "warn"), (plain, None)):
        torch.manual_seed(5)
        quiet(on_nonfinite=policy, gradient_clip_val=0.1, accumulate_grad_batches=2).fit(module, given(data()))
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters()))


@pytest.mark.parametrize("every", [2, 50])
def test_flags_that_stay_on_a_device_are_looked_at_later(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loops import finite

    wrap = finite.FiniteWatch.wrap

    def deferring(self: Any, loop: Any) -> None:
        self.deferred = True
        wrap(self, loop)

    monkeypatch.setattr(finite.FiniteWatch, "wrap", deferring)
    first, last = told(Net(), data(negative=(2,)), "warn", log_every_n_steps=every)
    assert "The loss is not finite (nan) in epoch 0, batch 2 (global step 2). Its batch is gone" in first
    assert last == "4 updates were done that were not finite: 4 for a loss."


# ---- skip ------------------------------------------------------------------------------------------------------------


def optimizers() -> dict[str, Any]:
    def sgd(parameters: Any, lr: float) -> Any:
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=0.1)

    def adam(parameters: Any, lr: float) -> Any:
        return torch.optim.AdamW(parameters, lr, weight_decay=0.1)

    def fused(parameters: Any, lr: float) -> Any:
        return torch.optim.AdamW(parameters, lr, fused=True)

    return {"sgd": sgd, "adam": adam, "fused": fused}


class Checking(Net):
    """Keeps copies of weights and optimizer state around each step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.copies: list[Any] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = self.optimizers().state_dict()["state"]  # type: ignore[union-attr]
        self.copies.append(
            ([p.detach().clone() for p in self.parameters()], [{k: v.clone() for k, v in s.items()} for s in state.values()])
        )


def same(first: Any, second: Any) -> bool:
    weights = all(torch.equal(a, b) for a, b in zip(first[0], second[0]))
    return weights and all(torch.equal(a[k], b[k]) for a, b in zip(first[1], second[1]) for k in a) and len(first[1]) == len(second[1])


@pytest.mark.parametrize("name", ["sgd", "adam", "fused"])
@pytest.mark.parametrize("user_steps", [False, True])
def test_skipped_update_leaves_weights_and_optimizer_bit_for_bit(name: str, user_steps: bool) -> None:
    class Stepping(Checking):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    module = (Stepping if user_steps else Checking)(after=INF, optimizer=optimizers()[name])
    module.bad_steps = {2, 4}
    first, last = told(module, data(), "skip", gradient_clip_val=1.0)
    assert "The update is left out." in first
    assert last == "2 updates were left out that were not finite: 2 for a loss."
    changed = [not same(a, b) for a, b in zip(module.copies, module.copies[1:])]
    assert changed == [True, False, True, False, True]
    assert module.trainer.global_step == 6


def test_skipped_update_counts_for_schedulers_and_steps() -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Scheduled(after=INF)
    module.bad_steps = {0, 1}
    told(module, data(), "skip", max_steps=4, max_epochs=-1)
    assert module.trainer.global_step == 4
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**4)


class WithStatistics(Net):
    """Keeps what its buffers were after each batch; ``mean`` is a new tensor each time, ``table`` none of a step's business."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("table", torch.arange(3))
        self.copies: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.mean = 0.9 * self.mean + 0.1 * batch.mean().sqrt()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.copies.append({name: buffer.clone() for name, buffer in self.named_buffers()})


class ByHand(WithStatistics):
    """Two updates in a step, of which the second one alone is spoiled."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for part in (batch.abs(), batch):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(part, batch_idx))
            optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_skipped_update_leaves_no_trace_in_running_statistics(accumulate: int) -> None:
    module = WithStatistics()
    told(module, data(negative=(2,)), "skip", accumulate_grad_batches=accumulate)
    left_out = [index for index in range(6) if index // accumulate == 2 // accumulate]
    before, after = left_out[0] - 1, left_out[-1]
    expected = module.copies[before] if before >= 0 else dict(WithStatistics().named_buffers())
    assert all(torch.equal(value, module.copies[after][name]) for name, value in expected.items())
    assert all(torch.isfinite(value).all() for value in module.copies[-1].values())
    assert module.net["norm"].num_batches_tracked == 6 - len(left_out)


def test_skipped_update_of_several_in_a_step_keeps_the_statistics_of_the_others() -> None:
    module, plain = ByHand(), WithStatistics()
    batches = data(3, negative=(1,))
    told(module, batches, "skip")
    quiet().fit(plain, given([batches[0], batches[0], batches[1].abs(), batches[2], batches[2]]))
    norm, expected = module.net["norm"], plain.net["norm"]
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)
    assert torch.equal(module.mean, plain.mean)


def test_skipped_window_takes_all_its_batches_with_it() -> None:
    module = Checking(after=INF)
    module.bad_steps = {2}
    told(module, data(), "skip", accumulate_grad_batches=2)
    assert same(module.copies[1], module.copies[3])
    assert not same(module.copies[3], module.copies[5])


def test_skip_refuses_lbfgs() -> None:
    with pytest.raises(MisconfigurationException, match="on_nonfinite='skip' cannot leave out an update of LBFGS"):
        quiet(on_nonfinite="skip").fit(Net(optimizer=torch.optim.LBFGS), given(data()))


# ---- manual optimization ---------------------------------------------------------------------------------------------


class Manual(Checking):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_manual_optimization_is_covered_by_manual_backward_and_step() -> None:
    text = error_of(Manual(), data(negative=(3,)))
    assert "The loss is not finite (nan) in epoch 0, batch 3 (global step 3)" in text
    assert "In manual optimization no step is run again" in text
    module = Manual(after=INF)
    module.bad_steps = {2}
    told(module, data(), "skip")
    assert [not same(a, b) for a, b in zip(module.copies, module.copies[1:])] == [True, False, True, True, True]


class Raw(Net):
    """Steps torch's own optimizer, which nobody sees."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class RawByHand(Manual):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        optimizer.optimizer.step()


def test_losses_are_looked_at_and_not_kept_where_no_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loops import finite

    monkeypatch.setattr(finite, "MOST_LOSSES", 3)
    assert "The loss is not finite (nan) in epoch 0, batch 1 (global step 2)" in error_of(Raw(), data(negative=(1,)))
    assert "The loss is not finite (nan) in epoch 0, batch 1" in error_of(RawByHand(), data(negative=(1,)))
    held: list[int] = []

    class Counting(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            held.append(len(trainer.fit_loop.guards[0].losses))

    quiet(on_nonfinite="error", callbacks=Counting()).fit(Raw(), given(data()))
    assert held == [1] * 6


# ---- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["raise", True, 1])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"on_nonfinite=.*accepted are 'error', 'warn', 'skip', or None"):
        quiet(on_nonfinite=value)


def test_flags_of_gradients_of_all_kinds() -> None:
    huge = torch.full((3,), 1e30)  # whose sum of squares overflows
    sparse = torch.sparse_coo_tensor([[1]], [NAN], (3,), check_invariants=False)
    tensors = [huge, torch.tensor([1.0, INF]), huge.double(), torch.tensor([1 + 1j, complex(0, NAN)]), torch.zeros(0), sparse]
    assert are_finite(tensors, torch.device("cpu")).tolist() == [True, False, True, False, True, False]


def test_one_process_reads_once_for_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda self: reads.append(1) or original(self))
    quiet(on_nonfinite="error", accumulate_grad_batches=2).fit(Net(), given(data(6)))
    inside = len(reads)
    reads.clear()
    quiet(accumulate_grad_batches=2).fit(Net(), given(data(6)))
    assert inside - len(reads) == 3
