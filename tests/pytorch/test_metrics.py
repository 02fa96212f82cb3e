"""``self.log``: what is kept of logged values, how they are reduced, and what the trainer's dictionaries then hold."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.metric_entry import Entry, resolve_options


@pytest.fixture
def logged(Weight: Any, make_trainer: Any, numbers: Any) -> Any:
    """``logged(log, batches=4, **arguments)``: the trainer after a fit whose steps run ``log(module, batch, batch_idx)``."""

    def run(log: Any, batches: Any = 4, **arguments: Any) -> Any:
        class Model(Weight):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                log(self, batch, batch_idx)
                return self.weight * 1.0

        trainer = make_trainer(**arguments)
        trainer.fit(Model(), numbers(batches) if isinstance(batches, int) else DataLoader(batches, batch_size=None))
        return trainer

    return run


# ---- reductions -----------------------------------------------------------------------------------------------------


def test_mean_over_a_long_epoch_keeps_its_digits(logged: Any) -> None:
    # In single precision the sum would stop growing at 2**24: a mean of small numbers beside one large number would be wrong.
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        module.log("tensor", torch.tensor(1e8 if index == 0 else 1.0), on_epoch=True, on_step=False, batch_size=1)
        module.log("number", 1e8 if index == 0 else 1.0, on_epoch=True, on_step=False, batch_size=1)
        module.log("sum", torch.tensor(1e8 if index == 0 else 1.0), on_epoch=True, on_step=False, reduce_fx="sum")

    metrics = logged(log, 1001).callback_metrics
    expected = (1e8 + 1000) / 1001
    assert metrics["tensor"].item() == pytest.approx(expected, rel=1e-7)
    assert metrics["number"].item() == pytest.approx(expected, rel=1e-7)
    assert metrics["sum"].item() == pytest.approx(1e8 + 1000, rel=6e-8)


def test_half_values_accumulate_beyond_their_range(logged: Any) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            module.log(f"sum {dtype}", torch.tensor(60000.0, dtype=dtype), on_epoch=True, on_step=False, reduce_fx="sum")
            module.log(f"mean {dtype}", torch.tensor(index + 1.0, dtype=dtype), on_epoch=True, on_step=False)

    metrics = logged(log).callback_metrics
    assert metrics["sum torch.float16"].item() == pytest.approx(240000, rel=1e-3)
    assert metrics["sum torch.bfloat16"].item() == pytest.approx(240000, rel=1e-2)
    assert metrics["mean torch.float16"].item() == metrics["mean torch.bfloat16"].item() == 2.5


def test_half_precision_of_the_model_is_not_that_of_the_metrics(logged: Any) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        module.log("count", torch.tensor(1001), on_epoch=True)  # a bfloat16 has no 1001
        module.log("mean", torch.tensor(1.0 if index else 1.0078125, dtype=torch.bfloat16), on_epoch=True)

    metrics = logged(log, precision="bf16-true").callback_metrics
    assert metrics["count"].item() == metrics["count_step"].item() == 1001
    assert metrics["mean"].item() == 1 + 0.0078125 / 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize(("reduction", "expected"), [("mean", 0.75), ("sum", 3.0), ("min", 0.0), ("max", 1.0)])
def test_tensors_of_every_type_are_reduced(logged: Any, dtype: torch.dtype, reduction: str, expected: float) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        module.log("x", torch.tensor(index > 0).to(dtype), on_epoch=True, reduce_fx=reduction, batch_size=3)

    trainer = logged(log, log_every_n_steps=1)
    assert trainer.callback_metrics["x"].item() == expected
    assert trainer.callback_metrics["x_step"].item() == 1.0
    assert trainer.callback_metrics["x"].is_floating_point()


@pytest.mark.parametrize("value", [True, 3, 2.5, np.float32(2.5), np.int64(3), np.float64(2.5)], ids=repr)
def test_numbers_of_every_type_are_reduced(logged: Any, value: Any) -> None:
    metrics = logged(lambda module, batch, index: module.log("x", value, on_epoch=True)).callback_metrics
    assert metrics["x"].item() == metrics["x_step"].item() == float(value)
    assert metrics["x"].dtype is torch.float32


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 2.5), ("sum", 10.0), ("min", 1.0), ("max", 4.0)])
def test_numbers_and_tensors_under_one_key_are_reduced_together(logged: Any, reduction: str, expected: float) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        module.log("x", index + 1.0 if index % 2 else torch.tensor(index + 1.0), on_epoch=True, on_step=False, reduce_fx=reduction)

    assert logged(log).callback_metrics["x"].item() == expected


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max"])
@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_nan_reaches_the_reduction_wherever_it_is_logged(logged: Any, reduction: str, position: int, as_tensor: bool) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        value = float("nan") if index == position else 1.0
        module.log("x", torch.tensor(value) if as_tensor else value, on_epoch=True, on_step=False, reduce_fx=reduction)

    assert logged(log).callback_metrics["x"].isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max"])
@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")], ids=lambda devices: " then ".join(devices))
def test_values_of_several_devices_meet_on_the_accelerator(reduction: str, devices: tuple[str, str]) -> None:
    given = (False, None, True, True, reduction, False, False, None, True, None, False)
    entry = Entry("x", "training_step", None, given, resolve_options("x", "training_step", given))
    for device in devices:
        entry.add(torch.ones((), device=device), 1)
    # A device without memory stands for any accelerator: nothing could be read from it.
    assert entry.epoch_value().device.type == "meta"
    assert entry.value.device.type == devices[1]


def test_each_epoch_is_reduced_on_its_own(logged: Any, Rows: Any) -> None:
    rows = Rows()

    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        for reduction in ("mean", "sum", "min", "max"):
            module.log(reduction, module.current_epoch * 10.0 + index, on_step=False, on_epoch=True, reduce_fx=reduction)

    logged(log, 2, max_epochs=3, logger=rows)
    assert [value for _, value in rows.of("mean")] == [0.5, 10.5, 20.5]
    assert [value for _, value in rows.of("sum")] == [1.0, 21.0, 41.0]
    assert [value for _, value in rows.of("min")] == [0.0, 10.0, 20.0]
    assert [value for _, value in rows.of("max")] == [1.0, 11.0, 21.0]


# ---- the values themselves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enable_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_value_changed_in_place_after_logging_keeps_the_logged_value(logged: Any, enable_graph: bool, dtype: torch.dtype) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        value = torch.full((1,), index + 1.0, dtype=dtype)
        module.log("x", value, on_epoch=True, enable_graph=enable_graph)
        value.fill_(100.0)

    metrics = logged(log).callback_metrics
    assert metrics["x_step"].item() == 4.0
    assert metrics["x"].item() == 2.5


def test_buffer_of_the_module_keeps_its_logged_value(logged: Any) -> None:
    def log(module: Any, batch: Tensor, index: int) -> None:
        if index == 0:
            module.register_buffer("total", torch.zeros(()))
        module.total += 1
        module.log("total", module.total, on_epoch=True, reduce_fx="max")
        module.total += 10

    metrics = logged(log).callback_metrics
    assert metrics["total_step"].item() == 34.0
    assert metrics["total_epoch"].item() == 34.0


def test_logged_values_carry_no_graph(logged: Any) -> None:
    trainer = logged(lambda module, batch, index: module.log("x", module.weight * 2, on_epoch=True, prog_bar=True))
    assert not any(value.requires_grad for value in (*trainer.callback_metrics.values(), *trainer.logged_metrics.values()))


def test_graph_is_kept_until_the_end_of_the_epoch_where_asked_for(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", self.weight * 3, on_epoch=True, enable_graph=True)
            return self.weight * 1.0

    trainer = make_trainer(max_epochs=2)
    trainer.fit(Model(), numbers(3))
    # Weights before the steps of the second epoch: -3, -4, -5.
    assert trainer.callback_metrics["x"].item() == pytest.approx(-12.0)


def test_values_are_floats_in_the_bar_and_tensors_elsewhere(logged: Any) -> None:
    trainer = logged(lambda module, batch, index: module.log("x", 2, prog_bar=True, on_epoch=True))
    assert trainer.progress_bar_metrics == {"x_step": 2.0, "x_epoch": 2.0}
    assert all(type(value) is float for value in trainer.progress_bar_metrics.values())
    assert set(trainer.callback_metrics) == {"x", "x_step", "x_epoch"}
    assert set(trainer.logged_metrics) == {"x_step", "x_epoch"}
    assert all(isinstance(value, Tensor) for value in (*trainer.callback_metrics.values(), *trainer.logged_metrics.values()))


def test_dictionaries_are_copies(logged: Any) -> None:
    trainer = logged(lambda module, batch, index: module.log("x", 2.0, prog_bar=True))
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics", "metric_steps"):
        getattr(trainer, name).clear()
        assert getattr(trainer, name), name


# ---- batch sizes ----------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x name")


@pytest.mark.parametrize(
    "form",
    [
        lambda n: torch.zeros(n, 1),
        lambda n: {"x": torch.zeros(n, 3), "names": ["a"] * 7},
        lambda n: Pair(torch.zeros(n), "abcdefg"),
        lambda n: [(torch.zeros(n, 2), {"y": torch.zeros(n)})],
    ],
    ids=["tensor", "dict", "namedtuple", "nested"],
)
def test_mean_weighs_by_the_inferred_batch_size(logged: Any, form: Any) -> None:
    trainer = logged(lambda module, batch, index: module.log("x", float(index), on_epoch=True), [form(3), form(1)])
    assert trainer.callback_metrics["x"].item() == 0.25


@pytest.mark.parametrize("kind", [int, float, torch.tensor, np.int64], ids=["int", "float", "tensor", "numpy"])
def test_mean_weighs_by_the_given_batch_size(logged: Any, kind: Any) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        module.log("tensor", torch.tensor(float(index)), on_epoch=True, batch_size=kind(1 + 2 * index))
        module.log("number", float(index), on_epoch=True, batch_size=kind(1 + 2 * index))

    metrics = logged(log, 2).callback_metrics
    assert metrics["tensor"].item() == metrics["number"].item() == 0.75
    assert metrics["tensor"].dtype is metrics["number"].dtype is torch.float32


def test_given_batch_size_may_change_from_batch_to_batch_and_leaves_others_alone(logged: Any) -> None:
    def log(module: LightningModule, batch: Tensor, index: int) -> None:
        module.log("given", float(index), on_epoch=True, batch_size=1 if index else 3)
        module.log("inferred", float(index), on_epoch=True)

    metrics = logged(log, [torch.zeros(1, 1), torch.zeros(4, 1)]).callback_metrics
    assert metrics["given"].item() == 0.25
    assert metrics["inferred"].item() == pytest.approx(0.8)


@pytest.mark.parametrize("reduction", ["sum", "min", "max"])
def test_other_reductions_take_no_notice_of_the_batch_size(logged: Any, reduction: str) -> None:
    log = lambda module, batch, index: module.log("x", 2.0, on_epoch=True, reduce_fx=reduction, batch_size=100)  # noqa: E731
    assert logged(log, 2).callback_metrics["x"].item() == (4.0 if reduction == "sum" else 2.0)


def test_batch_size_is_not_asked_for_where_it_is_not_needed(logged: Any) -> None:
    def log(module: LightningModule, batch: Any, index: int) -> None:
        module.log("step", 1.0)
        module.log("sum", 1.0, on_epoch=True, on_step=False, reduce_fx="sum")
        module.log("given", 1.0, on_epoch=True, on_step=False, batch_size=2)

    assert logged(log, [["no tensor"], ["here"]]).callback_metrics["sum"].item() == 2.0


def test_batch_size_that_cannot_be_inferred_is_an_error_that_says_what_to_do(logged: Any) -> None:
    with pytest.raises(MisconfigurationException, match="batch_size"):
        logged(lambda module, batch, index: module.log("x", 1.0, on_epoch=True), [["no tensor"], ["here"]])


# ---- who logs -------------------------------------------------------------------------------------------------------


def test_callbacks_and_nested_modules_log_under_their_own_names(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Child(LightningModule):
        def forward(self, value: float) -> float:
            self.log("child", value, on_epoch=True)
            return value

    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Child()])

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.weight * self.parts[0](float(batch_idx))

    class Logging(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("callback", float(batch_idx), on_epoch=True)
            self.log_dict({"a": 1.0, "b": 2.0})

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("epoch", 7.0)

    trainer = make_trainer(callbacks=[Logging()])
    trainer.fit(Model(), numbers(3))
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found == {
        "child": 1.0, "child_step": 2.0, "child_epoch": 1.0,
        "callback": 1.0, "callback_step": 2.0, "callback_epoch": 1.0, "a": 1.0, "b": 2.0, "epoch": 7.0,
    }  # fmt: skip


def test_nested_module_that_is_made_in_configure_model_logs(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Child(LightningModule):
        def forward(self, value: Tensor) -> Tensor:
            self.log("child", value.mean())
            return value

    class Model(Weight):  # type: ignore[misc]
        def configure_model(self) -> None:
            self.child = Child()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.weight * self.child(batch).mean()

    trainer = make_trainer()
    trainer.fit(Model(), numbers(3))
    assert trainer.callback_metrics["child"].item() == 2.0


def test_manual_optimization_logs_steps_and_epochs(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.weight * 1.0)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
            self.log("x", float(batch_idx), on_epoch=True)

    rows = Rows()
    trainer = make_trainer(logger=rows, log_every_n_steps=2)
    trainer.fit(Model(), numbers(6))
    assert rows.of("x_step") == [(1, 1.0), (3, 3.0), (5, 5.0)]
    assert rows.of("x_epoch") == [(5, 2.5)]
    assert trainer.global_step == 3


def test_several_validation_loaders_are_told_apart(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            self.log("x", batch.mean())
            if dataloader_idx == 1:
                self.log("only second", batch.mean(), add_dataloader_idx=False)

        def on_validation_epoch_end(self) -> None:
            self.log("all", 5.0)

    trainer = make_trainer()
    results = trainer.validate(Model(), [numbers(2), numbers(3, start=10)], verbose=False)
    assert results == [{"x/dataloader_idx_0": 0.5, "all": 5.0}, {"x/dataloader_idx_1": 11.0, "only second": 11.0, "all": 5.0}]
    assert set(trainer.callback_metrics) == {"x/dataloader_idx_0", "x/dataloader_idx_1", "only second", "all"}


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [torch.zeros(2), {"a": 1.0}, [1.0], "1.0", None, complex(1, 2), np.zeros(3)], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("first", [0, 2], ids=["at once", "later"])
def test_value_that_cannot_be_logged_is_refused_by_name_at_once_and_later(logged: Any, value: Any, first: int) -> None:
    with pytest.raises(TypeError if isinstance(value, complex) else ValueError, match=r"self\.log\('x'"):
        logged(lambda module, batch, index: module.log("x", 1.0 if index < first else value))


def test_empty_tensor_is_refused(logged: Any) -> None:
    with pytest.raises(ValueError, match=r"self\.log\('x'.*shape \(0,\)"):
        logged(lambda module, batch, index: module.log("x", torch.zeros(0)))


def test_key_logged_with_other_arguments_in_one_hook_is_refused(logged: Any) -> None:
    with pytest.raises(MisconfigurationException, match="twice in `training_step`"):
        logged(lambda module, batch, index: module.log("x", 1.0, prog_bar=index > 1))


def test_log_after_a_run_is_refused(logged: Any) -> None:
    trainer = logged(lambda module, batch, index: module.log("x", 1.0))
    with pytest.raises(MisconfigurationException, match="no training, validation or test loop"):
        trainer.lightning_module.log("y", 1.0)


def test_nothing_of_a_failed_run_is_left_in_the_next(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        fails = True

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", 100.0 if self.fails else 1.0, on_epoch=True, on_step=False)
            if self.fails and batch_idx == 2:
                raise RuntimeError("boom")
            return self.weight * 1.0

    trainer, model = make_trainer(), Model()
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(model, numbers())
    model.fails = False
    trainer.fit(model, numbers())
    assert trainer.callback_metrics["x"].item() == 1.0


def test_another_model_may_log_the_same_keys_in_another_way(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self, **flags: Any) -> None:
            super().__init__()
            self.flags = flags

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("x", float(batch_idx), **self.flags)
            return self.weight * 1.0

    trainer = make_trainer()
    trainer.fit(Model(on_epoch=True), numbers())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Model(on_step=False, on_epoch=True, reduce_fx="sum"), numbers())
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == {"x": 6.0}
