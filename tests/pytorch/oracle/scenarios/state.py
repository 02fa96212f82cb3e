"""The counters that a trainer shows on the way and at the end, and whole checkpoints as users see them."""

from __future__ import annotations

from typing import Any

import torch

from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer

from .base import At, Plain, attempt, loader, plain, scenario, stream, trainer


def _counters(run: Any) -> list[Any]:
    return plain([run.current_epoch, run.global_step, run.num_training_batches, run.num_val_batches, run.is_last_batch])


@scenario
def counters_after_runs() -> Any:
    facts = {}
    for name, arguments in {
        "plain": {"max_epochs": 2},
        "steps": {"max_steps": 3},
        "steps beyond": {"max_steps": 7, "max_epochs": 9},
        "accumulated": {"max_epochs": 2, "accumulate_grad_batches": 3},
        "limited": {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1},
        "fractions": {"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 0.7},
        "fast_dev_run": {"fast_dev_run": True},
        "fast_dev_run 3": {"fast_dev_run": 3},
        "overfit 2": {"overfit_batches": 2, "max_epochs": 1},
        "overfit half": {"overfit_batches": 0.5, "max_epochs": 1},
        "no training": {"limit_train_batches": 0, "max_epochs": 3},
        "zero epochs": {"max_epochs": 0},
    }.items():
        run = trainer(**arguments)
        run.fit(Plain(), loader(5), loader(3))
        facts[name] = [_counters(run), run.max_epochs, run.max_steps, plain(run.estimated_stepping_batches), run.state.status.value]
    return facts


@scenario
def counters_on_the_way() -> Any:
    facts = {}
    for name, arguments in {"sized": {}, "accumulated": {"accumulate_grad_batches": 2}}.items():
        seen: list[Any] = []

        def note(run: Any, _: Any, seen: list[Any] = seen) -> None:
            seen.append([plain(run.state.stage), run.training, run.validating, run.sanity_checking, *_counters(run)])

        hooks = (
            "on_fit_start on_train_start on_train_epoch_start on_train_batch_start on_train_batch_end on_validation_start "
            "on_validation_end on_train_epoch_end on_train_end on_fit_end"
        )
        run = trainer(max_epochs=2, callbacks=[At(hook, note) for hook in hooks.split()], **arguments)
        run.fit(Plain(), loader(3), loader(1))
        facts[name] = seen
    seen = facts.setdefault("stream", [])
    run = trainer(max_epochs=1, callbacks=[At("on_train_batch_end", lambda run, _: seen.append(_counters(run)))])
    run.fit(Plain(), stream(3), stream(2))
    return facts


@scenario
def estimated_stepping_batches_in_different_runs() -> Any:
    facts = {}
    for name, (arguments, train) in {
        "plain": ({"max_epochs": 3}, loader(5)),
        "accumulated": ({"max_epochs": 3, "accumulate_grad_batches": 2}, loader(5)),
        "beyond the epoch": ({"max_epochs": 3, "accumulate_grad_batches": 9}, loader(5)),
        "steps": ({"max_steps": 7, "max_epochs": -1}, loader(5)),
        "steps and epochs": ({"max_steps": 7, "max_epochs": 1}, loader(5)),
        "limited": ({"max_epochs": 2, "limit_train_batches": 3}, loader(5)),
        "stream": ({"max_epochs": 2}, stream(3)),
        "limited stream": ({"max_epochs": 2, "limit_train_batches": 2}, stream(3)),
        "stream with steps": ({"max_steps": 2, "max_epochs": -1}, stream(3)),
        "overfit": ({"max_epochs": 2, "overfit_batches": 2}, loader(5)),
    }.items():
        seen: list[Any] = []

        class Model(Plain):
            def configure_optimizers(self, seen: list[Any] = seen) -> Any:
                seen.append(plain(self.trainer.estimated_stepping_batches))
                return super().configure_optimizers()

        run = trainer(**arguments)
        raised = attempt(lambda run=run, train=train, Model=Model: run.fit(Model(), train))
        facts[name] = [raised, seen]
    scheduled = trainer(max_epochs=4, callbacks=[GradientAccumulationScheduler({0: 1, 2: 2})])
    facts["accumulation scheduler"] = attempt(lambda: (scheduled.fit(Plain(), loader(4)), scheduled.estimated_stepping_batches))
    facts["outside"] = attempt(lambda: trainer().estimated_stepping_batches)
    endless = trainer(max_epochs=-1, max_steps=-1, callbacks=[Timer({"seconds": 0})])
    endless.fit(Plain(), loader(2))
    facts["endless"] = plain(endless.estimated_stepping_batches)
    return facts


@scenario
def early_stopping_in_runs() -> Any:
    class Model(Plain):
        values: list[float] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.log("v", self.values[min(self.current_epoch, len(self.values) - 1)])

    facts = {}
    for name, (values, arguments) in {
        "never better": ([1.0] * 9, {}),
        "patience 1": ([3.0, 2.0, 2.5, 2.5, 1.0], {"patience": 1}),
        "improves": ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], {"patience": 1}),
        "max": ([1.0, 2.0, 1.5, 1.4], {"patience": 2, "mode": "max"}),
        "min_delta": ([3.0, 2.9, 2.8, 2.7], {"patience": 1, "min_delta": 0.5}),
        "stopping_threshold": ([3.0, 2.0, 1.0], {"stopping_threshold": 2.5}),
        "divergence_threshold": ([3.0, 20.0, 1.0], {"divergence_threshold": 10.0}),
        "nan": ([3.0, float("nan"), 1.0], {}),
        "nan allowed": ([3.0, float("nan"), 1.0, 1.0, 1.0, 1.0], {"check_finite": False, "patience": 2}),
        "inf": ([float("inf"), 2.0], {}),
        "on train epoch end": ([1.0] * 9, {"check_on_train_epoch_end": True}),
    }.items():
        model, stopper = Model(), EarlyStopping("v", **arguments)
        model.values = values
        run = trainer(max_epochs=6, callbacks=[stopper])
        run.fit(model, loader(2), loader(1))
        facts[name] = [run.current_epoch, stopper.stopped_epoch, stopper.wait_count, plain(stopper.best_score), run.should_stop]
    for name, arguments in {"min_epochs": {"min_epochs": 5}, "min_steps": {"min_steps": 9}}.items():
        model = Model()
        model.values = [1.0] * 9
        run = trainer(max_epochs=8, callbacks=[EarlyStopping("v", patience=1)], **arguments)
        run.fit(model, loader(2), loader(1))
        facts[name] = [run.current_epoch, run.global_step]
    return facts


