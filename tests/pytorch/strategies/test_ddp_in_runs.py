"""What users call in a run under DDP: collectives, options of the strategy, several runs; and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run, run_to_end
from trainers import Evaluated, Numbers, Regression, Vectors, Weight, joined, loader, quiet
from training import largest_difference, plain

from lightning.fabric.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only

TOLERANCE = 1e-6


def numbers(count: int, batch_size: int = 1) -> DataLoader[Tensor]:
    return DataLoader(Numbers(count), batch_size=batch_size)


# ---- collectives ----------------------------------------------------------------------------------------------------


class Contrasting(Regression):
    """Its loss compares each sample with those of all processes."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        outputs = self.net(batch)
        everybody = self.all_gather({"out": outputs, "in": batch}, sync_grads=True)
        every, inputs = everybody["out"].reshape(-1, 1), everybody["in"].reshape(-1, 5)
        wanted = inputs.sum(1, keepdim=True) - inputs.sum(1)
        return ((every - every.T) - wanted).square().mean()


def contrasted(rank: int, size: int) -> dict[str, Any]:
    module = Contrasting()
    (joined() if size > 1 else quiet()).fit(module, loader(Vectors(30), 6, size))
    return plain(module.state_dict())


def test_gradients_flow_through_gathered_tensors_as_in_one_process() -> None:
    first, second = run(contrasted, 2)
    assert first == second
    assert largest_difference(first, contrasted(0, 1)) < TOLERANCE


class Talking(Evaluated):
    @rank_zero_only  # type: ignore[untyped-decorator]
    def once(self) -> str:
        return "called"

    def on_train_end(self) -> None:
        rank, strategy = self.trainer.global_rank, self.trainer.strategy
        gathered = self.all_gather({"tensor": torch.tensor([rank, 5]), "numbers": [float(rank), rank]})
        self.told = {
            "gathered": [gathered["tensor"].tolist(), [each.tolist() for each in gathered["numbers"]]],
            "scalar": self.all_gather(torch.tensor(rank)).tolist(),
            "no gradient": self.all_gather(self.weight).requires_grad,
            "broadcast": [strategy.broadcast({"from": rank}), strategy.broadcast(rank, src=1)],
            "reduce": [strategy.reduce(torch.tensor(float(rank + 1)), reduce_op=op).item() for op in ("mean", "sum", "max", "avg")],
            "decision": [strategy.reduce_boolean_decision(rank == 0, all=every) for every in (True, False)],
            "barrier": strategy.barrier("here"),
            "once": self.once(),
            "placed": [self.trainer.world_size, self.trainer.local_rank, self.trainer.node_rank, self.trainer.num_devices],
            "ranks": [self.global_rank, self.local_rank, self.trainer.is_global_zero],
        }


def talked(rank: int, size: int) -> dict[str, Any]:
    model = Talking()
    joined().fit(model, numbers(2), numbers(2))
    return model.told


def test_processes_can_talk_in_hooks() -> None:
    for rank, told in enumerate(run(talked, 2)):
        assert told == {
            "gathered": [[[0, 5], [1, 5]], [[0.0, 1.0], [0, 1]]],
            "scalar": [0, 1],
            "no gradient": False,
            "broadcast": [{"from": 0}, 1],
            "reduce": [1.5, 3.0, 2.0, 1.5],
            "decision": [False, True],
            "barrier": None,
            "once": None if rank else "called",
            "placed": [2, rank, 0, 2],
            "ranks": [rank, rank, rank == 0],
        }


class Gathering(Evaluated):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluated.append(self.all_gather(batch).flatten().tolist())


def gathered(rank: int, size: int) -> list[Any]:
    model = Gathering()
    sampler = DistributedSampler(Numbers(5), size, rank, shuffle=False)
    joined().test(model, DataLoader(Numbers(5), batch_size=2, sampler=sampler), verbose=False)
    return model.evaluated


def test_steps_of_evaluation_can_gather_with_a_sampler_that_gives_all_processes_the_same_number() -> None:
    assert run(gathered, 2) == [[[0.0, 2.0, 1.0, 3.0], [4.0, 0.0]]] * 2  # the first sample comes twice, as that sampler does it


# ---- options --------------------------------------------------------------------------------------------------------


