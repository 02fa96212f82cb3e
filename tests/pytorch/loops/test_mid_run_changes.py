"""Callbacks that come or go, and hooks that are set on instances, after a run has resolved them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning.pytorch import Callback

HOOKS = ("on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start")
LATER = ("on_sanity_check_start", "on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end", "on_fit_end")


class Notes(Callback):
    """Notes which of some hooks are called."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        for name in LATER:
            setattr(self, name, self.note(name))

    def note(self, name: str) -> Any:
        return lambda *args, **kwargs: self.heard.append(name)


def doing(hook: str, action: Any) -> Callback:
    """A callback that acts in one hook, once."""
    todo = [action]
    return type("Doing", (Callback,), {hook: lambda self, trainer, module, *args: todo.pop()(trainer, module) if todo else None})()


def after(hook: str) -> list[str]:
    """What is heard after a hook, in a run of two batches and a sanity check."""
    events = [*LATER[:4], "on_train_batch_end", *LATER[4:]]
    return events if hook == "on_fit_start" else events[events.index(hook) + 1 :]


@pytest.mark.parametrize("replaced", [False, True], ids=["the same list", "another list"])
@pytest.mark.parametrize("hook", HOOKS)
def test_callback_that_is_added_hears_what_follows(Evaluated: Any, make_trainer: Any, numbers: Any, hook: str, replaced: bool) -> None:
    notes = Notes()

    def add(trainer: Any, module: Any) -> None:
        if replaced:
            trainer.callbacks = [*trainer.callbacks, notes]
        else:
            trainer.callbacks.append(notes)

    make_trainer(callbacks=doing(hook, add), num_sanity_val_steps=1).fit(Evaluated(), numbers(2), numbers(1))
    assert notes.heard == after(hook)


@pytest.mark.parametrize("hook", HOOKS)
def test_callback_that_is_removed_hears_no_more(Evaluated: Any, make_trainer: Any, numbers: Any, hook: str) -> None:
    notes = Notes()
    callbacks = [notes, doing(hook, lambda trainer, module: trainer.callbacks.remove(notes))]
    make_trainer(callbacks=callbacks, num_sanity_val_steps=1).fit(Evaluated(), numbers(2), numbers(1))
    assert notes.heard == after("on_fit_start")[: len(after("on_fit_start")) - len(after(hook))]


def test_callback_that_is_added_within_an_epoch_hears_from_its_validation_on(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    heard: list[int] = []
    late = type("Late", (Callback,), {"on_train_batch_end": lambda self, *args: heard.append(args[-1])})()
    adds = doing("on_train_batch_start", lambda trainer, module: trainer.callbacks.append(late))
    make_trainer(callbacks=adds, val_check_interval=2).fit(Evaluated(), numbers(4), numbers(1))
    assert heard == [2, 3]


@pytest.mark.parametrize("hook", [name for name in HOOKS if name != "on_sanity_check_start"])
@pytest.mark.parametrize(
    "name",
    [
        "on_train_batch_end", "on_after_backward", "on_before_optimizer_step", "training_step", "backward", "optimizer_step",
        "optimizer_zero_grad", "configure_gradient_clipping", "on_after_batch_transfer", "lr_scheduler_step",
    ],
)  # fmt: skip
def test_hook_that_is_set_on_the_module_is_called(Weight: Any, make_trainer: Any, numbers: Any, hook: str, name: str) -> None:
    calls: list[str] = []

    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    def put(trainer: Any, module: Any) -> None:
        original = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        setattr(module, name, noted)

    model = Model()
    make_trainer(callbacks=doing(hook, put)).fit(model, numbers(2, start=1))
    assert calls == [name] * (1 if name == "lr_scheduler_step" else 2)
    assert model.weight.item() != 0


def test_hook_that_is_set_on_a_callback_is_called(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    calls: list[str] = []

    def put(trainer: Any, module: Any) -> None:
        trainer.callbacks[0].on_train_end = lambda trainer, module: calls.append("end")

    make_trainer(callbacks=doing("on_train_start", put)).fit(Weight(), numbers(1))
    assert calls == ["end"]


def test_nothing_is_resolved_again_where_nothing_has_changed(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    found: list[Any] = []

    class Model(Weight):  # type: ignore[misc]
        def on_train_batch_end(self, *args: Any) -> None:
            found.append(self.trainer._hooks.on_train_batch_end)

    make_trainer(max_epochs=3).fit(Model(), numbers(1))
    assert len(found) == 3
    assert found[0] is found[1] is found[2]
