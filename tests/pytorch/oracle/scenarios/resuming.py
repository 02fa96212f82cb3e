"""Checkpoints written in one run and taken up by another."""

from __future__ import annotations

from typing import Any

import torch

from .base import At, Plain, attempt, loader, plain, scenario, trainer
from .tracing import Run


def _saved(owners: str, hook: str, when: Any = None, **arguments: Any) -> Run:
    """A run that saves ``here.ckpt`` the first time that ``hook`` is called and ``when`` holds."""
    done: list[bool] = []

    def save(trainer: Any, module: Any) -> None:
        if not done and (when is None or when(trainer)):
            done.append(True)
            trainer.save_checkpoint("here.ckpt")

    return Run(owners, callbacks=[At(hook, save)], **arguments).do()


def _resumed(owners: str, hook: str, when: Any = None, **arguments: Any) -> dict[str, Any]:
    arguments = {"max_epochs": 2, "num_sanity_val_steps": 0, **arguments}
    first = _saved(owners, hook, when, **arguments)
    second = Run(owners, **arguments).do(ckpt_path="here.ckpt")
    return {**second.facts(), "uninterrupted": plain(first.model.weights), "saved": _numbers("here.ckpt")}


def _numbers(path: str) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=False)
    return {"epoch": checkpoint["epoch"], "global_step": checkpoint["global_step"]}


@scenario
def resume_at_the_end_of_an_epoch() -> Any:
    return _resumed("cb ckpt dm heavy", "on_train_epoch_end")


@scenario
def resume_after_validation() -> Any:
    return _resumed("cb", "on_validation_end")


@scenario
def resume_in_mid_epoch() -> Any:
    return _resumed("cb ckpt heavy", "on_train_batch_end", lambda trainer: trainer.global_step == 5)


@scenario
def resume_in_the_first_epoch() -> Any:
    return _resumed("cb", "on_train_batch_end", lambda trainer: trainer.global_step == 1)


@scenario
def resume_at_the_last_batch_of_an_epoch() -> Any:
    return _resumed("cb", "on_train_batch_end", lambda trainer: trainer.global_step == 3)


@scenario
def resume_between_two_validations_of_an_epoch() -> Any:
    facts = {}
    for step in (1, 2, 3):
        facts[str(step)] = _resumed("", "on_train_batch_end", lambda trainer, step=step: trainer.global_step == step, val_check_interval=1)
    return facts


@scenario
def resume_after_a_validation_in_mid_epoch() -> Any:
    return _resumed("", "on_validation_end", val_check_interval=1)


@scenario
def resume_with_accumulation() -> Any:
    return {
        "epoch end": _resumed("", "on_train_epoch_end", accumulate_grad_batches=2),
        "window end": _resumed("", "on_train_batch_end", lambda trainer: trainer.global_step == 1, accumulate_grad_batches=2),
        "inside a window": _resumed("", "on_train_batch_end", accumulate_grad_batches=2),
    }


@scenario
def resume_of_a_finished_run() -> Any:
    Run("", max_epochs=2, num_sanity_val_steps=0).do().trainer.save_checkpoint("end.ckpt")
    same = Run("cb", max_epochs=2, num_sanity_val_steps=0).do(ckpt_path="end.ckpt").facts()
    longer = Run("cb", max_epochs=3, num_sanity_val_steps=0).do(ckpt_path="end.ckpt").facts()
    shorter = attempt(lambda: Run("cb", max_epochs=1, num_sanity_val_steps=0).do(ckpt_path="end.ckpt"))
    return {"same": same, "longer": longer, "shorter": shorter, "saved": _numbers("end.ckpt")}


@scenario
def resume_by_max_steps() -> Any:
    first = Run("", max_steps=4, max_epochs=None, num_sanity_val_steps=0).do()
    first.trainer.save_checkpoint("end.ckpt")
    return {"saved": _numbers("end.ckpt"), **Run("", max_steps=8, max_epochs=None, num_sanity_val_steps=0).do(ckpt_path="end.ckpt").facts()}


@scenario
def resume_with_the_sanity_check() -> Any:
    facts = {}
    for hook, step in (("on_train_batch_end", 1), ("on_train_batch_end", 5), ("on_validation_end", 3), ("on_train_epoch_end", 3)):
        resumed = _resumed("", hook, lambda trainer, step=step: trainer.global_step == step, num_sanity_val_steps=1)
        before = next(index for index, line in enumerate(resumed["trace"]) if "on_train_start" in line)
        facts[f"{hook} {step}"] = [line for line in resumed["trace"][:before] if "validation_step" in line]
    return facts


