"""Which files ModelCheckpoint leaves, under which names, and what it says of them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from .base import Plain, loader, plain, scenario, trainer
from .rows import Memory

SCORES = (3.0, 1.0, 2.0, 0.5)


class Scored(Plain):
    scores = SCORES

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/loss", float(self.global_step))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.log("v", self.scores[min(self.current_epoch, len(self.scores) - 1)])


class Files(Callback):
    """The files at the end of every epoch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(_files())


def _files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*.ckpt"))


def _numbers() -> dict[str, Any]:
    numbers = {}
    for name in _files():
        checkpoint = torch.load(name, weights_only=False)
        numbers[name] = [checkpoint["epoch"], checkpoint["global_step"]]
    return numbers


def _clear() -> None:
    for name in _files():
        Path(name).unlink()


def _run(model: Any = None, epochs: int = 4, run_arguments: Any = None, **arguments: Any) -> dict[str, Any]:
    _clear()
    callback, files = ModelCheckpoint(**{"dirpath": "d", **arguments}), Files()
    run = trainer(
        **{
            "max_epochs": epochs,
            "callbacks": [callback, files],
            "enable_checkpointing": True,
            "num_sanity_val_steps": 1,
            **(run_arguments or {}),
        }
    )
    run.fit(model or Scored(), loader(3), loader(1))
    facts = {
        "files": _numbers(),
        "on the way": files.seen,
        "best": _short(callback.best_model_path),
        "last": _short(callback.last_model_path),
        "score": plain(callback.best_model_score),
        "kth": [_short(callback.kth_best_model_path), plain(callback.kth_value)],
        "top": {_short(path): plain(score) for path, score in sorted(callback.best_k_models.items())},
        "current": plain(callback.current_score),
    }
    _clear()
    return facts


def _short(path: str) -> str:
    return str(Path(path).absolute().relative_to(Path.cwd())) if path else ""


@scenario
def files_by_default() -> Any:
    return {
        "plain": _run(),
        "save_last": _run(save_last=True),
        "link": _run(save_last="link"),
        "all": _run(save_top_k=-1),
        "none": _run(save_top_k=0),
    }


@scenario
def files_of_the_top_k() -> Any:
    return {
        "best": _run(monitor="v"),
        "two": _run(monitor="v", save_top_k=2),
        "max": _run(monitor="v", save_top_k=2, mode="max"),
        "all": _run(monitor="v", save_top_k=-1),
        "none, last": _run(monitor="v", save_top_k=0, save_last=True),
        "two and last": _run(monitor="v", save_top_k=2, save_last=True),
        "train metric": _run(monitor="train/loss"),
    }


@scenario
def files_at_intervals() -> Any:
    return {
        "two steps": _run(every_n_train_steps=2, save_top_k=-1),
        "two steps, one file": _run(every_n_train_steps=2),
        "two epochs": _run(every_n_epochs=2, save_top_k=-1),
        "no epochs": _run(every_n_epochs=0),
        "at train epoch end": _run(save_on_train_epoch_end=True, save_top_k=-1),
        "at validation end": _run(save_on_train_epoch_end=False, save_top_k=-1),
        "time": _run(train_time_interval=timedelta(seconds=0), save_top_k=-1, epochs=1),
        "steps and train metric": _run(every_n_train_steps=2, monitor="train/loss", mode="max", save_top_k=2),
        "accumulated": _run(every_n_train_steps=2, save_top_k=-1, run_arguments={"accumulate_grad_batches": 2}),
    }


@scenario
def files_with_validation_in_mid_epoch() -> Any:
    return {
        "interval 1": _run(monitor="v", save_top_k=-1, epochs=2, run_arguments={"val_check_interval": 1}),
        "every second epoch": _run(monitor="v", save_top_k=-1, run_arguments={"check_val_every_n_epoch": 2, "limit_val_batches": 1}),
        "max_steps": _run(save_top_k=-1, run_arguments={"max_steps": 4}),
        "no validation": _run(save_top_k=-1, run_arguments={"limit_val_batches": 0}),
    }


@scenario
def names_of_files() -> Any:
    return {
        "metrics": _run(monitor="v", filename="{epoch}-{step}-{v:.2f}"),
        "no insertion": _run(monitor="v", filename="e{epoch:02d}-{v}", auto_insert_metric_name=False),
        "slash in the metric": _run(filename="{epoch}-{train/loss:.1f}"),
        "slash, no insertion": _run(filename="x{train/loss:.1f}", auto_insert_metric_name=False),
        "folder": _run(filename="sub/{epoch}", save_top_k=-1, epochs=2),
        "absent": _run(filename="{absent}-{epoch}"),
        "fixed": _run(filename="fixed", save_top_k=-1, epochs=3),
        "fixed, one": _run(filename="fixed", epochs=3),
        "fixed, monitored": _run(filename="fixed", monitor="v", save_top_k=2),
        "no version": _run(filename="fixed", save_top_k=-1, enable_version_counter=False, epochs=3),
    }


