"""The rows that loggers get: which metrics, at which step."""

from __future__ import annotations

from typing import Any

import torch

from lightning.pytorch.loggers.logger import Logger

from .base import Plain, loader, plain, scenario, trainer
from .logged import Planned


class Memory(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self.calls: list[Any] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append(["hyperparams", plain(dict(params))])

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append([step, {key: plain(value) for key, value in sorted(metrics.items())}])

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.calls.append(["graph"])

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.calls.append(["after save"])

    def finalize(self, status: str) -> None:
        self.calls.append(["finalize", status])


def _train(model: Any, value: float, batch_idx: int) -> None:
    model.log("now", value)
    model.log("whole", value, on_step=False, on_epoch=True)
    model.log("both", value, on_step=True, on_epoch=True)
    model.log("hidden", value, logger=False)


def _val(model: Any, value: float, batch_idx: int) -> None:
    model.log("val", value)
    model.log("val both", value, on_step=True, on_epoch=True)


def _rows(batches: int = 4, train: Any = _train, val: Any = _val, vals: Any = None, model: Any = None, **arguments: Any) -> list[Any]:
    memory = Memory()
    run = trainer(**{"max_epochs": 2, "logger": memory, "num_sanity_val_steps": 1, "log_every_n_steps": 1, **arguments})
    run.fit(model or Planned(train, val), loader(batches), vals or loader(2))
    return memory.rows


@scenario
def rows_at_every_step() -> Any:
    return _rows()


@scenario
def rows_every_n_steps() -> Any:
    return {str(every): _rows(log_every_n_steps=every) for every in (2, 3, 5, 50)}


@scenario
def rows_with_log_every_n_steps_zero() -> Any:
    return _rows(log_every_n_steps=0)


@scenario
def rows_under_accumulation() -> Any:
    return {str(every): _rows(5, accumulate_grad_batches=2, log_every_n_steps=every) for every in (1, 2, 3)}


@scenario
def rows_with_validation_in_mid_epoch() -> Any:
    return _rows(val_check_interval=2, log_every_n_steps=2)


@scenario
def rows_of_several_validation_loaders() -> Any:
    return _rows(2, vals=[loader(2), loader(1, 10)], max_epochs=1)


@scenario
def rows_without_anything_to_log() -> Any:
    return {"nothing": _rows(train=None, val=None), "only validation": _rows(train=None), "only training": _rows(val=None)}


@scenario
def rows_from_other_hooks() -> Any:
    class Model(Plain):
        def on_train_start(self) -> None:
            self.log("train start", 1.0)

        def on_train_epoch_start(self) -> None:
            self.log("epoch start", float(self.current_epoch))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.log("batch start", float(batch_idx))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("batch end", float(batch_idx))

        def on_validation_epoch_end(self) -> None:
            self.log("val epoch end", float(self.current_epoch))

        def on_train_epoch_end(self) -> None:
            self.log("epoch end", float(self.current_epoch))

    return _rows(2, model=Model())


@scenario
def rows_with_a_step_of_ones_own() -> Any:
    def plan(model: Any, value: float, batch_idx: int) -> None:
        model.log_dict({"step": value * 100, "loss": value})

    def epoch(model: Any, value: float, batch_idx: int) -> None:
        model.log_dict({"step": 7.0, "v": value})

    return {"training": _rows(2, train=plan, val=None, max_epochs=1), "validation": _rows(2, train=None, val=epoch)}


@scenario
def rows_of_validate_and_test() -> Any:
    facts = {}
    for task in ("validate", "test"):
        memory = Memory()
        run = trainer(logger=memory)
        getattr(run, task)(Planned(None, _val), loader(3), verbose=False)
        getattr(run, task)(Planned(None, _val), loader(3), verbose=False)
        facts[task] = [memory.rows, memory.calls]
    memory = Memory()
    run = trainer(logger=memory, max_epochs=1, num_sanity_val_steps=0)
    model = Planned(_train, _val)
    run.fit(model, loader(3), loader(2))
    memory.rows.clear()
    run.validate(model, loader(2), verbose=False)
    run.test(model, loader(2), verbose=False)
    facts["after fit"] = memory.rows
    return facts


@scenario
def rows_of_manual_optimization() -> Any:
    class Model(Planned):
        def __init__(self) -> None:
            super().__init__(_train, _val)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.step()

    return {str(every): _rows(3, model=Model(), log_every_n_steps=every, max_epochs=1) for every in (1, 2, 4)}


@scenario
def calls_that_loggers_get() -> Any:
    class Model(Planned):
        def __init__(self, width: int = 3, name: str = "x") -> None:
            super().__init__(_train, _val)
            self.save_hyperparameters()

    facts = {}
    for name, arguments in {
        "plain": {},
        "checkpoints": {"enable_checkpointing": True},
        "no autolog": {"enable_autolog_hparams": False},
    }.items():
        memory = Memory()
        trainer(logger=memory, max_epochs=1, log_every_n_steps=1, **arguments).fit(Model(), loader(2), loader(1))
        facts[name] = memory.calls
    memory = Memory()

    class Failing(Model):
        def on_train_epoch_start(self) -> None:
            raise RuntimeError("planned")

    try:
        trainer(logger=memory, max_epochs=1, log_every_n_steps=1).fit(Failing(), loader(2))
    except RuntimeError:
        facts["failed"] = memory.calls
    return facts


@scenario
def rows_in_two_loggers_and_through_the_module() -> Any:
    first, second = Memory(), Memory()

    class Model(Planned):
        def on_train_epoch_end(self) -> None:
            for logger in self.loggers:
                logger.log_metrics({"own": 1.0}, step=77)

    run = trainer(logger=[first, second], max_epochs=1, log_every_n_steps=1)
    model = Model(_train)
    run.fit(model, loader(2))
    return {"same": first.rows == second.rows, "rows": first.rows, "logger": run.logger is first, "model": model.logger is first}


@scenario
def rows_after_resuming() -> Any:
    run = trainer(max_epochs=1, num_sanity_val_steps=0)
    run.fit(Planned(_train, _val), loader(3), loader(2))
    run.save_checkpoint("a.ckpt")
    memory = Memory()
    trainer(max_epochs=2, logger=memory, log_every_n_steps=2, num_sanity_val_steps=0).fit(
        Planned(_train, _val), loader(3), loader(2), ckpt_path="a.ckpt"
    )
    return memory.rows


@scenario
def rows_of_fast_dev_run() -> Any:
    return _rows(3, fast_dev_run=2)