@scenario
def evaluation_of_a_checkpoint() -> Any:
    run = Run("cb ckpt dm heavy", max_epochs=1, num_sanity_val_steps=0).do()
    run.trainer.save_checkpoint("end.ckpt")
    facts = {}
    for task in ("validate", "test", "predict"):
        facts[task] = Run("cb ckpt dm heavy").do(task, ckpt_path="end.ckpt").facts()
    return facts


@scenario
def weights_only_checkpoints() -> Any:
    run = Run("cb ckpt dm heavy", max_epochs=1).do()
    run.trace.lines.clear()
    run.trainer.save_checkpoint("weights.ckpt", weights_only=True)
    return {
        "saved": _numbers("weights.ckpt"),
        "keys": sorted(torch.load("weights.ckpt", weights_only=False)),
        "trace": run.trace.lines,
        "fit": attempt(lambda: Run("cb").do(ckpt_path="weights.ckpt")),
        "validate": attempt(lambda: Run("cb").do("validate", ckpt_path="weights.ckpt")),
    }


@scenario
def saving_by_hand() -> Any:
    run = Run("cb ckpt dm heavy", max_epochs=1).do()
    run.trace.lines.clear()
    run.trainer.save_checkpoint("sub/folder/mine.ckpt")
    checkpoint = torch.load("sub/folder/mine.ckpt", weights_only=False)
    return {
        "trace": run.trace.lines,
        "keys": sorted(checkpoint),
        "callbacks": plain(checkpoint["callbacks"]),
        "weights": plain(checkpoint["state_dict"]),
        "schedulers": sorted(checkpoint["lr_schedulers"][0]),
        "optimizers": sorted(checkpoint["optimizer_states"][0]),
        "loops": sorted(checkpoint["loops"]),
        "version": checkpoint["pytorch-lightning_version"] >= "2.6",
    }


@scenario
def callback_states_of_the_model_hooks() -> Any:
    seen: list[Any] = []

    class Model(Plain):
        def on_save_checkpoint(self, checkpoint: Any) -> None:
            seen.append(["save", sorted(checkpoint)])
            checkpoint["mine"] = 5

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            seen.append(["load", checkpoint["mine"], sorted(checkpoint)])

    first = trainer(max_epochs=1)
    first.fit(Model(), loader(1))
    first.save_checkpoint("a.ckpt")
    trainer(max_epochs=2).fit(Model(), loader(1), ckpt_path="a.ckpt")
    loaded = Model.load_from_checkpoint("a.ckpt")
    return {"seen": seen, "weights": plain(loaded.weights)}


@scenario
def randomness_in_a_checkpoint() -> Any:
    draws: list[float] = []

    class Model(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            draws.append(plain(torch.rand(())))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(5)
    shuffled = loader(4, shuffle=True)
    run = trainer(max_epochs=1, num_sanity_val_steps=2)
    run.fit(Model(), shuffled, loader(3))
    torch.manual_seed(5)
    draws_without: list[float] = list(draws)
    draws.clear()
    trainer(max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0).fit(Model(), loader(4, shuffle=True))
    return {"with a sanity check": draws_without, "without": draws}


@scenario
def states_that_do_not_fit() -> Any:
    run = Run("cb1 cb2", num_sanity_val_steps=0).do()
    run.trainer.save_checkpoint("two.ckpt")

    class Larger(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Parameter(torch.ones(1))

    class TwoOptimizers(Plain):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.weights], lr=0.1)], [
                torch.optim.lr_scheduler.StepLR(torch.optim.SGD([self.weights], lr=0.1), 1) for _ in range(2)
            ]

    class Adam(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    return {
        "fewer callbacks": attempt(lambda: Run("cb1", max_epochs=2).do(ckpt_path="two.ckpt")),
        "another module": attempt(lambda: trainer(max_epochs=2).fit(Larger(), loader(1), ckpt_path="two.ckpt")),
        "schedulers": attempt(lambda: trainer(max_epochs=2).fit(TwoOptimizers(), loader(1), ckpt_path="two.ckpt")),
        "optimizer": attempt(lambda: trainer(max_epochs=2).fit(Adam(), loader(1), ckpt_path="two.ckpt")),
        "load another module": attempt(lambda: Larger.load_from_checkpoint("two.ckpt")),
        "load another module, not strict": attempt(lambda: Larger.load_from_checkpoint("two.ckpt", strict=False)),
    }
