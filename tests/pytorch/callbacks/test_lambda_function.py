"""LambdaCallback: every hook can be given as a function."""

from __future__ import annotations

import inspect

import pytest

from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.callbacks.lambda_function import LambdaCallback

HOOKS = [name for name in vars(Callback) if name in ("setup", "teardown") or name.startswith("on_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_function_is_called_for_its_hook_and_no_other(hook: str) -> None:
    calls = []
    callback = LambdaCallback(**{hook: lambda *args: calls.append(args)})
    for name in HOOKS:
        arguments = list(inspect.signature(getattr(Callback, name)).parameters)[1:]
        getattr(callback, name)(*arguments)
        assert len(calls) == (HOOKS.index(name) >= HOOKS.index(hook))
    assert calls == [tuple(list(inspect.signature(getattr(Callback, hook)).parameters)[1:])]


def test_hook_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="on_trian_start"):
        LambdaCallback(on_trian_start=print)  # type: ignore[call-arg]


def test_hook_that_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match=r"LambdaCallback\(on_train_start=3\).*int"):
        LambdaCallback(on_train_start=3)  # type: ignore[arg-type]


def test_functions_are_called_by_a_trainer() -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    calls: list[str] = []
    callback = LambdaCallback(
        setup=lambda trainer, module, stage: calls.append(f"setup {stage.value}"),
        on_train_batch_end=lambda trainer, module, outputs, batch, batch_idx: calls.append(f"batch {batch_idx}"),
        on_before_zero_grad=lambda trainer, module, optimizer: calls.append(type(optimizer).__name__),
        on_fit_end=lambda *_: calls.append("end"),
    )
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callback,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=False,
        max_epochs=1,
    )
    trainer.fit(BoringModel())
    assert calls == ["setup fit", "SGD", "batch 0", "SGD", "batch 1", "end"]
