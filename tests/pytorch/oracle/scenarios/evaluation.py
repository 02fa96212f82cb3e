"""The order of hooks in ``validate``, ``test`` and ``predict``, and what they return."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from .base import Plain, attempt, loader, plain, scenario, stream, trainer
from .tracing import Run


@scenario
def validate_alone() -> Any:
    return Run("cb1 cb2 ckpt heavy").do("validate").facts()


@scenario
def test_alone() -> Any:
    return Run("cb ckpt heavy").do("test").facts()


@scenario
def predict_alone() -> Any:
    return Run("cb ckpt heavy").do("predict").facts()


@scenario
def evaluation_with_a_datamodule() -> Any:
    return {task: Run("cb dm").do(task).facts() for task in ("validate", "test", "predict")}


@scenario
def evaluation_of_several_loaders() -> Any:
    return {task: Run("cb").do(task, dataloaders=[loader(2), loader(1, 10)]).facts() for task in ("validate", "test", "predict")}


@scenario
def evaluation_of_a_dict_of_loaders() -> Any:
    loaders = {"a": loader(2), "b": loader(1, 10)}
    return {task: Run("").do(task, dataloaders=loaders).facts() for task in ("validate", "test", "predict")}


@scenario
def evaluation_of_combined_loaders() -> Any:
    facts = {}
    for mode in ("min_size", "max_size_cycle", "max_size", "sequential"):
        combined = CombinedLoader({"a": loader(2), "b": loader(3, 10)}, mode)
        facts[mode] = Run("").do("validate", dataloaders=combined).facts()
    return facts


@scenario
def evaluation_of_streams_and_limits() -> Any:
    facts: dict[str, Any] = {"streams": Run("").do("validate", dataloaders=[stream(2), stream(3, 10)]).facts()}
    for task, limit in {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}.items():
        facts[f"{task} none"] = Run("cb", **{limit: 0}).do(task).facts()
        facts[f"{task} one"] = Run("", **{limit: 1}).do(task, dataloaders=[loader(2), stream(2, 10)]).facts()
        facts[f"{task} half"] = Run("", **{limit: 0.5}).do(task, dataloaders=[loader(4), loader(3, 10)]).facts()
    return facts


@scenario
def evaluation_after_fit_with_the_same_trainer() -> Any:
    run = Run("cb", limit_train_batches=1).do()
    facts = {"fit": len(run.trace.lines)}
    for task in ("validate", "test", "predict"):
        run.trace.lines.clear()
        facts[task] = run.do(task).facts()
    return facts


@scenario
def evaluation_without_a_model_after_fit() -> Any:
    run = Run("", limit_train_batches=1).do()
    run.trace.lines.clear()
    facts: dict[str, Any] = {"without a checkpoint callback": attempt(lambda: run.trainer.validate(dataloaders=loader(1)))}
    run = Run("", limit_train_batches=1, enable_checkpointing=True).do()
    run.trace.lines.clear()
    run.trainer.validate(dataloaders=loader(1))
    return {**facts, "with one": run.facts()}


@scenario
def evaluation_fast_dev_run() -> Any:
    return {task: Run("cb", fast_dev_run=1).do(task, dataloaders=loader(3)).facts() for task in ("validate", "test", "predict")}


class _Echo(Plain):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return int(batch[0, 0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("v", batch[0, 0])
        self.log("shared", 1.0 * dataloader_idx, add_dataloader_idx=False)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log_dict({"t/a": batch[0, 0], "t/b": 2.0}, prog_bar=True)


class _Shared(_Echo):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("v", batch[0, 0])

    def on_validation_epoch_end(self) -> None:
        self.log("end", 3.0)


@scenario
def return_values_of_evaluation() -> Any:
    one, two = loader(3), [loader(2), loader(3, 10)]
    return {
        "validate": trainer().validate(_Shared(), one, verbose=False),
        "validate two": trainer().validate(_Shared(), two, verbose=False),
        "test": trainer().test(_Echo(), one, verbose=False),
        "test two": trainer().test(_Echo(), two, verbose=False),
        "nothing logged": trainer().validate(Plain(), one, verbose=False),
        "nothing logged, two": trainer().validate(Plain(), two, verbose=False),
        "no batches": trainer(limit_val_batches=0).validate(_Echo(), one, verbose=False),
        "types": [type(value).__name__ for value in trainer().validate(_Shared(), one, verbose=False)[0].values()],
    }


@scenario
def return_values_of_predict() -> Any:
    one, two = loader(3), [loader(2), loader(3, 10)]
    default = Plain()
    del Plain.predict_step
    try:
        forwarded = trainer().predict(default, one)
    finally:
        Plain.predict_step = _predict_step  # type: ignore[method-assign]
    return {
        "one": trainer().predict(_Echo(), one),
        "two": trainer().predict(_Echo(), two),
        "not wanted": trainer().predict(_Echo(), one, return_predictions=False),
        "list of one": trainer().predict(_Echo(), [one]),
        "default step": plain(forwarded),
        "no batches": trainer(limit_predict_batches=0).predict(_Echo(), one),
    }


_predict_step = Plain.predict_step


class _Indices(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append([batch_idx, dataloader_idx, plain(list(trainer.predict_loop.current_batch_indices))])

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(plain(list(trainer.predict_loop.epoch_batch_indices)))


@scenario
def batch_indices_for_prediction_writers() -> Any:
    from lightning.pytorch.callbacks import BasePredictionWriter

    class Writer(BasePredictionWriter):
        def __init__(self, interval: str) -> None:
            super().__init__(interval)  # type: ignore[arg-type]
            self.seen: list[Any] = []

        def write_on_batch_end(
            self, trainer: Any, module: Any, prediction: Any, indices: Any, batch: Any, batch_idx: int, loader: int
        ) -> None:
            self.seen.append(["batch", plain(prediction), plain(indices), batch_idx, loader])

        def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
            self.seen.append(["epoch", plain(predictions), plain(indices)])

    facts: dict[str, Any] = {}
    for interval in ("batch", "epoch", "batch_and_epoch"):
        writer = Writer(interval)
        trainer(callbacks=[writer]).predict(_Echo(), [loader(5, batch_size=2), loader(2, 10)])
        facts[interval] = writer.seen
    bare = _Indices()
    trainer(callbacks=[bare]).predict(_Echo(), loader(3))
    facts["no writer"] = bare.seen
    return facts


@scenario
def inference_mode_and_gradients() -> Any:
    import torch

    seen: dict[str, Any] = {}

    class Model(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            seen[self.key] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), batch.is_inference()]

        key = ""

    for mode in (True, False):
        model = Model()
        model.key = f"validate {mode}"
        trainer(inference_mode=mode).validate(model, loader(1), verbose=False)
        model.key = f"fit {mode}"
        trainer(inference_mode=mode, max_epochs=1).fit(model, loader(1), loader(1))
    return seen


@scenario
def gradients_where_nothing_is_computed() -> Any:
    """Whether gradients are on while loaders are asked for and modes are set."""
    import torch

    seen: dict[str, Any] = {}

    def noting(name: str) -> Any:
        def hook(self: Any) -> Any:
            stage = plain(self.trainer.state.stage)
            seen[f"{stage} {name}"] = torch.is_grad_enabled()
            return loader(1) if "loader" in name else getattr(Plain, name)(self)

        return hook

    names = [f"{task}_dataloader" for task in ("train", "val", "test", "predict")]
    names += [
        f"on_{name}" for name in ("validation_model_eval", "validation_model_train", "validation_model_zero_grad", "predict_model_eval")
    ]
    names += ["on_test_model_eval", "on_test_model_train"]
    model = type("Model", (Plain,), {name: noting(name) for name in names})()
    trainer(max_epochs=1).fit(model)
    for task in ("validate", "test", "predict"):
        getattr(trainer(), task)(model)
    return seen
