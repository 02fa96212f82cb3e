"""Wrong models, loaders, return values, paths and calls of ``self.log``: the type of the exception of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader

from .base import Plain, attempt, loader, plain, scenario, stream, trainer


def _fit(model: Any = None, train: Any = None, val: Any = None, **arguments: Any) -> str:
    run = trainer(**{"max_epochs": 1, **arguments})
    return attempt(lambda: run.fit(model or Plain(), train if train is not None else loader(2), val))


def _model(**members: Any) -> Plain:
    return type("Model", (Plain,), members)()


def _without(*names: str) -> LightningModule:
    """A module that has all of ``Plain`` but ``names``."""
    members = {name: value for name, value in vars(Plain).items() if name not in names and not name.startswith("__")}

    def init(self: Any) -> None:
        LightningModule.__init__(self)
        self.weights = nn.Parameter(torch.tensor([0.5, -0.25]))

    return type("Model", (LightningModule,), {**members, "__init__": init})()


def _fit_model_without_init() -> None:
    class Model(Plain):
        def __init__(self) -> None:
            pass

    trainer(max_epochs=1).fit(Model(), loader(1))


@scenario
def missing_parts() -> Any:
    nothing = LightningModule()
    return {
        "fit without training_step": _fit(_without("training_step")),
        "fit without configure_optimizers": _fit(_without("configure_optimizers")),
        "fit without train loader": attempt(lambda: trainer(max_epochs=1).fit(Plain())),
        "fit without validation_step": _fit(_without("validation_step"), val=loader(1)),
        "fit of an empty module": _fit(nothing),
        "fit with a validation_step but no loader": _fit(),
        "validate without validation_step": attempt(lambda: trainer().validate(_without("validation_step"), loader(1))),
        "validate without loader": attempt(lambda: trainer().validate(Plain())),
        "test without test_step": attempt(lambda: trainer().test(_without("test_step"), loader(1))),
        "test without loader": attempt(lambda: trainer().test(Plain())),
        "predict without loader": attempt(lambda: trainer().predict(Plain())),
        "predict without predict_step and forward": attempt(lambda: trainer().predict(_without("predict_step", "forward"), loader(1))),
        "a plain module": _fit(nn.Linear(2, 1)),
        "a class": _fit(Plain),
        "a string": _fit("model"),
        "None to fit": attempt(lambda: trainer(max_epochs=1).fit(None, loader(1))),
        "no model to validate": attempt(lambda: trainer().validate(dataloaders=loader(1))),
        "no model to predict": attempt(lambda: trainer().predict(dataloaders=loader(1))),
        "forgot super().__init__": attempt(_fit_model_without_init),
        "a string as loader": _fit(train="loader"),
        "a number as loader": _fit(train=5),
        "a dataset as loader": _fit(train=loader(2).dataset),
        "a datamodule as loader": _fit(train=LightningDataModule()),
        "a datamodule in place of loaders, with loaders": attempt(
            lambda: trainer(max_epochs=1).fit(Plain(), loader(1), datamodule=LightningDataModule())
        ),
        "an empty datamodule": attempt(lambda: trainer(max_epochs=1).fit(Plain(), datamodule=LightningDataModule())),
        "None as train_dataloader": attempt(lambda: trainer(max_epochs=1).fit(_model(train_dataloader=lambda self: None))),
        "None as val_dataloader": attempt(
            lambda: trainer(max_epochs=1).fit(_model(train_dataloader=lambda self: loader(1), val_dataloader=lambda self: None))
        ),
        "a nested validation loader": _fit(val=[[loader(1)], loader(1)]),
        "None among validation loaders": _fit(val=[None, loader(1)]),
        "a sequential combined loader": _fit(train=CombinedLoader([loader(1)], "sequential")),
        "CombinedLoader mode": attempt(lambda: CombinedLoader([loader(1)], "median")),  # type: ignore[arg-type]
        "fraction of a stream": _fit(train=stream(3), limit_train_batches=0.5),
        "fraction of a validation stream": _fit(val=stream(3), limit_val_batches=0.5),
        "val_check_interval as a fraction of a stream": _fit(train=stream(3), val=loader(1), val_check_interval=0.5),
        "val_check_interval beyond the epoch": _fit(val=loader(1), val_check_interval=5),
        "a fraction that leaves no batch": _fit(limit_train_batches=0.1),
        "a fraction that leaves no validation batch": _fit(val=loader(2), limit_val_batches=0.1),
        "train loader without batches": _fit(train=loader(0)),
    }


@scenario
def wrong_steps() -> Any:
    def step(returned: Any) -> Any:
        return _model(training_step=lambda self, batch, batch_idx: returned(self, batch) if callable(returned) else returned)

    return {
        "string": _fit(step("loss")),
        "number": _fit(step(1.0)),
        "dict without loss": _fit(step({"x": torch.tensor(1.0)})),
        "dict with a number as loss": _fit(step({"loss": 1.0})),
        "empty dict": _fit(step({})),
        "list": _fit(step([torch.tensor(1.0)])),
        "tuple": _fit(step(lambda self, batch: (self(batch).mean(), 1))),
        "tensor without graph": _fit(step(torch.tensor(1.0))),
        "tensor of two elements": _fit(step(lambda self, batch: self.weights * 1)),
        "tensor of one element": _fit(step(lambda self, batch: self(batch))),
        "None": _fit(step(None)),
        "dict with None as loss": _fit(step({"loss": None})),
        "no batch_idx": _fit(_model(training_step=lambda self, batch: self(batch).mean())),
        "other names": _fit(_model(training_step=lambda self, x, i: self(x).mean())),
        "no arguments": _fit(_model(training_step=lambda self: self.weights.sum())),
        "batch_idx first": _fit(_model(training_step=lambda self, batch_idx, batch: self(batch).mean())),
        "validation string": _fit(_model(validation_step=lambda self, batch, batch_idx: "x"), val=loader(1)),
        "validation number": _fit(_model(validation_step=lambda self, batch, batch_idx: 1.0), val=loader(1)),
        "validation dict": _fit(_model(validation_step=lambda self, batch, batch_idx: {"a": 1}), val=loader(1)),
        "validation list": _fit(_model(validation_step=lambda self, batch, batch_idx: [1]), val=loader(1)),
        "validation without batch_idx": _fit(_model(validation_step=lambda self, batch: None), val=loader(1)),
        "several loaders without dataloader_idx": _fit(_model(validation_step=lambda self, batch, batch_idx: None), val=[loader(1)] * 2),
        "one loader with dataloader_idx": _fit(_model(validation_step=lambda self, batch, batch_idx, dataloader_idx: None), val=loader(1)),
        "one loader with an optional dataloader_idx": _fit(
            _model(validation_step=lambda self, batch, batch_idx, dataloader_idx=0: None), val=loader(1)
        ),
        "several loaders, hook without dataloader_idx": _fit(
            _model(on_validation_batch_end=lambda self, outputs, batch, batch_idx: None), val=[loader(1)] * 2
        ),
        "one loader, hook with dataloader_idx": _fit(
            _model(on_validation_batch_start=lambda self, batch, batch_idx, dataloader_idx: None), val=loader(1)
        ),
        "removed hook training_epoch_end": _fit(_model(training_epoch_end=lambda self, outputs: None)),
        "removed hook validation_epoch_end": _fit(_model(validation_epoch_end=lambda self, outputs: None), val=loader(1)),
        "removed hook test_epoch_end": attempt(lambda: trainer().test(_model(test_epoch_end=lambda self, outputs: None), loader(1))),
        "removed hook on_epoch_start": _fit(_model(on_epoch_start=lambda self: None)),
        "removed hook on_batch_start": _fit(_model(on_batch_start=lambda self: None)),
        "removed hook training_step_end": _fit(_model(training_step_end=lambda self, outputs: outputs)),
        "removed hook on_pretrain_routine_start": _fit(_model(on_pretrain_routine_start=lambda self: None)),
        "manual with clipping": _fit(_manual(), gradient_clip_val=1.0),
        "manual with accumulation": _fit(_manual(), accumulate_grad_batches=2),
        "manual returning a loss": _fit(_manual()),
        "manual_backward in automatic optimization": _fit(
            _model(training_step=lambda self, batch, batch_idx: self.manual_backward(self(batch).mean()))
        ),
    }


def _manual() -> Plain:
    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = self(batch).mean()
        self.manual_backward(loss)
        self.optimizers().step()
        return loss

    model = _model(training_step=step)
    model.automatic_optimization = False
    return model


@scenario
def wrong_configure_optimizers() -> Any:
    def fit(form: Any) -> str:
        return _fit(_model(configure_optimizers=lambda self: form(torch.optim.SGD(self.parameters(), lr=0.1))))

    def step_lr(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def plateau(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    def config(**extra: Any) -> Any:
        return lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), **extra}}

    class Other:
        def step(self) -> None:
            pass

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    class NoState:
        def step(self) -> None:
            pass

    return {
        "string": fit(lambda o: "sgd"),
        "number": fit(lambda o: 0.1),
        "class": fit(lambda o: torch.optim.SGD),
        "empty list": fit(lambda o: []),
        "empty dict": fit(lambda o: {}),
        "dict without optimizer": fit(lambda o: {"lr_scheduler": step_lr(o)}),
        "unknown key": fit(lambda o: {"optimizer": o, "scheduler": step_lr(o)}),
        "unknown scheduler key": fit(config(intervall="step")),
        "interval": fit(config(interval="day")),
        "frequency 0": fit(config(frequency=0)),
        "frequency a float": fit(config(frequency=1.5)),
        "no scheduler in the dict": fit(lambda o: {"optimizer": o, "lr_scheduler": {"interval": "step"}}),
        "scheduler None": fit(lambda o: {"optimizer": o, "lr_scheduler": None}),
        "plateau without monitor": fit(lambda o: {"optimizer": o, "lr_scheduler": plateau(o)}),
        "plateau in lists without monitor": fit(lambda o: ([o], [plateau(o)])),
        "plateau on an absent metric": fit(lambda o: {"optimizer": o, "lr_scheduler": plateau(o), "monitor": "x"}),
        "scheduler of another optimizer": fit(
            lambda o: {"optimizer": o, "lr_scheduler": step_lr(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))}
        ),
        "two optimizers": fit(lambda o: [o, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)]),
        "tuple of optimizer and scheduler": fit(lambda o: (o, step_lr(o))),
        "lists of mixed things": fit(lambda o: [o, step_lr(o)]),
        "three lists": fit(lambda o: ([o], [step_lr(o)], [])),
        "own scheduler": fit(lambda o: {"optimizer": o, "lr_scheduler": Other()}),
        "own scheduler without state": fit(lambda o: {"optimizer": o, "lr_scheduler": NoState()}),
        "list of dicts": fit(lambda o: [{"optimizer": o, "lr_scheduler": step_lr(o)}]),
        "tuple of a dict": fit(lambda o: ({"optimizer": o, "lr_scheduler": step_lr(o)},)),
    }


@scenario
def wrong_log_calls() -> Any:
    def fit(action: Any) -> str:
        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            action(self, batch_idx)
            return self(batch).mean()

        return _fit(_model(training_step=step))

    def twice(model: Any, batch_idx: int) -> None:
        model.log("a", 1.0)
        model.log("a", 1.0, on_epoch=True)

    def same_twice(model: Any, batch_idx: int) -> None:
        model.log("a", 1.0)
        model.log("a", 2.0)

    outside = Plain()
    facts = {
        "no trainer": attempt(lambda: outside.log("a", 1.0)),
        "neither on_step nor on_epoch": fit(lambda m, _: m.log("a", 1.0, on_step=False, on_epoch=False)),
        "reduce_fx unknown": fit(lambda m, _: m.log("a", 1.0, reduce_fx="median")),
        "reduce_fx a callable": fit(lambda m, _: m.log("a", 1.0, on_epoch=True, reduce_fx=lambda x: x)),
        "reduce_fx a function of torch": fit(lambda m, _: m.log("a", 1.0, on_epoch=True, reduce_fx=torch.median)),
        "reduce_fx None": fit(lambda m, _: m.log("a", 1.0, on_epoch=True, reduce_fx=None)),
        "nested dict": fit(lambda m, _: m.log("a", {"b": {"c": 1.0}})),
        "dict": fit(lambda m, _: m.log("a", {"b": 1.0})),
        "list": fit(lambda m, _: m.log("a", [1.0])),
        "string": fit(lambda m, _: m.log("a", "high")),
        "None": fit(lambda m, _: m.log("a", None)),
        "two elements": fit(lambda m, _: m.log("a", torch.ones(2))),
        "no elements": fit(lambda m, _: m.log("a", torch.ones(0))),
        "one element": fit(lambda m, _: m.log("a", torch.ones(1, 1))),
        "numpy number": fit(lambda m, _: m.log("a", __import__("numpy").float32(1.0))),
        "complex": fit(lambda m, _: m.log("a", 1j)),
        "name not a string": fit(lambda m, _: m.log(5, 1.0)),
        "name with dataloader_idx": fit(lambda m, _: m.log("a/dataloader_idx_0", 1.0)),
        "different arguments in one hook": fit(twice),
        "same arguments in one hook": fit(same_twice),
        "different arguments in the next step": fit(lambda m, i: m.log("a", 1.0, on_epoch=bool(i))),
        "different batch_size": fit(lambda m, i: m.log("a", 1.0, on_epoch=True, batch_size=i + 1)),
        "log_dict of a list": fit(lambda m, _: m.log_dict([1.0])),
        "log_dict of a number": fit(lambda m, _: m.log_dict(1.0)),
        "log_dict nested": fit(lambda m, _: m.log_dict({"a": {"b": 1.0}})),
        "metric_attribute unknown": fit(lambda m, _: m.log("a", 1.0, metric_attribute="nothing")),
        "batch_size 0": fit(lambda m, _: m.log("a", 1.0, on_epoch=True, batch_size=0)),
        "unknown argument": fit(lambda m, _: m.log("a", 1.0, on_end=True)),
        "empty name": fit(lambda m, _: m.log("", 1.0)),
    }
    model = Plain()
    trainer(max_epochs=1).fit(model, loader(1))
    facts["after fit"] = attempt(lambda: model.log("a", 1.0))
    predicting = _model(predict_step=lambda self, batch, batch_idx: self.log("a", 1.0))
    facts["in predict_step"] = attempt(lambda: trainer().predict(predicting, loader(1)))
    return facts


@scenario
def wrong_ckpt_paths() -> Any:
    Path("text.ckpt").write_text("nothing")
    torch.save({"epoch": 1}, "short.ckpt")
    torch.save(Plain().state_dict(), "weights.ckpt")

    def fit(path: Any, **arguments: Any) -> str:
        return attempt(lambda: trainer(**{"max_epochs": 1, **arguments}).fit(Plain(), loader(1), ckpt_path=path))

    def saved(**arguments: Any) -> Any:
        return {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(**arguments)]}

    facts = {
        "absent": fit("nowhere.ckpt"),
        "text": fit("text.ckpt"),
        "short": fit("short.ckpt"),
        "weights": fit("weights.ckpt"),
        "folder": fit("."),
        "number": fit(5),
        "best before fit": fit("best"),
        "best with a callback before fit": fit("best", **saved()),
        "last without callback": fit("last"),
        "last with a callback": fit("last", **saved()),
        "hpc": fit("hpc"),
        "empty": fit(""),
        "validate best": attempt(lambda: trainer().validate(Plain(), loader(1), ckpt_path="best")),
        "validate last": attempt(lambda: trainer().validate(Plain(), loader(1), ckpt_path="last")),
        "validate absent": attempt(lambda: trainer().validate(Plain(), loader(1), ckpt_path="nowhere.ckpt")),
        "test short": attempt(lambda: trainer().test(Plain(), loader(1), ckpt_path="short.ckpt")),
        "load_from_checkpoint absent": attempt(lambda: Plain.load_from_checkpoint("nowhere.ckpt")),
        "load_from_checkpoint text": attempt(lambda: Plain.load_from_checkpoint("text.ckpt")),
        "load_from_checkpoint short": attempt(lambda: Plain.load_from_checkpoint("short.ckpt")),
        "load_from_checkpoint weights": attempt(lambda: Plain.load_from_checkpoint("weights.ckpt")),
        "save before fit": attempt(lambda: trainer().save_checkpoint("x.ckpt")),
        "fast_dev_run best": fit("best", fast_dev_run=True),
    }
    run = trainer(max_epochs=1, **saved(save_top_k=0))
    run.fit(Plain(), loader(1))
    facts["test best that kept nothing"] = attempt(lambda: run.test(Plain(), loader(1), ckpt_path="best"))
    run = trainer(max_epochs=1, **saved(dirpath="d"))
    run.fit(Plain(), loader(1))
    facts["test best after fit"] = attempt(lambda: run.test(dataloaders=loader(1), ckpt_path="best"))
    facts["test last after fit"] = attempt(lambda: run.test(dataloaders=loader(1), ckpt_path="last"))
    return facts


@scenario
def modules_without_a_trainer() -> Any:
    model, data = Plain(), LightningDataModule()
    return {
        "trainer": attempt(lambda: model.trainer),
        "optimizers": attempt(lambda: model.optimizers()),
        "lr_schedulers": attempt(lambda: model.lr_schedulers()),
        "manual_backward": attempt(lambda: model.manual_backward(torch.ones((), requires_grad=True))),
        "attributes": plain(
            [model.current_epoch, model.global_step, model.global_rank, model.local_rank, model.logger, list(model.loggers)]
        ),
        "device": [str(model.device), str(model.dtype), model.on_gpu],
        "train_dataloader": attempt(model.train_dataloader),
        "val_dataloader": attempt(model.val_dataloader),
        "training_step of the base": attempt(lambda: LightningModule().training_step(None, 0)),
        "forward of the base": attempt(lambda: LightningModule()(1)),
        "configure_optimizers of the base": attempt(lambda: LightningModule().configure_optimizers()),
        "datamodule train_dataloader": attempt(data.train_dataloader),
        "datamodule trainer": plain(data.trainer),
        "print": attempt(lambda: model.print("")),
        "all_gather": attempt(lambda: model.all_gather(torch.ones(1))),
        "hparams": plain(dict(model.hparams)),
        "example_input_array": plain(model.example_input_array),
        "automatic_optimization": model.automatic_optimization,
        "strict_loading": model.strict_loading,
    }
