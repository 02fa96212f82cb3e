"""Wrong arguments: the type of the exception of each."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from .base import QUIET, Plain, attempt, loader, plain, scenario, trainer

WRONG_TRAINER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "max_epochs -2": {"max_epochs": -2},
    "max_epochs a float": {"max_epochs": 1.5},
    "max_epochs a string": {"max_epochs": "3"},
    "min_epochs above max_epochs": {"min_epochs": 5, "max_epochs": 2},
    "min_epochs negative": {"min_epochs": -1},
    "max_steps -2": {"max_steps": -2},
    "max_steps None": {"max_steps": None},
    "max_steps a float": {"max_steps": 1.5},
    "min_steps above max_steps": {"min_steps": 5, "max_steps": 2},
    "max_time a wrong string": {"max_time": "one day"},
    "max_time a number": {"max_time": 3},
    "max_time a wrong dict": {"max_time": {"fortnights": 1}},
    "limit_train_batches 1.5": {"limit_train_batches": 1.5},
    "limit_train_batches -1": {"limit_train_batches": -1},
    "limit_train_batches -0.5": {"limit_train_batches": -0.5},
    "limit_train_batches a string": {"limit_train_batches": "half"},
    "limit_val_batches 2.5": {"limit_val_batches": 2.5},
    "limit_test_batches -1": {"limit_test_batches": -1},
    "limit_predict_batches 1.1": {"limit_predict_batches": 1.1},
    "overfit_batches 1.5": {"overfit_batches": 1.5},
    "overfit_batches -1": {"overfit_batches": -1},
    "val_check_interval 1.5": {"val_check_interval": 1.5},
    "val_check_interval -1": {"val_check_interval": -1},
    "val_check_interval 0": {"val_check_interval": 0},
    "val_check_interval 0.0": {"val_check_interval": 0.0},
    "val_check_interval a wrong string": {"val_check_interval": "often"},
    "val_check_interval a fraction across epochs": {"val_check_interval": 0.5, "check_val_every_n_epoch": None},
    "check_val_every_n_epoch 0": {"check_val_every_n_epoch": 0},
    "check_val_every_n_epoch 1.5": {"check_val_every_n_epoch": 1.5},
    "check_val_every_n_epoch a string": {"check_val_every_n_epoch": "2"},
    "num_sanity_val_steps -2": {"num_sanity_val_steps": -2},
    "num_sanity_val_steps a float": {"num_sanity_val_steps": 1.5},
    "log_every_n_steps -1": {"log_every_n_steps": -1},
    "accumulate_grad_batches 0": {"accumulate_grad_batches": 0},
    "accumulate_grad_batches -1": {"accumulate_grad_batches": -1},
    "accumulate_grad_batches a dict": {"accumulate_grad_batches": {0: 2}},
    "accumulate_grad_batches a float": {"accumulate_grad_batches": 1.5},
    "gradient_clip_val a string": {"gradient_clip_val": "1"},
    "gradient_clip_val negative": {"gradient_clip_val": -1.0},
    "gradient_clip_algorithm unknown": {"gradient_clip_algorithm": "median"},
    "gradient_clip_algorithm not a string": {"gradient_clip_algorithm": 2},
    "precision unknown": {"precision": "17"},
    "precision not a string": {"precision": [16]},
    "accelerator unknown": {"accelerator": "abacus"},
    "accelerator cuda without one": {"accelerator": "cuda"},
    "accelerator gpu without one": {"accelerator": "gpu"},
    "accelerator mps without one": {"accelerator": "mps"},
    "accelerator tpu without one": {"accelerator": "tpu"},
    "devices 0": {"devices": 0},
    "devices -1": {"devices": -1},
    "devices None": {"devices": None},
    "devices an empty list": {"devices": []},
    "devices a wrong string": {"devices": "many"},
    "devices a float": {"devices": 1.5},
    "strategy unknown": {"strategy": "luck"},
    "strategy not a string": {"strategy": 5},
    "num_nodes 0": {"num_nodes": 0},
    "reload_dataloaders_every_n_epochs -1": {"reload_dataloaders_every_n_epochs": -1},
    "reload_dataloaders_every_n_epochs a float": {"reload_dataloaders_every_n_epochs": 1.5},
    "fast_dev_run -1": {"fast_dev_run": -1},
    "fast_dev_run a float": {"fast_dev_run": 1.5},
    "fast_dev_run a string": {"fast_dev_run": "yes"},
    "fast_dev_run 1.0": {"fast_dev_run": 1.0},
    "profiler unknown": {"profiler": "gut feeling"},
    "plugins unknown": {"plugins": ["nothing"]},
    "plugins an object": {"plugins": [object()]},
    "logger not a logger": {"logger": "csv"},
    "logger an object": {"logger": object()},
    "callbacks not callbacks": {"callbacks": ["stop"]},
    "callbacks a class": {"callbacks": [Callback]},
    "checkpointing off with a checkpoint callback": {"callbacks": [ModelCheckpoint()]},
    "unknown argument": {"epochs": 3},
    "deterministic unknown": {"deterministic": "maybe"},
    "benchmark a string": {"benchmark": "yes"},
    "model_registry a number": {"model_registry": 3},
    "default_root_dir a number": {"default_root_dir": 3},
    "barebones with a bar": {"barebones": True, "enable_progress_bar": True},
    "barebones with checkpoints": {"barebones": True, "enable_checkpointing": True},
    "barebones with a logger": {"barebones": True, "logger": True},
    "barebones with a summary": {"barebones": True, "enable_model_summary": True},
    "barebones with sanity steps": {"barebones": True, "num_sanity_val_steps": 1},
    "barebones with fast_dev_run": {"barebones": True, "fast_dev_run": True},
    "barebones with anomaly detection": {"barebones": True, "detect_anomaly": True},
    "barebones with a profiler": {"barebones": True, "profiler": "simple"},
    "barebones with log_every_n_steps": {"barebones": True, "log_every_n_steps": 2},
}


@scenario
def wrong_trainer_arguments() -> Any:
    facts = {}
    for name, arguments in WRONG_TRAINER_ARGUMENTS.items():
        base = {} if "barebones" in name else {**QUIET, "max_epochs": 1}
        facts[name] = attempt(lambda base=base, arguments=arguments: Trainer(**{"accelerator": "cpu", "devices": 1, **base, **arguments}))
    return facts


@scenario
def wrong_trainer_arguments_when_run() -> Any:
    """What of these surfaces only in ``fit``, if at all."""
    facts = {}
    for name, arguments in WRONG_TRAINER_ARGUMENTS.items():
        if "barebones" in name or name.startswith(("num_nodes", "max_epochs -2")):
            continue

        def run(arguments: Any = arguments) -> None:
            Trainer(**{**QUIET, "max_epochs": 1, "max_steps": 6, **arguments}).fit(Plain(), loader(2), loader(1))

        facts[name] = attempt(run)
    return facts


@scenario
def values_of_accepted_forms() -> Any:
    facts: dict[str, Any] = {}
    for form in ("auto", 1, "1", [0], -1):
        facts[f"devices {form!r}"] = attempt(lambda form=form: trainer(devices=form))
    for form in (16, 32, 64, "16", "32", "64", "bf16", "32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", None):
        try:
            facts[f"precision {form!r}"] = str(trainer(precision=form).precision)
        except Exception as error:
            facts[f"precision {form!r}"] = type(error).__name__
    for form in ("00:00:00:05", {"seconds": 5}, {"days": 1, "hours": 2}, None):
        facts[f"max_time {form!r}"] = attempt(lambda form=form: trainer(max_time=form))
    for form in (True, False, "warn", None):
        facts[f"deterministic {form!r}"] = attempt(lambda form=form: trainer(deterministic=form))
    trainer(deterministic=False)
    return facts


@scenario
def which_callbacks_a_trainer_makes() -> Any:
    def kinds(**arguments: Any) -> list[str]:
        return [
            type(c).__name__.replace("Rich", "").replace("TQDM", "")
            for c in Trainer(**{"accelerator": "cpu", "devices": 1, "logger": False, **arguments}).callbacks
        ]

    class Mine(Callback):
        pass

    return {
        "default": kinds(),
        "no bar": kinds(enable_progress_bar=False),
        "no summary": kinds(enable_model_summary=False),
        "no checkpoints": kinds(enable_checkpointing=False),
        "own": kinds(callbacks=Mine()),
        "own checkpoint first": kinds(callbacks=[ModelCheckpoint(), Mine(), EarlyStopping("x")]),
        "max_time": kinds(max_time={"hours": 1}),
        "accumulation": kinds(accumulate_grad_batches=2),
        "fast_dev_run": kinds(fast_dev_run=True),
        "fast_dev_run with own": kinds(fast_dev_run=True, callbacks=[ModelCheckpoint(), EarlyStopping("x"), LearningRateMonitor()]),
        "barebones": kinds(barebones=True, logger=None),
    }


@scenario
def wrong_callback_arguments() -> Any:
    cases: dict[str, Any] = {
        "ModelCheckpoint save_top_k -2": lambda: ModelCheckpoint(save_top_k=-2),
        "ModelCheckpoint save_top_k 2 without monitor": lambda: ModelCheckpoint(save_top_k=2),
        "ModelCheckpoint every_n_train_steps -1": lambda: ModelCheckpoint(every_n_train_steps=-1),
        "ModelCheckpoint every_n_epochs -1": lambda: ModelCheckpoint(every_n_epochs=-1),
        "ModelCheckpoint two intervals": lambda: ModelCheckpoint(every_n_train_steps=1, every_n_epochs=1),
        "ModelCheckpoint mode": lambda: ModelCheckpoint(monitor="x", mode="median"),
        "ModelCheckpoint save_last": lambda: ModelCheckpoint(save_last="maybe"),  # type: ignore[arg-type]
        "EarlyStopping mode": lambda: EarlyStopping("x", mode="median"),
        "EarlyStopping without monitor": lambda: EarlyStopping(),  # type: ignore[call-arg]
        "LearningRateMonitor interval": lambda: LearningRateMonitor(logging_interval="day"),  # type: ignore[arg-type]
        "two equal callbacks": lambda: trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(), ModelCheckpoint()]),
        "two different callbacks": lambda: trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(), ModelCheckpoint(monitor="x")]),
        "LearningRateMonitor without logger": lambda: trainer(callbacks=[LearningRateMonitor()], max_epochs=1).fit(Plain(), loader(1)),
        "EarlyStopping on an absent metric": lambda: trainer(callbacks=[EarlyStopping("x")], max_epochs=1).fit(
            Plain(), loader(1), loader(1)
        ),
        "EarlyStopping not strict": lambda: trainer(callbacks=[EarlyStopping("x", strict=False)], max_epochs=1).fit(
            Plain(), loader(1), loader(1)
        ),
        "ModelCheckpoint on an absent metric": lambda: trainer(
            callbacks=[ModelCheckpoint(monitor="x")], enable_checkpointing=True, max_epochs=1
        ).fit(Plain(), loader(1)),
    }
    return {name: attempt(case) for name, case in cases.items()}


@scenario
def attributes_of_a_new_trainer() -> Any:
    facts = {}
    for name, arguments in {
        "default": {},
        "steps": {"max_steps": 5},
        "both": {"max_steps": 5, "max_epochs": 3},
        "min": {"min_epochs": 2},
        "forever": {"max_epochs": -1},
    }.items():
        run = trainer(**arguments)
        facts[name] = {
            "epochs": [run.min_epochs, run.max_epochs],
            "steps": [run.min_steps, run.max_steps],
            "now": [run.current_epoch, run.global_step, run.should_stop, run.is_last_batch],
            "batches": plain([run.num_training_batches, run.num_val_batches, run.num_test_batches, run.num_predict_batches]),
            "sanity": plain([run.num_sanity_val_batches, run.num_sanity_val_steps]),
            "limits": [run.limit_train_batches, run.limit_val_batches, run.limit_test_batches, run.limit_predict_batches],
            "validation": [run.val_check_interval, run.check_val_every_n_epoch, run.log_every_n_steps],
            "clip": [run.gradient_clip_val, run.gradient_clip_algorithm, run.accumulate_grad_batches],
            "ranks": [run.global_rank, run.local_rank, run.node_rank, run.world_size, run.num_nodes, run.num_devices, run.is_global_zero],
            "modes": [run.training, run.validating, run.testing, run.predicting, run.sanity_checking, run.evaluating, run.interrupted],
            "metrics": plain([run.callback_metrics, run.logged_metrics, run.progress_bar_metrics]),
            "parts": [run.logger, plain(run.loggers), run.checkpoint_callback, run.progress_bar_callback, run.early_stopping_callback],
            "loaders": plain([run.train_dataloader, run.val_dataloaders, run.test_dataloaders, run.predict_dataloaders]),
            "ckpt_path": run.ckpt_path,
            "optimizers": plain([run.optimizers, run.lr_scheduler_configs]),
            "state": plain([run.state.fn, run.state.stage, run.state.status]),
            "precision": str(run.precision),
            "device_ids": plain(run.device_ids),
            "scaler": plain(run.scaler),
        }
    return facts