def hooked(rank: int, size: int) -> list[Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    calls: list[int] = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, and these would be strings
        calls.append(state["power"])
        return fp16_compress_hook(None, bucket)

    modules = [Regression(), Regression()]
    joined({"ddp_comm_hook": counting, "ddp_comm_state": {"power": 2}}).fit(modules[0], loader(Vectors(30), 6, size))
    joined().fit(modules[1], loader(Vectors(30), 6, size))
    return [calls, *(plain(module.state_dict()) for module in modules)]


def test_gradients_can_be_averaged_by_a_hook_of_the_users_own() -> None:
    first, second = run(hooked, 2)
    assert first == second
    assert first[0] == [2] * 5
    assert 0 < largest_difference(first[1], first[2]) < 1e-2  # what half precision on the way leaves


class Looking(Regression):
    """Notes whether gradients are views into the buckets that are averaged."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.views = [parameter.grad._is_view() for parameter in self.parameters()]  # type: ignore[union-attr]
        self.wrapped = type(self.trainer.strategy.model).__name__


def looked(rank: int, size: int) -> list[Any]:
    results = []
    for ddp in ({}, {"gradient_as_bucket_view": False}):
        module, trainer = Looking(), joined(ddp)
        trainer.fit(module, loader(Vectors(30), 6, size))
        results.append([all(module.views), module.wrapped, trainer.strategy.model is module])
    return results


def test_gradients_are_views_into_buckets_unless_asked_otherwise() -> None:
    wrapped = "DistributedDataParallel"
    assert run(looked, 2) == [[[True, wrapped, True], [False, wrapped, True]]] * 2


class Overflowing(Regression):
    """One process gets an infinite loss in the second step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 and self.trainer.global_rank == 1 else loss


def scaled(rank: int, size: int) -> list[Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)  # type: ignore[attr-defined]
    module = Overflowing()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    joined(plugins=plugin, gradient_clip_val=1.0).fit(module, loader(Vectors(30), 6, size))
    return [plain(module.state_dict()), scaler.get_scale()]


def test_step_that_overflows_in_one_process_is_left_out_in_all() -> None:
    first, second = run(scaled, 2)
    assert first == second
    assert first[1] == 2.0**9
    assert all(torch.tensor(value).isfinite().all() for value in first[0].values())


class Normalising(Evaluated):
    """Has running statistics, which differ from process to process, and weights that do so at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.first = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.norm(self.first(batch)).square().mean() + self.weight

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("val", self.norm(self.first(batch)).mean(), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("test", self.norm(self.first(batch)).mean(), sync_dist=True)


def normalised(rank: int, size: int, sync: bool) -> list[Any]:
    torch.manual_seed(rank)
    module = Normalising()
    before = module.first.weight.item()
    trainer = joined(sync_batchnorm=sync)
    trainer.fit(module, numbers(8, 2), numbers(4))
    after = [type(module.norm).__name__, module.norm.running_mean.item(), module.first.weight.item()]  # type: ignore[union-attr]
    return [before, after, trainer.callback_metrics["val"].item(), trainer.test(module, numbers(4), verbose=False)]


@pytest.mark.parametrize("sync", [True, False])
def test_all_processes_train_and_evaluate_the_model_of_rank_0(sync: bool) -> None:
    first, second = run(normalised, 2, sync)
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert first[1][0] == "BatchNorm1d"
    assert first[2:] == second[2:]
    assert first[2] == pytest.approx(first[3][0]["test"])


# ---- several runs ---------------------------------------------------------------------------------------------------


def repeated(rank: int, size: int) -> list[Any]:
    model, trainer = Evaluated(), joined()
    results = [trainer.validate(model, numbers(5), verbose=False)]
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, numbers(4), numbers(3))
        results.append(trainer.test(model, numbers(3), verbose=False))
    other = Evaluated()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(other, numbers(4), numbers(3))
    alone = quiet(max_epochs=2)
    return [results, model.weight.item(), other.weight.item(), len(other.seen), trainer.global_step, alone.world_size]


def test_one_trainer_serves_several_runs() -> None:
    first, second = run(repeated, 2)
    assert first == second
    results, weight, other, batches, steps, alone = first
    assert results == [[{"val": 2.0}], [{"test": 1.0}], [{"test": 1.0}]]
    assert [weight, other] == [-6.0, -3.0]  # each epoch takes off the sum of 0 to 3, halved
    assert [batches, steps, alone] == [2, 6, 1]


# ---- what is refused --------------------------------------------------------------------------------------------------


def skipping(rank: int, size: int) -> None:
    class Model(Weight):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    joined().fit(Model(), numbers(8))


def test_batch_can_not_be_skipped_by_one_of_several_processes() -> None:
    for outcome in run_to_end(skipping, 2, timeout=20):
        assert outcome.error == "RuntimeError", outcome.trace
        assert "returned None" in outcome.message


def unused(rank: int, size: int) -> None:
    class Model(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.optional = nn.Linear(1, 1)

    joined().fit(Model(), loader(Vectors(30), 6, size))


def test_unused_parameters_are_told_with_what_to_do() -> None:
    for outcome in run_to_end(unused, 2, timeout=20):
        assert outcome.error == "RuntimeError", outcome.trace
        assert "find_unused_parameters=True" in outcome.message


def frozen(rank: int, size: int) -> list[Any]:
    class Model(Evaluated):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

    return joined().validate(Model(), numbers(3), verbose=False)


def test_model_without_anything_to_train_can_be_evaluated() -> None:
    assert run(frozen, 2) == [[{"val": 1.0}]] * 2
