"""Automatic and manual optimization: closures, several optimizers, schedulers, clipping, steps without a loss."""

from __future__ import annotations

from typing import Any

import torch

from .base import At, Plain, attempt, loader, plain, scenario, trainer
from .tracing import SGD, Bare, Run


@scenario
def clipping_through_the_hook() -> Any:
    facts = {}
    for name, arguments in {
        "norm": {"gradient_clip_val": 0.01},
        "value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        "zero": {"gradient_clip_val": 0},
        "none": {},
    }.items():
        facts[name] = Run("heavy", limit_val_batches=0, **arguments).do().facts()
    return facts


@scenario
def clipping_by_hand_in_the_hook() -> Any:
    class Model(Bare):
        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")

    return Run("heavy", model=Model).do(train_dataloaders=loader(2)).facts()


@scenario
def training_step_returning_none() -> Any:
    class Model(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (1, 2) else super().training_step(batch, batch_idx)

    plainly = Run("cb heavy", model=Model).do(train_dataloaders=loader(4)).facts()
    accumulated = Run("cb", model=Model, accumulate_grad_batches=2).do(train_dataloaders=loader(4)).facts()
    return {"plain": plainly, "accumulated": accumulated}


@scenario
def training_step_returning_a_tensor_or_extra_keys() -> Any:
    class Loss(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).mean()

    class Extra(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self(batch)
            return {"loss": out.mean(), "out": out, "note": "x", "nested": {"sum": out.sum()}}

    return {kind.__name__: Run("cb", model=kind).do(train_dataloaders=loader(1)).facts() for kind in (Loss, Extra)}


@scenario
def optimizer_step_overridden() -> Any:
    class EveryOther(Bare):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            else:
                optimizer_closure()

    class Twice(Bare):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            optimizer.step()

    return {kind.__name__: Run("cb", model=kind).do(train_dataloaders=loader(3)).facts() for kind in (EveryOther, Twice)}


@scenario
def optimizer_step_without_the_closure() -> Any:
    class Model(Plain):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            pass

    return attempt(lambda: trainer(max_epochs=1).fit(Model(), loader(1)))


@scenario
def closures_run_more_than_once() -> Any:
    class Model(Bare):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3, max_eval=3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).pow(2).mean()

    return Run("cb", model=Model).do(train_dataloaders=loader(2, 1)).facts()


class _Manual(Bare):
    def __init__(self, trace: Any) -> None:
        super().__init__(trace)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizers = [SGD(self.trace, self.parameters(), lr=0.1), SGD(self.trace, self.parameters(), lr=0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()
        for optimizer in (first, second):
            loss = self(batch).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


@scenario
def manual_optimization_with_two_optimizers() -> Any:
    return Run("cb heavy", model=_Manual).do(train_dataloaders=loader(2), val_dataloaders=loader(1, 100)).facts()


@scenario
def manual_optimization_with_closures_toggling_and_schedulers() -> Any:
    class Model(_Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            first, second = self.optimizers()

            def closure() -> Any:
                loss = self(batch).mean()
                first.zero_grad()
                self.manual_backward(loss)
                return loss

            with first.toggle_model():
                first.step(closure=closure)
            self.toggle_optimizer(second)
            second.step(closure)
            self.untoggle_optimizer(second)
            self.clip_gradients(first, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
            self.lr_schedulers().step()
            return {"loss": self(batch).mean().detach(), "lr": first.param_groups[0]["lr"]}

    return Run("cb", model=Model).do(train_dataloaders=loader(2)).facts()


@scenario
def manual_optimization_returning_nothing() -> Any:
    class Model(_Manual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    run = Run("cb", model=Model).do(train_dataloaders=loader(2))
    return run.facts()


@scenario
def no_optimizer_at_all() -> Any:
    class Model(Bare):
        def configure_optimizers(self) -> Any:
            return None

    return Run("cb", model=Model).do(train_dataloaders=loader(2)).facts()


def _optimizer_forms() -> dict[str, Any]:
    def sgd(model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def step_lr(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def config(model: Any, **extra: Any) -> Any:
        optimizer = sgd(model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step_lr(optimizer), **extra}}

    def lists(model: Any, dicts: bool = False) -> Any:
        optimizer = sgd(model)
        scheduler = step_lr(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 2}] if dicts else [scheduler]

    def plateau(model: Any, **extra: Any) -> Any:
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "metric", **extra}}

    def flat_plateau(model: Any) -> Any:
        optimizer = sgd(model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
            "monitor": "metric",
        }

    return {
        "one": sgd,
        "list": lambda model: [sgd(model)],
        "dict": lambda model: {"optimizer": sgd(model)},
        "lists": lists,
        "lists with dict": lambda model: lists(model, True),
        "step": lambda model: config(model, interval="step"),
        "every second step": lambda model: config(model, interval="step", frequency=2),
        "every second epoch": lambda model: config(model, frequency=2),
        "named": lambda model: config(model, name="mine"),
        "plateau": plateau,
        "flat plateau": flat_plateau,
        "plateau by step": lambda model: plateau(model, interval="step"),
        "plateau not strict": lambda model: plateau(model, monitor="absent", strict=False),
        "none": lambda model: None,
    }


@scenario
def forms_of_configure_optimizers() -> Any:
    class Model(Plain):
        form: Any = None

        def configure_optimizers(self) -> Any:
            return self.form()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("metric", torch.tensor(1.0))
            return super().training_step(batch, batch_idx)

    facts = {}
    for name, form in _optimizer_forms().items():
        model, rates = Model(), []
        model.form = lambda form=form, model=model: form(model)

        def note(trainer: Any, _: Any, rates: list[Any] = rates) -> None:
            rates.extend(plain(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)

        run = trainer(max_epochs=3, callbacks=[At("on_train_batch_end", note), At("on_train_epoch_end", note)])
        raised = attempt(lambda run=run, model=model: run.fit(model, loader(3)))
        configs = [
            [type(c.scheduler).__name__, c.name, c.interval, c.frequency, c.reduce_on_plateau, c.monitor, c.strict]
            for c in run.lr_scheduler_configs
        ]
        facts[name] = {"raised": raised, "rates": rates, "configs": configs}
    return facts


@scenario
def schedulers_by_steps() -> Any:
    class Model(Plain):
        frequency = 1

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": self.frequency}]

    facts = {}
    for accumulation, frequency in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 2)):
        model, rates = Model(), []
        model.frequency = frequency
        note = At("on_train_batch_end", lambda trainer, _, rates=rates: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
        trainer(max_epochs=2, accumulate_grad_batches=accumulation, callbacks=[note]).fit(model, loader(5))
        facts[f"accumulation {accumulation}, frequency {frequency}"] = rates
    return facts


@scenario
def plateau_on_validation_metrics() -> Any:
    class Model(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            self.log("metric", 1.0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "metric", **self.config}}

        config: dict[str, Any] = {}

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            steps.append([self.current_epoch, self.global_step, plain(metric)])
            super().lr_scheduler_step(scheduler, metric)

    facts: dict[str, Any] = {}
    for name, arguments, config in (
        ("each epoch", {}, {}),
        ("validation every second epoch", {"check_val_every_n_epoch": 2}, {}),
        ("validation every second epoch, not strict", {"check_val_every_n_epoch": 2}, {"strict": False}),
        ("validation every half epoch", {"val_check_interval": 0.5}, {}),
        ("each step, validation every step", {"val_check_interval": 1}, {"interval": "step"}),
        ("each step, not strict", {"val_check_interval": 2}, {"interval": "step", "strict": False}),
        ("every second step", {"val_check_interval": 1}, {"interval": "step", "frequency": 2}),
        ("every second epoch", {}, {"frequency": 2}),
    ):
        steps: list[Any] = []
        model = Model()
        model.config = config
        run = trainer(max_epochs=4, num_sanity_val_steps=0, **arguments)
        facts[name] = [attempt(lambda run=run, model=model: run.fit(model, loader(4), loader(1))), steps]
    return facts


@scenario
def what_optimizers_and_lr_schedulers_return() -> Any:
    class Model(_Manual):
        seen: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            both, raw = self.optimizers(), self.optimizers(use_pl_optimizer=False)
            scheduler = self.lr_schedulers()
            type(self).seen = [
                [isinstance(o, torch.optim.SGD) for o in both],
                [type(o).__name__ for o in both],
                [type(o).__name__ for o in raw],
                type(scheduler).__name__,
                both[0].optimizer is raw[0],
                self.optimizers()[0] is both[0],
            ]

    run = Run("", model=Model).do(train_dataloaders=loader(1))
    return run.model.seen


@scenario
def frozen_parameters_and_toggling() -> Any:
    class Model(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.other = torch.nn.Parameter(torch.ones(1))
            self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
            self.automatic_optimization = False
            self.seen: list[Any] = []

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([self.weights, self.frozen], lr=0.1), torch.optim.SGD([self.other, self.weights], lr=0.1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                self.seen.append([p.requires_grad for p in (self.weights, self.other, self.frozen)])
                self.untoggle_optimizer(optimizer)
                self.seen.append([p.requires_grad for p in (self.weights, self.other, self.frozen)])

    model = Model()
    trainer(max_epochs=1).fit(model, loader(1))
    model.freeze()
    frozen = [p.requires_grad for p in model.parameters()], model.training
    model.unfreeze()
    return {"seen": model.seen, "frozen": frozen, "unfrozen": ([p.requires_grad for p in model.parameters()], model.training)}


@scenario
def weights_after_training_in_different_ways() -> Any:
    facts = {}
    for name, arguments in {
        "plain": {},
        "clipped by norm": {"gradient_clip_val": 0.1},
        "clipped by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        "accumulated, even": {"accumulate_grad_batches": 2},
        "accumulated, uneven": {"accumulate_grad_batches": 4},
        "double": {"precision": "64-true"},
        "bf16-true": {"precision": "bf16-true"},
        "bf16-mixed": {"precision": "bf16-mixed"},
    }.items():
        torch.manual_seed(3)
        model, seen = Plain(), []
        note = At("on_train_batch_end", lambda trainer, module, seen=seen: seen.append([str(module.weights.dtype), plain(module.weights)]))
        trainer(max_epochs=2, callbacks=[note], **arguments).fit(model, loader(6, batch_size=1))
        facts[name] = [seen, str(model.weights.dtype), str(model.dtype)]
    return facts
