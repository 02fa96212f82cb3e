"""The order of hooks in ``fit``: what runs when, with which data, and where it stops."""

from __future__ import annotations

from typing import Any

import torch

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from .base import At, attempt, loader, plain, scenario, stream
from .tracing import Bare, PlainData, Run, Traced


@scenario
def fit_with_validation() -> Any:
    return Run("cb1 cb2 ckpt", num_sanity_val_steps=1, max_epochs=2).do().facts()


@scenario
def fit_with_datamodule_and_every_hook() -> Any:
    return Run("cb ckpt dm heavy", num_sanity_val_steps=1).do().facts()


@scenario
def fit_with_the_trainers_defaults_for_sanity_checking() -> Any:
    class Model(Traced):
        def val_dataloader(self) -> Any:
            return loader(3, 100)

    return Run("", model=Model, limit_train_batches=1).do().facts()


@scenario
def fit_without_validation_loader() -> Any:
    return Run("cb", model=Bare).do(train_dataloaders=loader(3)).facts()


@scenario
def fit_with_loaders_given() -> Any:
    return Run("cb").do(train_dataloaders=loader(2, 10), val_dataloaders=[loader(1, 100), loader(2, 200)]).facts()


@scenario
def fit_with_only_a_train_loader_given() -> Any:
    return Run("cb").do(train_dataloaders=loader(2, 10)).facts()


@scenario
def fit_without_validation_step() -> Any:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = Run("cb")
    run.trainer.fit(Model(), loader(2), loader(2))
    return {"trace": run.trace.lines, "val_batches": run.trainer.num_val_batches}


@scenario
def fit_with_combined_train_loaders() -> Any:
    facts = {}
    for mode in ("min_size", "max_size_cycle", "max_size"):
        run = Run("", limit_val_batches=0)
        run.do(train_dataloaders=CombinedLoader({"a": loader(2), "b": loader(3, 10)}, mode))
        facts[mode] = [line for line in run.trace.lines if "batch" in line or "training_step" in line]
    return facts


@scenario
def fit_with_a_list_of_train_loaders() -> Any:
    return Run("", limit_val_batches=0).do(train_dataloaders=[loader(2), loader(3, 10)]).facts()


@scenario
def fit_on_plain_iterables() -> Any:
    class Rows:
        def __iter__(self) -> Any:
            return (torch.tensor([[float(k), 1.0]]) for k in range(3))

    class Sized(Rows):
        def __len__(self) -> int:
            return 3

    facts = {}
    for kind in (Rows, Sized):
        run = Run("").do(train_dataloaders=kind(), val_dataloaders=kind())
        facts[kind.__name__] = [run.facts(), plain(run.trainer.num_training_batches), plain(run.trainer.num_val_batches)]
    return facts


@scenario
def fit_on_streams() -> Any:
    return Run("cb", num_sanity_val_steps=1, max_epochs=2).do(train_dataloaders=stream(3), val_dataloaders=stream(2, 100)).facts()


@scenario
def fit_on_streams_with_limits() -> Any:
    run = Run("", limit_train_batches=2, limit_val_batches=1)
    return run.do(train_dataloaders=stream(3), val_dataloaders=stream(2, 100)).facts()


@scenario
def fit_on_a_stream_validating_every_two_batches() -> Any:
    return Run("", val_check_interval=2, num_sanity_val_steps=0).do(train_dataloaders=stream(5), val_dataloaders=stream(1, 100)).facts()


@scenario
def fit_twice() -> Any:
    run = Run("cb ckpt").do()
    run.trace.lines.clear()
    again = run.do().facts()
    run.trace.lines = run.trace.lines[:0]
    run.trainer.fit_loop.max_epochs = 2
    return {"again": again, "with one more epoch": run.do().facts()}


@scenario
def fit_then_the_same_model_with_another_trainer() -> Any:
    run = Run("").do()
    other = Run("cb")
    run.trace.lines.clear()
    run.trace.trainer = other.trainer
    other.trainer.fit(run.model)
    return {"trace": run.trace.lines, "step": other.trainer.global_step, "same": run.model.trainer is other.trainer}


@scenario
def fit_fast_dev_run() -> Any:
    facts = {}
    for batches in (True, 2):
        run = Run("cb ckpt", fast_dev_run=batches, max_epochs=5, max_steps=9, enable_checkpointing=True).do()
        trainer = run.trainer
        facts[str(batches)] = {
            **run.facts(),
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "sanity": trainer.num_sanity_val_steps,
            "interval": trainer.val_check_interval,
            "batches": [trainer.num_training_batches, trainer.num_val_batches],
            "loggers": [type(logger).__name__ for logger in trainer.loggers],
        }
    return facts


@scenario
def fit_overfit_batches() -> Any:
    facts = {}
    for batches in (2, 0.5):
        run = Run("", overfit_batches=batches, max_epochs=2)
        run.do(train_dataloaders=loader(4, shuffle=True), val_dataloaders=loader(6, 100))
        facts[str(batches)] = [line for line in run.trace.lines if "_step(" in line or "loader" in line]
    return facts


@scenario
def fit_limits_of_zero() -> Any:
    no_train = Run("cb ckpt heavy", limit_train_batches=0).do()
    no_val = Run("cb", limit_val_batches=0).do()
    neither = Run("cb", limit_train_batches=0.0, limit_val_batches=0.0).do()
    return {"train": no_train.facts(), "val": no_val.facts(), "both": neither.facts()}


