"""What ``self.log(..., sync_dist=True)`` gives in several processes: the value of all data, matched by name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import run, run_to_end
from trainers import Evaluated, Numbers, Rows, Weight, joined

ONE = pytest.approx


def numbers(count: int, batch_size: int = 1) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count), batch_size=batch_size)


def plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


# ---- epochs ---------------------------------------------------------------------------------------------------------


class Logging(Evaluated):
    """Logs in each hook in each way. Rank 0 validates the samples 0, 2, 4 in batches of 2 and 1, rank 1 the samples 1, 3 in one."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        rank = self.trainer.global_rank
        self.log("both", batch.mean(), on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log("epoch", float(batch.sum()), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("local", float(rank), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("end", float(self.trainer.global_rank), sync_dist=True)
        self.log("end max", torch.tensor(self.trainer.global_rank), sync_dist=True, reduce_fx=torch.max)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        for op in ("mean", "sum", "min", "max"):
            value = getattr(batch, op)()
            self.log(f"tensor {op}", value, sync_dist=True, reduce_fx=op)
            self.log(f"number {op}", value.item(), sync_dist=True, reduce_fx=op)
        self.log("mixed", batch.mean() if batch_idx else batch.mean().item(), sync_dist=True)
        self.log("half", batch.mean().half(), sync_dist=True)
        self.log("sized", batch.mean(), sync_dist=True, batch_size=1)  # each batch counts the same
        self.log("flag", True, sync_dist=True, reduce_fx="sum")

    def on_validation_epoch_end(self) -> None:
        seen = self.trainer.callback_metrics["tensor mean"]  # reduced already
        self.log("at the end", seen + self.trainer.global_rank, sync_dist=True, prog_bar=True)


def logged(rank: int, size: int) -> dict[str, Any]:
    rows = Rows()
    warnings.filterwarnings("ignore", ".*sync_dist=False.*")
    trainer = joined(logger=rows)
    trainer.fit(Logging(), numbers(8, 2), numbers(5, 2))
    names = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
    kinds = {type(value).__name__ for value in trainer.callback_metrics.values()}
    return {**{name: plain(getattr(trainer, name)) for name in names}, "rows": rows.rows, "kinds": kinds, "steps": trainer.metric_steps}


def test_epoch_values_are_those_of_all_samples_in_every_process() -> None:
    first, second = run(logged, 2)
    expected = {
        "mean": 2.0, "min": 0.0, "max": 4.0, "sum": 10.0,
    }  # fmt: skip
    for result in (first, second):
        metrics = result["callback_metrics"]
        for op, value in expected.items():
            assert metrics[f"tensor {op}"] == metrics[f"number {op}"] == value
        assert metrics["mixed"] == metrics["half"] == 2.0
        assert metrics["sized"] == ONE((1 + 4 + 2) / 3)
        assert metrics["flag"] == 3.0
        assert metrics["at the end"] == 2.5
        assert metrics["both"] == metrics["both_epoch"] == 3.5
        assert metrics["epoch"] == 28.0
        assert [metrics["end"], metrics["end max"]] == [0.5, 1.0]
        assert result["kinds"] == {"Tensor"}
        assert result["progress_bar_metrics"]["both_epoch"] == 3.5
        assert result["progress_bar_metrics"]["at the end"] == 2.5
    local = [result["callback_metrics"].pop("local") for result in (first, second)]
    assert local == [0.0, 1.0]
    assert first["callback_metrics"] == second["callback_metrics"]
    assert first["steps"] == second["steps"]


def test_step_values_reach_the_loggers_as_the_mean_over_the_processes() -> None:
    first, second = run(logged, 2)
    shares = [[row["both_step"] for _, row in result["rows"] if "both_step" in row] for result in (first, second)]
    assert shares[0] == shares[1]
    assert len(shares[0]) == 2
    assert sum(shares[0]) / 2 == ONE(3.5)  # the mean over all samples; those of one process alone give another one
    assert first["logged_metrics"]["both_step"] == second["logged_metrics"]["both_step"] == shares[0][-1]


def in_a_group(rank: int, size: int) -> list[float]:
    group = torch.distributed.new_group([0, 1, 2])

    class Model(Evaluated):
        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("grouped", batch.mean(), sync_dist=True, sync_dist_group=group)
            self.log("all", batch.mean(), sync_dist=True)

    return [value for result in joined().validate(Model(), numbers(3), verbose=False) for value in result.values()]


def test_group_of_processes_can_be_given() -> None:
    assert run(in_a_group, 3) == [[1.0, 1.0]] * 3


# ---- steps ----------------------------------------------------------------------------------------------------------


class Sparse(Weight):
    """Logs by steps, some values not at every one of them."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        rank = self.trainer.global_rank
        self.log("sum", 1.0, sync_dist=True, reduce_fx="sum")
        self.log("max", torch.tensor(float(rank)), sync_dist=True, reduce_fx="max")
        if batch_idx == 0:
            self.log("once", 1.0, sync_dist=True, reduce_fx="sum")
        if batch_idx == rank:
            self.log("in turn", float(10 + rank), sync_dist=True)
        if rank == 1:
            self.log("one rank", 3.0, sync_dist=True)
        return super().training_step(batch, batch_idx)


def by_steps(rank: int, size: int) -> list[Any]:
    rows = Rows()
    joined(logger=rows).fit(Sparse(), numbers(8))
    return [rows.of(name) for name in ("sum", "max", "once", "in turn", "one rank")]


def test_steps_are_reduced_over_those_that_logged_since_the_last_reduction() -> None:
    for sums, largest, once, in_turn, one_rank in run(by_steps, 2):
        assert sums == [(step, 2.0) for step in range(4)]
        assert largest == [(step, 1.0) for step in range(4)]
        assert [value for _, value in once] == [2.0] * len(once)  # however often it is sent again
        assert [value for _, value in in_turn] == [10.0, 11.0, 11.0, 11.0]
        assert one_rank == [(step, 3.0) for step in range(4)]


# ---- other names in other processes ---------------------------------------------------------------------------------


class Different(Evaluated):
    """Logs other names in other processes, in another order."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        rank = self.trainer.global_rank
        names = ["a", "b", "c"] if rank == 0 else ["c", "b", "a"]
        for name in names:
            self.log(name, ord(name) + batch.mean(), sync_dist=True)
        if rank == 1:
            self.log("only 1", batch.sum(), sync_dist=True, reduce_fx="sum", prog_bar=True)
        if rank == 0:
            self.log("only 0", batch.mean(), sync_dist=True, rank_zero_only=True)
            self.log("not shared", batch.mean(), rank_zero_only=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.trainer.global_rank == 1 and batch_idx == 1:
            self.log("rare", 5.0, sync_dist=True, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def different(rank: int, size: int) -> list[Any]:
    trainer = joined(max_epochs=2)
    results = trainer.validate(Different(), numbers(5), verbose=False)
    trainer.fit(Different(), numbers(6), numbers(1))  # of which rank 1 gets none
    return [results, plain(trainer.callback_metrics)]


def test_values_are_matched_by_name_also_where_only_some_processes_log_them() -> None:
    first, second = run(different, 2)
    shared = {"a": ONE(97 + 2), "b": ONE(98 + 2), "c": ONE(99 + 2), "only 1": 4.0, "only 0": 2.0}
    assert first[0] == [{**shared, "not shared": 2.0}]
    assert second[0] == [shared]
    in_fit = {"a": 97.0, "b": 98.0, "c": 99.0, "only 0": 0.0, "rare": 5.0}
    assert first[1] == {**in_fit, "not shared": 0.0}
    assert second[1] == in_fit


def conflicting(rank: int, size: int, by_step: bool) -> None:
    class Model(Weight):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if rank < 2:  # a third process logs nothing of the name
                self.log("loss", 1.0, sync_dist=True, reduce_fx=["mean", "sum"][rank], on_step=by_step, on_epoch=not by_step)
            return super().training_step(batch, batch_idx)

    joined(logger=Rows()).fit(Model(), numbers(6))


@pytest.mark.parametrize("by_step", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_one_name_reduced_in_two_ways_is_an_error_in_every_process(size: int, by_step: bool) -> None:
    for outcome in run_to_end(conflicting, size, by_step, timeout=20):
        assert outcome.error == "MisconfigurationException", outcome.trace
        assert "'loss'" in outcome.message
        assert "'mean'" in outcome.message
        assert "'sum'" in outcome.message
        assert outcome.seconds < 10


def not_synced(rank: int, size: int, sync: bool) -> list[str]:
    class Model(Evaluated):
        pass

    Model.sync = sync
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        joined().validate(Model(), numbers(4), verbose=False)
    return [str(warning.message) for warning in caught]


def test_rank_0_warns_of_an_evaluation_that_is_not_synced() -> None:
    first, second = run(not_synced, 2, False)
    assert len(first) == 1
    assert "'val'" in first[0]
    assert "sync_dist=True" in first[0]
    assert second == []
    assert run(not_synced, 2, True) == [[], []]


# ---- torchmetrics ---------------------------------------------------------------------------------------------------


def with_objects(rank: int, size: int) -> list[Any]:
    from torchmetrics import CatMetric, MaxMetric, MeanMetric

    class Model(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.mean_of, self.largest, self.rarely, self.all_values = MeanMetric(), MaxMetric(), MeanMetric(), CatMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.mean_of(batch.mean())
            self.log("train", self.mean_of, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.largest.update(batch)
            self.rarely.update(batch)
            names: list[tuple[str, Any]] = [("largest", self.largest), ("rarely", self.rarely)]
            for name, metric in names if rank == 0 else reversed(names):
                self.log(name, metric)

    warnings.filterwarnings("ignore", ".*before the .*update.*")  # of torchmetrics, in the process without data
    trainer, model = joined(max_epochs=2), Model()
    results = [trainer.validate(model, numbers(count), verbose=False)[0] for count in (5, 1)]
    trainer.fit(model, numbers(4), numbers(5))
    return [results, plain(trainer.callback_metrics)]


def test_metrics_of_torchmetrics_are_computed_over_all_processes() -> None:
    pytest.importorskip("torchmetrics")
    first, second = run(with_objects, 2)
    for results, metrics in (first, second):
        assert results == [{"largest": 4.0, "rarely": 2.0}, {"largest": 0.0, "rarely": 0.0}]
        assert metrics["largest"] == 4.0
        assert metrics["rarely"] == 2.0
        assert metrics["train_epoch"] == 1.5


# ---- loggers --------------------------------------------------------------------------------------------------------


class Stepwise(Weight):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("loss", float(self.trainer.global_rank), sync_dist=True)
        return super().training_step(batch, batch_idx)


def logged_by(rank: int, size: int, loggers: list[bool]) -> list[Any]:
    rows = Rows()
    trainer = joined(logger=rows if loggers[rank] else False)
    trainer.fit(Stepwise(), numbers(4))
    return [trainer.callback_metrics["loss"].item(), [value for _, value in rows.of("loss")]]


@pytest.mark.parametrize("loggers", [[True, False], [False, False], [False, True]])
def test_some_processes_may_have_no_logger(loggers: list[bool]) -> None:
    assert run(logged_by, 2, loggers, timeout=20) == [[0.5, [0.5, 0.5] if logs else []] for logs in loggers]
