"""The Trainer on XLA devices, which are CPU devices of torch_xla: what it gives on the CPU."""

from __future__ import annotations

import csv
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from training import largest_difference, plain
from xla_devices import IS_MISSING, REASON, run

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceXLAStrategy, StrategyRegistry, XLAFSDPStrategy, XLAStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy as AtItsPath
from lightning.pytorch.strategies.xla import XLAStrategy as XLAAtItsPath

needs_xla = pytest.mark.skipif(IS_MISSING, reason=REASON)
TOLERANCE = 1e-6
SAMPLES = 32


class Model(LightningModule):
    """A regression whose global batches are of eight samples, however many devices share them."""

    def __init__(self, fails_on: int = -1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.fails_on = fails_on

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == self.fails_on and batch_idx == 2:
            raise KeyError("of rank 1")
        loss = self.loss(batch)
        self.log("train", loss, prog_bar=True, sync_dist=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self.loss(batch), prog_bar=True, sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    def data(self, samples: int = SAMPLES) -> DataLoader[Any]:
        x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
        dataset, count = TensorDataset(x, x.sum(1, keepdim=True)), self.trainer.world_size
        sampler = DistributedSampler(dataset, count, self.global_rank, shuffle=False) if count > 1 else None  # type: ignore[var-annotated]
        return DataLoader(dataset, batch_size=8 // count, sampler=sampler)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.data()

    def val_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(21, 4, generator=torch.Generator().manual_seed(2))  # on two devices 11 and 10 of them
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader


def trainer(**arguments: Any) -> Trainer:
    silent: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    return Trainer(**{**silent, "log_every_n_steps": 2, **arguments})


def fitted(arguments: dict[str, Any], predicts: bool = True) -> dict[str, Any]:
    """What fit, validate, test and predict give."""
    fit, model = trainer(**arguments), Model()
    fit.fit(model)
    found: dict[str, Any] = {
        "weights": plain({name: tensor.cpu() for name, tensor in model.state_dict().items()}),
        "metrics": {name: float(value) for name, value in fit.callback_metrics.items()},
        "steps": (fit.global_step, fit.current_epoch, fit.num_training_batches),
        "devices": sorted({str(parameter.device) for parameter in model.parameters()}),
        "strategy": (type(fit.strategy).__name__, fit.num_devices, str(fit.accelerator.name())),
    }
    for stage in ("validate", "test"):
        found[stage] = getattr(fit, stage)(model, verbose=False)
    predicted = fit.predict(model) if predicts else None
    found["predicted"] = torch.cat(predicted).flatten().tolist() if predicted else None
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert largest_difference(found["weights"], expected["weights"]) < TOLERANCE
    for name in ("train_epoch", "val"):
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], abs=2e-6)
    for stage, name in (("validate", "val"), ("test", "test")):
        assert found[stage] == [{name: pytest.approx(expected[stage][0][name], abs=2e-6)}]
    assert found["devices"] == ["cpu"], "where teardown brings the model"


# ---- one device ---------------------------------------------------------------------------------------------------------


def one_device() -> dict[str, Any]:
    found = {"plain": fitted({"accelerator": "tpu", "devices": 1, "enable_checkpointing": False})}
    more = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "callbacks": [EarlyStopping("val"), LearningRateMonitor()]}
    own = {"enable_progress_bar": True, "enable_model_summary": True, "logger": CSVLogger("rows"), "profiler": "simple"}
    found["more"] = fitted({"accelerator": "tpu", "default_root_dir": "more", **more, **own}, predicts=False)
    for precision in ("bf16-mixed", "bf16-true", "16-true", "64-true"):
        found[precision] = fitted({"accelerator": "tpu", "precision": precision, "enable_checkpointing": False, "max_epochs": 1})
    in_order = {"use_distributed_sampler": False}  # else a strategy of several processes shuffles, also for one
    found["fsdp"] = fitted({"accelerator": "tpu", "strategy": "xla_fsdp", "enable_checkpointing": False, **in_order}, predicts=False)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if IS_MISSING:
        pytest.skip(REASON)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        return {**run(one_device, timeout=300), "folder": Path.cwd()}


@pytest.fixture
def on_cpu() -> dict[str, Any]:
    return fitted({"accelerator": "cpu", "devices": 1, "enable_checkpointing": False})


def test_a_run_on_one_device_equals_that_on_the_cpu(alone: dict[str, Any], on_cpu: dict[str, Any]) -> None:
    found = alone["plain"]
    assert_same(found, on_cpu)
    assert found["predicted"] == [pytest.approx(value, abs=2e-6) for value in on_cpu["predicted"]]
    assert found["steps"] == on_cpu["steps"] == (8, 2, 4)
    assert found["strategy"] == ("SingleDeviceXLAStrategy", 1, "tpu")


