"""What ``training_step`` may take and return, and what ``optimizer_step`` may do with its closure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule


class Outputs(Callback):
    """Keeps what ``on_train_batch_end`` is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs)


class Line(LightningModule):
    """One weight; a gradient of 1 in each step of SGD with a rate of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.weight * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


# ---- what a step takes ----------------------------------------------------------------------------------------------


def test_step_takes_the_batch_alone(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def training_step(self, x: Tensor) -> Any:  # type: ignore[override]
            return self.weight * x.mean()

    model = Model()
    make_trainer().fit(model, numbers(4))
    assert model.weight.item() == -6.0


def test_step_may_call_its_parameters_anything(make_trainer: Any, numbers: Any) -> None:
    indices: list[int] = []

    class Model(Line):
        def training_step(self, x: Tensor, /, number: int, more: Any = None, *, extra: int = 1) -> Any:  # type: ignore[override]
            indices.append(number)
            return self.weight * 1.0

    make_trainer().fit(Model(), numbers(3))
    assert indices == [0, 1, 2]


def test_step_may_take_anything_by_position(make_trainer: Any, numbers: Any) -> None:
    taken: list[Any] = []

    class Model(Line):
        def training_step(self, *args: Any) -> Any:
            taken.append((args[0].item(), *args[1:]))
            return self.weight * 1.0

    make_trainer().fit(Model(), numbers(2))
    assert taken == [(0.0, 0), (1.0, 1)]


def test_step_set_on_the_instance_is_used(make_trainer: Any, numbers: Any) -> None:
    model = Line()
    model.training_step = lambda batch, batch_idx: model.weight * 2.0  # type: ignore[method-assign]
    make_trainer().fit(model, numbers(1))
    assert model.weight.item() == -2.0


# ---- what a step returns --------------------------------------------------------------------------------------------


def test_dict_with_a_loss_and_anything_else_reaches_the_hooks_without_graphs(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.weight * 1.0, "more": [self.weight * 2.0, "text"], "count": 3}

    outputs, model = Outputs(), Model()
    make_trainer(callbacks=[outputs]).fit(model, numbers(1))
    assert outputs.seen == [{"loss": torch.tensor(0.0), "more": [torch.tensor(0.0), "text"], "count": 3}]
    assert not outputs.seen[0]["loss"].requires_grad
    assert not outputs.seen[0]["more"][0].requires_grad
    assert model.weight.item() == -1.0


def test_tensor_reaches_the_hooks_as_a_dict(make_trainer: Any, numbers: Any) -> None:
    outputs = Outputs()
    make_trainer(callbacks=[outputs]).fit(Line(), numbers(2))
    assert outputs.seen == [{"loss": torch.tensor(0.0)}, {"loss": torch.tensor(-1.0)}]


def test_none_skips_the_batch_with_one_warning(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx in (1, 2) else self.weight * 1.0

    model, outputs = Model(), Outputs()
    trainer = make_trainer(callbacks=[outputs])
    with pytest.warns(UserWarning, match="returned None") as caught:
        trainer.fit(model, numbers(4))
    assert len([w for w in caught if "returned None" in str(w.message)]) == 1
    assert model.weight.item() == -2.0
    assert len(outputs.seen) == 4
    assert not outputs.seen[1]


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ({"x": 1}, "dict with the keys"),
        ({}, "dict with the keys"),
        (1.0, "a float"),
        ("loss", "a str"),
        ([torch.zeros(())], "a list"),
        ({"loss": 1.0}, "dict with the keys"),
        ({"loss": None}, "dict with the keys"),
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(make_trainer: Any, numbers: Any, returned: Any, named: str) -> None:
    class Model(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return returned

    with pytest.raises(MisconfigurationException, match=f"(?s)`training_step` returned .*{named}.*or None to skip"):
        make_trainer().fit(Model(), numbers(1))


def test_loss_without_a_graph_says_so(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return torch.zeros(())

    with pytest.raises(RuntimeError, match="does not require grad"):
        make_trainer().fit(Model(), numbers(1))


def test_loss_that_is_changed_in_a_hook_of_the_batch_end_does_not_change_the_weights(make_trainer: Any, numbers: Any) -> None:
    class Change(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            outputs["loss"].fill_(100.0)

    model = Line()
    make_trainer(callbacks=[Change()]).fit(model, numbers(2))
    assert model.weight.item() == -2.0


# ---- optimizer_step -------------------------------------------------------------------------------------------------


def test_optimizer_step_may_skip_updates_but_not_the_closure(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    model, trainer = Model(), make_trainer()
    trainer.fit(model, numbers(4))
    assert model.weight.item() == -2.0
    assert trainer.global_step == 4


def test_optimizer_step_may_step_twice(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            optimizer.step(closure=optimizer_closure)

    model, trainer = Model(), make_trainer()
    trainer.fit(model, numbers(3))
    assert model.weight.item() == -6.0
    assert trainer.global_step == 3


def test_optimizer_step_may_run_the_closure_and_step_by_itself(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            loss = optimizer_closure()
            assert isinstance(loss, Tensor)
            optimizer.step()

    model = Model()
    make_trainer().fit(model, numbers(3))
    assert model.weight.item() == -3.0


def test_optimizer_step_may_warm_up_the_rate_through_super(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = 0.5

    model = Model()
    make_trainer().fit(model, numbers(3))
    assert model.weight.item() == -2.0


@pytest.mark.parametrize("step", [lambda optimizer: None, lambda optimizer: optimizer.step()], ids=["nothing", "step without closure"])
def test_optimizer_step_without_the_closure_is_refused(make_trainer: Any, numbers: Any, step: Any) -> None:
    class Model(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            step(optimizer)

    with pytest.raises(MisconfigurationException, match="did not call its closure"):
        make_trainer().fit(Model(), numbers(1))


def test_optimizer_step_gets_epoch_and_batch_once_for_each_window(make_trainer: Any, numbers: Any) -> None:
    calls: list[tuple[int, int]] = []

    class Model(Line):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            calls.append((epoch, batch_idx))
            optimizer.step(closure=optimizer_closure)

    make_trainer(max_epochs=2, accumulate_grad_batches=2).fit(Model(), numbers(3))
    assert calls == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("overrides", [False, True])
def test_clipping_and_its_hook_come_before_the_update_also_with_an_optimizer_step(make_trainer: Any, numbers: Any, overrides: bool) -> None:
    seen: list[float] = []

    class Model(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.weight * 10.0

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self.weight.grad.item())  # type: ignore[union-attr]

    class Overriding(Model):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    model = (Overriding if overrides else Model)()
    make_trainer(gradient_clip_val=2.0, gradient_clip_algorithm="value").fit(model, numbers(2))
    assert seen == [10.0, 10.0]
    assert model.weight.item() == -4.0


def test_lbfgs_runs_the_closure_as_often_as_it_wants_and_counts_one_step(make_trainer: Any, numbers: Any) -> None:
    calls: list[int] = []

    class Model(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            calls.append(batch_idx)
            return (self.weight - 3.0) ** 2

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=10)

    model, trainer = Model(), make_trainer()
    trainer.fit(model, numbers(2))
    assert len(calls) > 4
    assert trainer.global_step == 2
    assert model.weight.item() == pytest.approx(3.0, abs=1e-2)


def test_backward_may_be_overridden(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (loss * 3).backward()

    model = Model()
    make_trainer().fit(model, numbers(2))
    assert model.weight.item() == -6.0


def test_nothing_is_trained_without_an_optimizer(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def configure_optimizers(self) -> Any:
            return None

    model, trainer = Model(), make_trainer()
    with pytest.warns(UserWarning, match="returned None"):
        trainer.fit(model, numbers(2))
    assert model.weight.item() == 0.0
    assert trainer.global_step == 2


# ---- manual optimization --------------------------------------------------------------------------------------------


class Manual(Line):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("returned", [None, torch.zeros(()), {"anything": 1}])
def test_manual_step_may_return_nothing_or_what_hooks_should_see(make_trainer: Any, numbers: Any, returned: Any) -> None:
    class Model(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return returned

    outputs = Outputs()
    make_trainer(callbacks=[outputs]).fit(Model(), numbers(1))
    assert outputs.seen == [{} if returned is None else {"loss": returned} if isinstance(returned, Tensor) else returned]


def test_manual_step_returning_a_list_is_refused(make_trainer: Any, numbers: Any) -> None:
    class Model(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return [1]

    with pytest.raises(MisconfigurationException, match="manual optimization return a tensor, a dict, or None"):
        make_trainer().fit(Model(), numbers(1))


def test_manual_steps_of_all_optimizers_are_counted(make_trainer: Any, numbers: Any) -> None:
    class Model(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            first, second = self.optimizers()
            self.manual_backward(self.weight * 1.0)
            first.step()
            if batch_idx == 0:
                second.step()
            first.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=1.0), torch.optim.SGD(self.parameters(), lr=10.0)]

    model, trainer = Model(), make_trainer()
    trainer.fit(model, numbers(3))
    assert trainer.global_step == 4
    assert model.weight.item() == -13.0


def test_manual_backward_is_refused_in_automatic_optimization(make_trainer: Any, numbers: Any) -> None:
    class Model(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.manual_backward(self.weight * 1.0)

    with pytest.raises(MisconfigurationException, match="manual_backward"):
        make_trainer().fit(Model(), numbers(1))


def test_gradients_of_the_step_before_are_gone_in_the_forward_pass(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Looks(Weight):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.found.append(all(parameter.grad is None for parameter in self.parameters()))
            return super().training_step(batch, batch_idx)

    class Hears(Looks):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            """Runs after the forward pass, as its place among the hooks says."""

    found = {}
    for kind, accumulate in ((Looks, 1), (Looks, 2), (Hears, 1)):
        module = kind()
        module.found = []
        make_trainer(accumulate_grad_batches=accumulate).fit(module, numbers(4))
        found[kind.__name__, accumulate] = module.found
    assert found == {
        ("Looks", 1): [True] * 4,
        ("Looks", 2): [True, False, True, False],
        ("Hears", 1): [True, False, False, False],
    }