@scenario
def accumulation_schedules() -> Any:
    seen: list[Any] = []
    note = At("on_train_epoch_end", lambda run, _: seen.append([run.current_epoch, run.global_step, run.accumulate_grad_batches]))
    run = trainer(max_epochs=5, callbacks=[GradientAccumulationScheduler({1: 2, 3: 3}), note])
    run.fit(Plain(), loader(6))
    return {"seen": seen, "after": run.accumulate_grad_batches, "weights": plain(next(iter(run.lightning_module.parameters())))}


@scenario
def a_finished_run_as_a_checkpoint() -> Any:
    class Model(Plain):
        def __init__(self, width: int = 3, rate: float = 0.5) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.register_buffer("counts", torch.arange(2))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    run = trainer(max_epochs=2)
    run.fit(Model(), loader(3), loader(1))
    run.save_checkpoint("a.ckpt")
    checkpoint = torch.load("a.ckpt", weights_only=False)
    again = Model.load_from_checkpoint("a.ckpt", rate=0.25)
    return {
        "keys": sorted(checkpoint),
        "numbers": [checkpoint["epoch"], checkpoint["global_step"]],
        "hparams": [plain(dict(checkpoint["hyper_parameters"])), checkpoint.get("hparams_name")],
        "state": sorted(checkpoint["state_dict"]),
        "groups": len(checkpoint["optimizer_states"][0]["param_groups"]),
        "callbacks": plain(checkpoint["callbacks"]),
        "scheduler": checkpoint["lr_schedulers"][0]["last_epoch"],
        "loaded": [plain(dict(again.hparams)), plain(again.weights), again.training],
        "weights_only": attempt(lambda: torch.load("a.ckpt", weights_only=True)),
    }


@scenario
def dataloaders_that_a_trainer_shows() -> Any:
    train, val = loader(2), [loader(1), loader(1)]
    run = trainer(max_epochs=1)
    run.fit(Plain(), train, val)
    facts = {"train": run.train_dataloader is train, "val": [a is b for a, b in zip(run.val_dataloaders, val)]}
    single = loader(1)
    run.validate(Plain(), single, verbose=False)
    facts["one val"] = run.val_dataloaders is single
    run.predict(Plain(), {"a": single})
    facts["predict"] = plain(run.predict_dataloaders)
    facts["test"] = plain(run.test_dataloaders)
    return facts