def test_accumulation_clipping_callbacks_and_loggers_work_on_it(alone: dict[str, Any]) -> None:
    more = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    assert_same(alone["more"], fitted({"accelerator": "cpu", "enable_checkpointing": False, **more}, predicts=False))
    with open(alone["folder"] / "rows" / "lightning_logs" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val"]) for row in rows if row["val"]][-1] == pytest.approx(alone["more"]["metrics"]["val"], abs=1e-6)
    (checkpoint,) = (alone["folder"] / "rows").rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert largest_difference(plain(saved["state_dict"]), alone["more"]["weights"]) == 0


@pytest.mark.parametrize(("precision", "near"), [("bf16-mixed", 0.05), ("bf16-true", 0.05), ("16-true", 0.01), ("64-true", 1e-6)])
def test_precisions_are_those_of_the_cpu(alone: dict[str, Any], precision: str, near: float) -> None:
    expected = fitted({"accelerator": "cpu", "precision": precision, "enable_checkpointing": False, "max_epochs": 1})
    assert alone[precision]["metrics"]["val"] == pytest.approx(expected["metrics"]["val"], rel=near)


def test_weights_may_be_divided_on_one_device(alone: dict[str, Any], on_cpu: dict[str, Any]) -> None:
    assert_same(alone["fsdp"], on_cpu)
    assert alone["fsdp"]["strategy"] == ("XLAFSDPStrategy", 1, "tpu")


def evaluating() -> list[Any]:
    model = Model()
    return Trainer(accelerator="tpu", devices=1, logger=False, enable_progress_bar=False).validate(model, verbose=False)  # type: ignore[return-value]


@needs_xla
def test_evaluation_takes_no_grad_where_there_is_no_inference_mode() -> None:
    assert run(evaluating)


# ---- two devices --------------------------------------------------------------------------------------------------------


def two_devices() -> dict[str, Any]:
    warnings.filterwarnings("ignore", "This run saves checkpoints in")  # the run that resumes has a folder of its own
    found: dict[str, Any] = {}
    for name, strategy in {"xla": "auto", "fsdp": XLAFSDPStrategy(state_dict_type="full", auto_wrap_policy={nn.Linear})}.items():
        keeping = {"callbacks": [ModelCheckpoint(dirpath=name, monitor="val")], "logger": CSVLogger(f"{name}-rows")}
        arguments = {"accelerator": "tpu", "devices": 2, "strategy": strategy, "gradient_clip_val": 0.5}
        found[name] = fitted({**arguments, **keeping})
        first = trainer(**{**arguments, "max_epochs": 1, "default_root_dir": f"{name}-first"})
        first.fit(Model())
        second, model = trainer(**{**arguments, "default_root_dir": f"{name}-second"}), Model()
        second.fit(model, ckpt_path=first.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
        found[f"{name} resumed"] = plain(model.state_dict())
    divided = trainer(accelerator="tpu", devices=2, strategy="xla_fsdp", gradient_clip_val=0.5, default_root_dir="divided")
    divided.fit(Model())
    found["directory"] = divided.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    began = time.monotonic()
    try:
        trainer(accelerator="tpu", devices=2, enable_checkpointing=False).fit(Model(fails_on=1))
    except Exception as error:
        found["failure"] = (str(error), time.monotonic() - began)
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if IS_MISSING:
        pytest.skip(REASON)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("together"))
        return {**run(two_devices, devices=2, timeout=300), "folder": Path.cwd()}


@pytest.fixture
def clipped() -> dict[str, Any]:
    return fitted({"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "gradient_clip_val": 0.5})


@pytest.mark.parametrize(("name", "strategy"), [("xla", XLAStrategy), ("fsdp", XLAFSDPStrategy)])
def test_a_run_on_two_devices_equals_that_on_the_cpu(together: dict[str, Any], clipped: dict[str, Any], name: str, strategy: type) -> None:
    found = together[name]
    assert_same(found, clipped)
    assert found["strategy"] == (strategy.__name__, 2, "tpu")
    assert found["steps"] == (8, 2, 4)
    assert largest_difference(together[f"{name} resumed"], clipped["weights"]) < TOLERANCE, "resumed after the first epoch"
    (checkpoint,) = (together["folder"] / name).glob("*.ckpt")
    assert largest_difference(plain(torch.load(checkpoint, weights_only=True)["state_dict"]), clipped["weights"]) < TOLERANCE
    (rows,) = (together["folder"] / f"{name}-rows").rglob("metrics.csv")
    with open(rows, newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["val"]] == ["3", "7", "8"], (
            "one process logs: two in fit, one in validate"
        )


@pytest.mark.filterwarnings("ignore:This run saves checkpoints in")
def test_a_run_of_two_devices_goes_on_on_the_cpu(together: dict[str, Any], clipped: dict[str, Any]) -> None:
    (checkpoint,) = (together["folder"] / "xla-first").rglob("*.ckpt")
    model = Model()
    trainer(accelerator="cpu", gradient_clip_val=0.5).fit(model, ckpt_path=checkpoint)
    assert largest_difference(plain(model.state_dict()), clipped["weights"]) < TOLERANCE


def test_divided_checkpoints_are_directories_that_are_read_whole(together: dict[str, Any], clipped: dict[str, Any]) -> None:
    from lightning.fabric.checkpoint.sharded import read_sharded

    checkpoint = read_sharded(together["folder"] / together["directory"])
    assert largest_difference(plain(checkpoint["state_dict"]), clipped["weights"]) < TOLERANCE
    assert checkpoint["global_step"] == 8


def test_failure_of_one_device_ends_the_run_and_names_it(together: dict[str, Any]) -> None:
    message, seconds = together["failure"]
    assert "rank 1 raised KeyError: 'of rank 1'" in message
    assert "in training_step" in message
    assert seconds < 60


# ---- without torch_xla --------------------------------------------------------------------------------------------------


def test_strategies_stand_at_their_documented_paths_and_have_their_names() -> None:
    assert AtItsPath is SingleDeviceXLAStrategy
    assert XLAAtItsPath is XLAStrategy
    assert {"single_xla", "single_tpu", "xla", "xla_debug", "xla_fsdp"} <= set(StrategyRegistry)


@pytest.mark.skipif(not IS_MISSING, reason="says what happens without torch_xla")
@pytest.mark.parametrize("arguments", [{"accelerator": "tpu"}, {"strategy": "xla"}, {"strategy": "xla_fsdp"}, {"strategy": "single_xla"}])
def test_the_trainer_says_what_to_install(arguments: dict[str, Any]) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"needs the package torch_xla: `pip install"):
        Trainer(**arguments)
