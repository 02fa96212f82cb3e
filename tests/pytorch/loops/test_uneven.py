"""Training where processes have different numbers of batches: each policy of ``uneven_inputs`` gives what it promises."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from trainers import Numbers, Regression, Rows, Stream, Weight, joined, quiet
from training import largest_difference, plain

from lightning.pytorch import Callback

TOLERANCE = 2e-6
SHARED: dict[str, Any] = {"max_epochs": 2, "use_distributed_sampler": False}


class Batches:
    """Batches of 4 vectors: other ones on each rank, the same ones in each epoch."""

    def __init__(self, rank: int, count: int) -> None:
        self.batches = list(torch.randn(count, 4, 5, generator=torch.Generator().manual_seed(rank + 10)))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class Sized(Batches):
    """Such that know how many they are."""

    def __len__(self) -> int:
        return len(self.batches)


class Whole(Sized):
    """What the processes have together at each index, for one process."""

    def __init__(self, lengths: list[int], count: int) -> None:
        parts = [Sized(rank, length).batches for rank, length in enumerate(lengths)]
        self.batches = [torch.cat([part[index] for part in parts if index < len(part)]) for index in range(count)]


class Manual(Regression):
    """Two optimizers, stepped by hand; the second one at every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bias = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        self.manual_backward(self.loss(batch + self.bias))
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9), torch.optim.Adam([self.bias], 0.01)


