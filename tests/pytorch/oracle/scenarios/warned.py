"""The categories of the warnings that users get."""

from __future__ import annotations

from typing import Any

import torch

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from .base import QUIET, At, Plain, attempt, loader, scenario, stream, trainer, warned


def _fit(model: Any = None, train: Any = None, val: Any = None, **arguments: Any) -> list[str]:
    with warned() as categories:
        arguments = {"max_epochs": 1, **arguments}
        raised = attempt(lambda: trainer(**arguments).fit(model or Plain(), train if train is not None else loader(2), val))
    return [raised, *categories]


def _model(**members: Any) -> Plain:
    return type("Model", (Plain,), members)()


@scenario
def warnings_in_fit() -> Any:
    frozen = Plain()
    frozen.eval()

    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "intervall": "step"}}

    def unknown_key(self: Any) -> Any:
        return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1), "optimiser": 1}

    def log_ambiguous(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("a", 1.0, on_epoch=True)
        return self(batch[0]).mean()

    class Ambiguous:
        def __iter__(self) -> Any:
            return iter([(torch.ones(2, 2), torch.ones(3))] * 2)

    return {
        "nothing wrong": _fit(val=loader(1)),
        "validation_step without loader": _fit(),
        "unbounded": _fit(max_epochs=None, limit_train_batches=0),
        "max_steps alone": _fit(max_epochs=None, max_steps=1, val=loader(1)),
        "model in eval mode": _fit(frozen, val=loader(1)),
        "training_step returns None": _fit(_model(training_step=lambda self, b, i: None), val=loader(1)),
        "shuffled validation": _fit(val=loader(2, shuffle=True)),
        "overfit with shuffling": _fit(train=loader(4, shuffle=True), val=loader(2), overfit_batches=1),
        "empty train loader": _fit(train=loader(0), val=loader(1)),
        "empty val loader": _fit(val=loader(0)),
        "no optimizer": _fit(_model(configure_optimizers=lambda self: None), val=loader(1)),
        "unknown scheduler key": _fit(_model(configure_optimizers=configure), val=loader(1)),
        "unknown optimizer key": _fit(_model(configure_optimizers=unknown_key), val=loader(1)),
        "ambiguous batch size": _fit(_model(training_step=log_ambiguous), train=Ambiguous(), val=loader(1), num_sanity_val_steps=0),
        "accumulation above the batches": _fit(accumulate_grad_batches=5, val=loader(1)),
        "stream with a wrong length": _fit(train=_Lying(2), val=loader(1)),
        "misspelt hook": _fit(_model(on_train_epoch_strat=lambda self: None), val=loader(1)),
        "stream": _fit(train=stream(2), val=stream(1)),
        "max_epochs reached before": _fit(max_epochs=0, val=loader(1)),
        "None as val_dataloader": _fit(_model(val_dataloader=lambda self: None)),
        "step and epoch of the same name": _fit(_model(training_step=_logs_epoch), val=loader(1)),
    }


def _logs_epoch(self: Any, batch: Any, batch_idx: int) -> Any:
    self.log("epoch", 1.0)
    return self(batch).mean()


class _Lying:
    """Says that it has one batch, and has more."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter(torch.ones(self.count, 1, 2))


@scenario
def warnings_of_trainer_arguments() -> Any:
    facts = {}
    for name, arguments in {
        "plain": {"max_epochs": 1},
        "no bound": {},
        "old precision": {"precision": 16, "max_epochs": 1},
        "bf16": {"precision": "bf16", "max_epochs": 1},
        "devices auto": {"devices": "auto", "max_epochs": 1},
        "overfit": {"overfit_batches": 1, "max_epochs": 1},
        "fast_dev_run": {"fast_dev_run": True},
        "detect_anomaly": {"detect_anomaly": True, "max_epochs": 1},
        "barebones": {"barebones": True},
        "deterministic warn": {"deterministic": "warn", "max_epochs": 1},
    }.items():
        base = {"accelerator": "cpu", "devices": 1} if name == "barebones" else QUIET
        with warned() as categories:
            raised = attempt(lambda base=base, arguments=arguments: Trainer(**{**base, **arguments}))
        facts[name] = [raised, *categories]
    trainer(deterministic=False)
    torch.use_deterministic_algorithms(False)
    return facts


@scenario
def warnings_of_checkpoints() -> Any:
    def checkpointing(**arguments: Any) -> dict[str, Any]:
        return {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(**arguments)]}

    facts = {
        "first": _fit(val=loader(1), **checkpointing(dirpath="d")),
        "folder not empty": _fit(val=loader(1), **checkpointing(dirpath="d")),
        "absent monitor": _fit(val=loader(1), **checkpointing(monitor="x", dirpath="e")),
    }
    run = trainer(max_epochs=1, **checkpointing(dirpath="f", save_last=True))
    run.fit(Plain(), loader(2), loader(1))
    with warned() as categories:
        trainer(max_epochs=2, **checkpointing(dirpath="g")).fit(Plain(), loader(2), loader(1), ckpt_path="f/last.ckpt")
    facts["another dirpath"] = categories
    with warned() as categories:
        raised = attempt(lambda: run.fit(Plain(), loader(2), loader(1), ckpt_path="best"))
    facts["fit best"] = [raised, *categories]
    with warned() as categories:
        raised = attempt(lambda: trainer(max_epochs=1, **checkpointing(dirpath="h")).fit(Plain(), loader(2), loader(1), ckpt_path="last"))
    facts["fit last without one"] = [raised, *categories]
    with warned() as categories:
        trainer(max_epochs=2, limit_train_batches=1).fit(Plain(), loader(2), loader(1), ckpt_path="f/last.ckpt")
    facts["callbacks missing"] = categories
    with warned() as categories:
        run.test(dataloaders=loader(1))
    facts["test without model or path"] = categories
    with warned() as categories:
        run.validate(dataloaders=loader(1), ckpt_path="last")
    facts["validate last"] = categories

    def save_in_mid_epoch(run: Any, _: Any) -> None:
        if run.global_step == 1:
            run.save_checkpoint("mid.ckpt")

    trainer(max_epochs=1, callbacks=[At("on_train_batch_end", save_in_mid_epoch)]).fit(Plain(), loader(3), loader(1))
    with warned() as categories:
        trainer(max_epochs=2).fit(Plain(), loader(3), loader(1), ckpt_path="mid.ckpt")
    facts["resume in mid epoch"] = categories
    return facts