@scenario
def fit_empty_loaders() -> Any:
    facts = {}
    for name, train, val in (("list", [], loader(1, 100)), ("train", loader(0), loader(1, 100)), ("val", loader(1), loader(0))):
        run = Run("cb")
        raised = attempt(lambda run=run, train=train, val=val: run.do(train_dataloaders=train, val_dataloaders=val))
        facts[name] = {"raised": raised, **run.facts()}
    return facts


@scenario
def fit_max_epochs_zero_and_max_steps_zero() -> Any:
    return {"epochs": Run("cb", max_epochs=0).do().facts(), "steps": Run("cb", max_epochs=None, max_steps=0).do().facts()}


@scenario
def batch_start_returning_minus_one() -> Any:
    class Model(Traced):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 1 else None

    return Run("cb", model=Model, max_epochs=2).do().facts()


@scenario
def batch_start_returning_minus_one_at_the_first_batch() -> Any:
    class Model(Traced):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1

    return Run("cb", model=Model, max_epochs=2).do().facts()


class _Ends(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        return -1


@scenario
def callbacks_batch_start_returning_minus_one() -> Any:
    return Run("cb", callbacks=[_Ends()]).do().facts()


class _Stop(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = True


@scenario
def should_stop_set_in_different_hooks() -> Any:
    facts = {}
    for hook in ("on_train_batch_end", "on_train_batch_start", "on_validation_end", "on_train_epoch_end", "on_train_start", "on_fit_start"):
        run = Run("", callbacks=[_Stop(hook)], max_epochs=4, num_sanity_val_steps=0).do()
        facts[hook] = [line for line in run.trace.lines if "_step(" in line or "epoch_" in line or "_end()" in line]
    return facts


@scenario
def should_stop_before_min_epochs_or_min_steps() -> Any:
    facts = {}
    for name, limits in {"epochs": {"min_epochs": 2}, "steps": {"min_steps": 4}, "both": {"min_epochs": 2, "min_steps": 8}}.items():
        run = Run("", callbacks=[_Stop("on_train_batch_end")], max_epochs=5, **limits).do()
        facts[name] = [run.trainer.current_epoch, run.trainer.global_step]
        run = Run("", callbacks=[_Stop("on_validation_end")], max_epochs=5, num_sanity_val_steps=0, **limits).do()
        facts[f"{name} at validation"] = [run.trainer.current_epoch, run.trainer.global_step]
    return facts


@scenario
def exceptions_on_the_way() -> Any:
    facts = {}
    for kind in (RuntimeError, KeyboardInterrupt):
        for hook in ("training_step", "validation_step", "on_train_epoch_start", "setup"):
            run = Run("cb ckpt dm", num_sanity_val_steps=0)

            def fail(*_: Any, kind: type[BaseException] = kind, **__: Any) -> None:
                raise kind("planned")

            setattr(run.model, hook, fail)
            raised = attempt(run.do)
            facts[f"{kind.__name__} in {hook}"] = {
                "raised": raised,
                "end": run.trace.lines[-12:],
                "interrupted": run.trainer.interrupted,
                "state": plain(run.trainer.state.status),
            }
    return facts


@scenario
def configure_callbacks_of_the_model() -> Any:
    class Mine(Callback):
        pass

    class Other(Callback):
        pass

    class Model(Traced):
        def configure_callbacks(self) -> Any:
            return [Mine(), At("on_train_start", lambda trainer, _: None)]

    run = Run("cb", model=Model, callbacks=[Mine(), Other()])
    first, order = run.trainer.callbacks[1], []
    run.model.on_train_start = lambda: order.extend(type(callback).__name__ for callback in run.trainer.callbacks)
    run.do()
    return {"order": order, "kept": run.trainer.callbacks[1] is first, "after": [type(c).__name__ for c in run.trainer.callbacks]}


@scenario
def frozen_children_keep_their_modes() -> Any:
    modes = []

    class Model(Traced):
        def __init__(self, trace: Any) -> None:
            super().__init__(trace)
            self.frozen, self.live = torch.nn.Dropout(), torch.nn.Dropout()
            self.frozen.eval()

    def note(trainer: Trainer, module: Any) -> None:
        modes.append([plain(trainer.state.stage), module.training, module.frozen.training, module.live.training])

    hooks = ("on_fit_start", "on_validation_start", "on_validation_end", "on_train_epoch_start", "on_train_epoch_end", "on_fit_end")
    run = Run("", model=Model, callbacks=[At(hook, note) for hook in hooks], num_sanity_val_steps=1)
    run.do()
    run.do("validate")
    return {"modes": modes, "after": [run.model.training, run.model.frozen.training, run.model.live.training]}


@scenario
def a_model_in_eval_mode() -> Any:
    run = Run("", num_sanity_val_steps=1)
    run.model.eval()
    return run.do().facts()


@scenario
def reloading_loaders_every_epoch() -> Any:
    facts = {}
    for every in (1, 2):
        run = Run("", reload_dataloaders_every_n_epochs=every, max_epochs=4, num_sanity_val_steps=1).do()
        facts[str(every)] = [line for line in run.trace.lines if "loader" in line or "epoch_start" in line]
    return facts


@scenario
def loaders_of_a_datamodule_win_over_the_models() -> Any:
    class Data(PlainData):
        def train_dataloader(self) -> Any:
            return loader(1, 50)

    return Run("dm", data=Data).do().facts()