class Scheduled(Regression):
    """Its learning rate falls with each step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


MODELS: dict[str, Any] = {"plain": Regression, "norm": lambda: Regression(normalises=True), "manual": Manual, "scheduled": Scheduled}


def trained(rank: int, size: int, lengths: list[int], known: bool, policy: str, cases: list[Any]) -> list[Any]:
    results = []
    for name, arguments in cases:
        module, loader = MODELS[name](), (Sized if known else Batches)(rank, lengths[rank])
        trainer = joined(uneven_inputs=policy, **{**SHARED, **arguments})
        trainer.fit(module, loader)
        counts = [trainer.global_step, trainer.fit_loop.progress.total_batches]
        results.append({"weights": plain(module.state_dict()), "counts": counts})
    return results


CASES: list[Any] = [
    ("plain", {}),
    ("plain", {"accumulate_grad_batches": 2}),
    ("plain", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    ("norm", {"sync_batchnorm": True}),
    ("norm", {"sync_batchnorm": True, "accumulate_grad_batches": 2}),
    ("manual", {}),
    ("scheduled", {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    ("plain", {"max_steps": 7, "max_epochs": -1}),
    ("plain", {"limit_train_batches": 4}),
]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("lengths", "policy"), [([3, 5], "join"), ([5, 3], "shortest"), ([1, 5, 2], "join"), ([0, 3], "join"), ([4, 4], "error")]
)
def test_weights_are_those_of_one_process_with_the_data_that_there_are(lengths: list[int], policy: str, known: bool) -> None:
    ranks = run(trained, len(lengths), lengths, known, policy, CASES, timeout=30)
    for index, (name, arguments) in enumerate(CASES):
        alone, count = MODELS[name](), max(lengths) if policy == "join" else min(lengths)
        trainer = quiet(**{**SHARED, **arguments, "sync_batchnorm": False})
        trainer.fit(alone, Whole(lengths, count))
        for result in (rank[index] for rank in ranks):
            assert largest_difference(result["weights"], plain(alone.state_dict())) < TOLERANCE, (name, arguments)
            assert result["counts"] == [trainer.global_step, trainer.fit_loop.progress.total_batches]


# ---- different lengths are an error unless a policy is chosen ----------------------------------------------------------


def refused(rank: int, size: int, known: bool) -> None:
    module = Weight()
    loader: Any = DataLoader((Numbers if known else Stream)(3 + 2 * rank))
    try:
        joined(use_distributed_sampler=False).fit(module, loader)
    except Exception as error:
        raise type(error)(f"after {len(module.seen)} batches: {error}") from error


@pytest.mark.parametrize(
    ("known", "said"), [(True, "after 0 batches: .* 3 batches on rank 0, 5 batches on rank 1"), (False, "after 3 batches")]
)
def test_different_lengths_are_an_error_in_every_process(known: bool, said: str) -> None:
    for outcome in run_to_end(refused, 2, known, timeout=20):
        assert outcome.error == "MisconfigurationException", outcome.trace
        assert re.search(said, outcome.message)
        assert "different lengths" in outcome.message
        assert outcome.seconds < 10


# ---- what is logged --------------------------------------------------------------------------------------------------


class Logging(Weight):
    """Logs in several hooks of a batch; rank 0 has the samples 0 to 2, rank 1 the samples 10 to 14."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("step", batch.mean(), sync_dist=True, on_step=False, on_epoch=True)
        self.log("count", 1.0, sync_dist=True, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.log("start", batch.mean(), sync_dist=True, on_step=False, on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.log("end", batch.mean(), sync_dist=True, on_step=False, on_epoch=True)


class Ends(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.log("callback", batch.mean(), sync_dist=True, on_step=False, on_epoch=True)


def logged(rank: int, size: int, known: bool) -> dict[str, float]:
    loader: Any = DataLoader((Numbers if known else Stream)(3 + 2 * rank, start=10 * rank))
    trainer = joined(use_distributed_sampler=False, uneven_inputs="join", callbacks=Ends())
    trainer.fit(Logging(), loader)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("known", [True, False])
def test_repeated_batches_count_in_no_logged_value(known: bool) -> None:
    mean = pytest.approx((0 + 1 + 2 + 10 + 11 + 12 + 13 + 14) / 8)
    for metrics in run(logged, 2, known):
        assert metrics == {"step": mean, "count": 8.0, "start": mean, "end": mean, "callback": mean}


def cut_short(rank: int, size: int, known: bool) -> list[Any]:
    loader: Any = DataLoader((Numbers if known else Stream)(3 + 2 * rank, start=10 * rank))
    rows = Rows()
    trainer = joined(use_distributed_sampler=False, uneven_inputs="join", max_steps=4, max_epochs=-1, logger=rows)

    class Model(Weight):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("mean", batch.mean(), sync_dist=True, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer.fit(Model(), loader)
    return [trainer.callback_metrics["mean_epoch"].item(), [value for _, value in rows.of("mean_step")], trainer.global_step]


@pytest.mark.parametrize("known", [True, False])
def test_epoch_that_ends_at_a_repeated_batch_keeps_what_was_logged(known: bool) -> None:
    mean = pytest.approx((0 + 1 + 2 + 10 + 11 + 12 + 13) / 7)
    assert run(cut_short, 2, known) == [[mean, [5.0, 6.0, 7.0, 13.0], 4]] * 2


def with_objects(rank: int, size: int) -> list[float]:
    from torchmetrics import MeanMetric, SumMetric

    class Model(Weight):
        def __init__(self) -> None:
            super().__init__()
            self.mean_of, self.count = MeanMetric(), SumMetric()

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.mean_of.update(batch.mean())
            self.count(1.0)
            self.log("mean", self.mean_of, on_step=False, on_epoch=True)
            self.log("count", self.count, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = joined(use_distributed_sampler=False, uneven_inputs="join")
    trainer.fit(Model(), DataLoader(Numbers(3 + 2 * rank, start=10 * rank)))
    return [trainer.callback_metrics[name].item() for name in ("mean", "count")]


def test_repeated_batches_count_in_no_metric_object() -> None:
    pytest.importorskip("torchmetrics")
    assert run(with_objects, 2) == [[pytest.approx((0 + 1 + 2 + 10 + 11 + 12 + 13 + 14) / 8), 8.0]] * 2


# ---- around training ---------------------------------------------------------------------------------------------------


class Validating(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.events.append("train")
        return self.loss(batch)

    def on_validation_epoch_start(self) -> None:
        self.events.append("validate")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)


def validating(rank: int, size: int, known: bool, policy: str) -> list[Any]:
    module, kind = Validating(), Sized if known else Batches
    trainer = joined(use_distributed_sampler=False, uneven_inputs=policy, val_check_interval=2)
    trainer.fit(module, kind(rank, 3 + 2 * rank), kind(rank, 2 - rank))
    return [module.events, trainer.callback_metrics["val"].item(), trainer.num_training_batches]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("policy", "count"), [("join", 5), ("shortest", 3)])
def test_validation_falls_due_at_the_same_step_everywhere(policy: str, count: int, known: bool) -> None:
    first, second = run(validating, 2, known, policy)
    assert first == second
    assert first[0] == [event for batch in range(count) for event in (["train", "validate"] if batch % 2 else ["train"])]
    assert first[2] == (count if known else float("inf"))