@scenario
def names_made_by_hand() -> Any:
    metrics = {"epoch": 3, "step": 7, "v": torch.tensor(0.25), "train/loss": 1.5}
    facts = {}
    for pattern in (
        None,
        "{epoch}",
        "{epoch:03d}",
        "{v:.3f}-x",
        "{train/loss:.2f}",
        "a/{v}",
        "plain",
        "{missing}",
        "{epoch}{step}",
        "v={v}",
    ):
        for insertion in (True, False):
            callback = ModelCheckpoint(filename=pattern, auto_insert_metric_name=insertion)
            facts[f"{pattern} {insertion}"] = [
                callback.format_checkpoint_name(dict(metrics)),
                callback.format_checkpoint_name(dict(metrics), ver=2),
            ]
    facts["empty dirpath"] = [ModelCheckpoint(dirpath="", filename="{epoch}").format_checkpoint_name(dict(metrics))]
    callback = ModelCheckpoint(dirpath="d", filename="{epoch}")
    facts["prefix"] = [
        callback.format_checkpoint_name(dict(metrics), prefix="test"),
        callback.format_checkpoint_name(dict(metrics), filename="{step}"),
    ]
    return {key: [str(name).replace(str(Path.cwd()), "") for name in names] for key, names in facts.items()}


@scenario
def names_of_last_files() -> Any:
    facts = {}
    original = ModelCheckpoint.CHECKPOINT_NAME_LAST, ModelCheckpoint.CHECKPOINT_JOIN_CHAR, ModelCheckpoint.CHECKPOINT_EQUALS_CHAR
    try:
        ModelCheckpoint.CHECKPOINT_NAME_LAST = "{epoch}-final"
        facts["pattern"] = _run(save_last=True, epochs=2)["files"]
        ModelCheckpoint.CHECKPOINT_NAME_LAST, ModelCheckpoint.CHECKPOINT_JOIN_CHAR, ModelCheckpoint.CHECKPOINT_EQUALS_CHAR = (
            "last",
            "_",
            ":",
        )
        facts["characters"] = _run(save_last=True, epochs=2)["files"]
    finally:
        ModelCheckpoint.CHECKPOINT_NAME_LAST, ModelCheckpoint.CHECKPOINT_JOIN_CHAR, ModelCheckpoint.CHECKPOINT_EQUALS_CHAR = original
    return facts


@scenario
def folders_of_files() -> Any:
    facts = {}
    for name, arguments in {"no logger": {}, "logger": {"logger": Memory()}, "root": {"default_root_dir": "root"}}.items():
        _clear()
        run = trainer(max_epochs=1, enable_checkpointing=True, **arguments)
        run.fit(Plain(), loader(1))
        facts[name] = _files()
    _clear()
    for _ in range(2):
        trainer(max_epochs=1, enable_checkpointing=True, callbacks=[ModelCheckpoint(dirpath="d", save_last=True)]).fit(Plain(), loader(1))
    facts["twice"] = _files()
    return facts


@scenario
def scores_that_are_nan() -> Any:
    facts = {}
    for name, scores in {"first": (float("nan"), 2.0, 1.0, 3.0), "later": (2.0, float("nan"), 1.0, 3.0), "all": (float("nan"),)}.items():
        model = Scored()
        model.scores = scores
        facts[name] = _run(model, monitor="v", save_top_k=1)
    return facts


@scenario
def states_of_the_checkpoint_callback() -> Any:
    callback = ModelCheckpoint(dirpath="d", monitor="v", save_top_k=2, save_last=True)
    run = trainer(max_epochs=3, callbacks=[callback], enable_checkpointing=True)
    run.fit(Scored(), loader(2), loader(1))
    state = callback.state_dict()
    shown = {
        key: (_short(value) if key.endswith("path") and value else plain(value)) for key, value in state.items() if key != "best_k_models"
    }
    shown["dirpath"] = _short(shown["dirpath"])
    saved = torch.load("d/last.ckpt", weights_only=False)["callbacks"]
    resumed = ModelCheckpoint(dirpath="d", monitor="v", save_top_k=2, save_last=True)
    trainer(max_epochs=4, callbacks=[resumed], enable_checkpointing=True).fit(Scored(), loader(2), loader(1), ckpt_path="d/last.ckpt")
    return {"keys": sorted(state), "state": shown, "state keys": sorted(saved), "after resuming": sorted(_numbers().items())}


@scenario
def files_of_failed_runs() -> Any:
    class Failing(Scored):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 4:
                raise RuntimeError("planned")
            return super().training_step(batch, batch_idx)

    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    facts = {}
    for name, callback in {
        "ModelCheckpoint": ModelCheckpoint(dirpath="d", save_last=True),
        "OnException": OnExceptionCheckpoint("d"),
    }.items():
        _clear()
        try:
            trainer(max_epochs=3, callbacks=[callback], enable_checkpointing=True).fit(Failing(), loader(3), loader(1))
        except RuntimeError:
            facts[name] = _numbers()
    return facts
