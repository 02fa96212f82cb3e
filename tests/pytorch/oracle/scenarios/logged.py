"""What ``self.log`` leaves in the trainer's metrics, hook by hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning.pytorch import Callback, LightningModule, Trainer

from .base import Plain, attempt, loader, plain, scenario, trainer

Plan = Mapping[str, Callable[..., Any]]

MODULE_HOOKS = [
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_fit_end",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_validation_model_zero_grad",
    "setup",
    "teardown",
    "prepare_data",
    "configure_model",
    "configure_optimizers",
    "train_dataloader",
    "on_save_checkpoint",
    "optimizer_zero_grad",
    "optimizer_step",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "backward",
    "forward",
]
CALLBACK_HOOKS = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_fit_end",
    "teardown",
    "on_save_checkpoint",
    "state_dict",
    "on_exception",
]


class Planned(Plain):
    """Logs what its plan says in ``training_step`` and ``validation_step``: a function of model, batch index and loader index."""

    def __init__(self, train: Any = None, val: Any = None) -> None:
        super().__init__()
        self.train_plan, self.val_plan = train, val

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.train_plan:
            self.train_plan(self, 1.0 + batch_idx + 10 * self.current_epoch, batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.val_plan:
            self.val_plan(self, 100.0 + batch_idx + 50 * dataloader_idx, batch_idx)

    test_step = validation_step


class Snapshots(Callback):
    """Keeps the trainer's metrics at the ends of hooks."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def take(self, name: str, trainer: Trainer) -> None:
        place = f"{len(self.seen):02} {name} e{trainer.current_epoch} s{trainer.global_step}"
        self.seen[place] = metrics(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take("sanity end", trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.take("batch start", trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.take("batch end", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.take("validation batch end", trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take("validation epoch end", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take("validation end", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take("epoch end", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take("train end", trainer)


def metrics(trainer: Trainer) -> dict[str, Any]:
    return {
        "callback": plain(dict(sorted(trainer.callback_metrics.items()))),
        "logged": plain(dict(sorted(trainer.logged_metrics.items()))),
        "bar": plain(dict(sorted(trainer.progress_bar_metrics.items()))),
    }


def _fit(train: Any = None, val: Any = None, batches: int = 2, vals: Any = None, **arguments: Any) -> dict[str, Any]:
    snapshots = Snapshots()
    run = trainer(**{"max_epochs": 2, "callbacks": [snapshots], "log_every_n_steps": 1, "num_sanity_val_steps": 1, **arguments})
    run.fit(Planned(train, val), loader(batches), vals if vals is not None else loader(2))
    return {**snapshots.seen, "after": metrics(run)}


def _all_flags(model: Any, value: float, batch_idx: int) -> None:
    for on_step in (None, True, False):
        for on_epoch in (None, True, False):
            if on_step is not False or on_epoch is not False:
                if on_step is False and on_epoch is None and model.trainer.training:
                    continue
                if on_epoch is False and on_step is None and not model.trainer.training:
                    continue
                model.log(f"step {on_step} epoch {on_epoch}", value, on_step=on_step, on_epoch=on_epoch, prog_bar=True)


@scenario
def log_flags_in_training() -> Any:
    return _fit(train=_all_flags)


@scenario
def log_flags_in_validation() -> Any:
    return _fit(val=_all_flags)


@scenario
def log_destinations() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        for bar in (False, True):
            for logger in (None, True, False):
                model.log(f"bar {bar} logger {logger}", value, prog_bar=bar, logger=logger, on_epoch=True)

    return _fit(train=plan, val=None)


@scenario
def log_reductions() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        for reduction in ("mean", "sum", "min", "max", "avg", "MEAN", "Sum", torch.mean, torch.sum, torch.min, torch.max):
            name = reduction if isinstance(reduction, str) else f"torch.{reduction.__name__}"
            model.log(name, value, reduce_fx=reduction, on_step=True, on_epoch=True)

    return {"training": _fit(train=plan, batches=3, max_epochs=1)["after"], "validation": _fit(val=plan, max_epochs=1)["after"]}


@scenario
def log_weighs_by_batch_size() -> Any:
    snapshots = Snapshots()

    class Model(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("inferred", float(batch_idx), on_epoch=True, on_step=False)
            self.log("given", float(batch_idx), on_epoch=True, on_step=False, batch_size=10**batch_idx)
            self.log("sum", float(batch_idx), on_epoch=True, on_step=False, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            self.log("val", float(batch_idx))

    run = trainer(max_epochs=1, callbacks=[snapshots])
    run.fit(Model(), loader(5, batch_size=2), loader(5, batch_size=3))
    return metrics(run)


@scenario
def log_infers_the_batch_size_of_nested_batches() -> Any:
    forms: dict[str, Any] = {
        "tensor": [torch.ones(4, 2), torch.ones(1, 2)],
        "tuple": [(torch.ones(4, 2), torch.ones(4)), (torch.ones(1, 2), torch.ones(1))],
        "dict": [{"a": torch.ones(4, 2)}, {"a": torch.ones(1, 2)}],
        "nested": [{"a": [torch.ones(4, 2)], "b": {"c": torch.ones(4)}}, {"a": [torch.ones(1, 2)], "b": {"c": torch.ones(1)}}],
        "strings": [{"s": ["a", "b", "c", "d"], "a": torch.ones(4, 2)}, {"s": ["a"], "a": torch.ones(1, 2)}],
        "ambiguous": [(torch.ones(4, 2), torch.ones(2)), (torch.ones(1, 2), torch.ones(3))],
        "scalar": [torch.tensor(1.0), torch.tensor(2.0)],
        "numbers": [1, 2],
        "string": ["abc", "d"],
    }

    class Batches:
        def __init__(self, batches: list[Any]) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            return iter(self.batches)

    class Model(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            self.log("v", float(batch_idx))

    facts = {}
    for name, batches in forms.items():
        run = trainer()
        raised = attempt(lambda run=run, batches=batches: run.validate(Model(), Batches(batches), verbose=False))
        facts[name] = [raised, plain(run.callback_metrics)]
    return facts


@scenario
def log_over_several_validation_loaders() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        model.log("v", value, prog_bar=True)
        model.log("both", value, on_step=True, on_epoch=True, prog_bar=True)
        model.log("shared", value, add_dataloader_idx=False)

    def only_one(model: Any, value: float, batch_idx: int) -> None:
        if value >= 150:
            model.log("second", value, add_dataloader_idx=False)
        model.log("v", value)

    loaders = [loader(2), loader(3, 10)]
    facts = {"shared": attempt(lambda: _fit(val=plan, vals=loaders, batches=1))}
    facts["separate"] = _fit(val=only_one, vals=loaders, batches=1, max_epochs=1)
    return facts


@scenario
def log_dict_and_kinds_of_values() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        model.log_dict({"a": value, "b": torch.tensor(value), "nan": float("nan"), "inf": float("inf")}, on_epoch=True, prog_bar=True)
        model.log("int", 3, on_epoch=True, prog_bar=True)
        model.log("bool", True, on_epoch=True)
        model.log("int tensor", torch.tensor(3), on_epoch=True)
        model.log("double", torch.tensor(0.1, dtype=torch.float64), on_epoch=True)
        model.log("half", torch.tensor(0.1, dtype=torch.float16), on_epoch=True)
        model.log("one element", torch.tensor([2.0]), on_epoch=True)
        model.log("with graph", model.weights.sum(), on_epoch=True, enable_graph=True)
        model.log("no graph", model.weights.sum(), on_epoch=True)

    types: dict[str, Any] = {}

    class Types(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
                for key, value in getattr(trainer, name).items():
                    described = (
                        [str(value.dtype), list(value.shape), value.requires_grad]
                        if isinstance(value, torch.Tensor)
                        else type(value).__name__
                    )
                    types[f"{name} {key}"] = described

    after = _fit(train=plan, max_epochs=1, callbacks=[Types()])["after"]
    return {"metrics": after, "types": types}


class _HookLogger(Plain):
    """Logs once in one hook, with the flags that are the hook's own."""


def _logging_in(hook: str, on_callback: bool, **flags: Any) -> list[Any]:
    def log(module: LightningModule) -> None:
        module.log("here", 1.5, **flags)

    model, callbacks, ran = Plain(), [], []

    if on_callback:

        def act(self: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append(True)
            log(model)
            return {} if hook == "state_dict" else None

        callbacks = [type("Logging", (Callback,), {hook: act})()]
    else:
        inherited = getattr(Plain, hook, None)

        def act(self: Any, *args: Any, **kwargs: Any) -> Any:
            if hook != "forward" or not self.trainer.sanity_checking:
                ran.append(True)
                log(self)
            return loader(2) if hook == "train_dataloader" else inherited(self, *args, **kwargs)

        model = type("Logging", (Plain,), {hook: act})()
        if hook == "lr_scheduler_step":

            def configure(self: Any) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

            type(model).configure_optimizers = configure
    run = trainer(max_epochs=1, callbacks=callbacks, num_sanity_val_steps=1)
    arguments = {} if hook == "train_dataloader" else {"train_dataloaders": loader(2)}
    raised = attempt(lambda: run.fit(model, **arguments, val_dataloaders=loader(2)))
    if hook in ("on_save_checkpoint", "state_dict") and raised == "no error":
        raised = attempt(lambda: run.save_checkpoint("a.ckpt"))
    return [raised, bool(ran), plain(run.callback_metrics)]


@scenario
def log_in_every_hook_of_the_module() -> Any:
    return {hook: _logging_in(hook, False) for hook in MODULE_HOOKS}


@scenario
def log_in_every_hook_of_a_callback() -> Any:
    return {hook: _logging_in(hook, True) for hook in CALLBACK_HOOKS}


@scenario
def log_with_on_step_in_every_hook() -> Any:
    module = {f"module {hook}": _logging_in(hook, False, on_step=True) for hook in MODULE_HOOKS if hook.startswith("on_")}
    return {**module, **{f"callback {hook}": _logging_in(hook, True, on_step=True) for hook in CALLBACK_HOOKS if hook.startswith("on_")}}


@scenario
def log_with_on_epoch_in_every_hook() -> Any:
    module = {f"module {hook}": _logging_in(hook, False, on_epoch=True) for hook in MODULE_HOOKS if hook.startswith("on_")}
    return {**module, **{f"callback {hook}": _logging_in(hook, True, on_epoch=True) for hook in CALLBACK_HOOKS if hook.startswith("on_")}}


@scenario
def log_through_trainer_results() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        model.log("v", value)
        model.log("step too", value, on_step=True, on_epoch=True)

    facts: dict[str, Any] = {}
    for task in ("validate", "test"):
        snapshots = Snapshots()
        run = trainer(callbacks=[snapshots])
        facts[task] = [getattr(run, task)(Planned(None, plan), loader(2), verbose=False), metrics(run), snapshots.seen]
    run = trainer(max_epochs=1)
    run.fit(Planned(lambda m, v, b: m.log("train", v)), loader(2))
    before = metrics(run)
    run.validate(Planned(None, plan), loader(2), verbose=False)
    facts["fit, then validate"] = [before, metrics(run)]
    return facts


@scenario
def log_values_from_the_sanity_check_are_gone() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        model.log("v", value, prog_bar=True)

    return _fit(val=plan, check_val_every_n_epoch=2, max_epochs=1)


@scenario
def log_in_both_training_and_validation_under_one_name() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        model.log("same", value, on_step=True, on_epoch=True, prog_bar=True)

    return _fit(train=plan, val=plan, max_epochs=1)


@scenario
def log_only_in_some_steps() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        if batch_idx == 1:
            model.log("once", value, on_step=True, on_epoch=True, prog_bar=True)

    return _fit(train=plan, batches=3, max_epochs=2)


@scenario
def log_a_metric_object() -> Any:
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            from torchmetrics import MeanMetric, SumMetric

            self.average, self.total = MeanMetric(), SumMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.average(float(batch_idx))
            self.log("average", self.average, on_step=True, on_epoch=True, prog_bar=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            self.total.update(float(batch_idx + 1))
            self.log("total", self.total)

    snapshots = Snapshots()
    run = trainer(max_epochs=2, callbacks=[snapshots], num_sanity_val_steps=1)
    model = Model()
    run.fit(model, loader(3), loader(2))
    return {**snapshots.seen, "after": metrics(run), "left": [plain(model.average.compute()), plain(model.total.compute())]}
