"""Training under DDP in several processes gives the losses and weights of one process with the same global batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))

from processes import run
from trainers import Regression, Vectors, joined, loader, quiet
from training import largest_difference, plain

from lightning.pytorch.callbacks import GradientAccumulationScheduler

TOLERANCE = 1e-6
SAMPLES, BATCH = 30, 6  # 5 global batches in an epoch; BATCH is a multiple of 2 and 3


class Adversarial(Regression):
    """Two networks with optimizers of their own, stepped by hand in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        makers, critics = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(makers)
        made = self.net(batch)
        loss = -self.critic(torch.cat([batch, made], 1)).mean() + (made - batch.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        makers.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(makers, 0.5, "norm")
        makers.step()
        self.untoggle_optimizer(makers)
        self.toggle_optimizer(critics)
        judged = self.critic(torch.cat([batch, self.net(batch).detach()], 1))
        loss = (judged + 1).square().mean() + (self.critic(torch.cat([batch, batch.sum(1, keepdim=True)], 1)) - 1).square().mean()
        self.losses.append(loss.item())
        critics.zero_grad()
        self.manual_backward(loss)
        critics.step()
        self.untoggle_optimizer(critics)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net.parameters(), 0.01), torch.optim.SGD(self.critic.parameters(), 0.1)]


class SecondOrder(Regression):
    """LBFGS, which calls its closure several times for each step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Searching(Regression):
    """LBFGS with a search along each direction, which is as long as the loss says."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=8, line_search_fn="strong_wolfe")


class Overriding(Regression):
    """Has hooks of its own around the step: the learning rate warms up, and gradients are clipped by hand."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")


class Skipping(Regression):
    """Has a layer that only even batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.optional = nn.Linear(5, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch) + (self.optional(batch).square().mean() if batch_idx % 2 == 0 else 0)
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "extra": batch}


class Freezing(Regression):
    """Trains its last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}}


class Validated(Regression):
    """Validates in the middle of epochs, with a backward of its own in training."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward(*args, **kwargs)

    def val_dataloader(self) -> Any:
        return loader(Vectors(7), 2, 1)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)


class Plateau(Regression):
    """Its learning rate follows a loss that it logs."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, threshold_mode="abs")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


MODELS = {
    model.__name__: model for model in (Regression, Adversarial, SecondOrder, Searching, Overriding, Skipping, Freezing, Validated, Plateau)
}
Case = dict[str, Any]  # the name of a model, its arguments, those of the trainer, and those of DDPStrategy


def trained(trainer: Any, size: int, case: Case) -> dict[str, Any]:
    module = MODELS[case.get("model", "Regression")](**case.get("net", {}))
    dataset: Any = Vectors(SAMPLES)
    if trainer.precision == "64-true":
        dataset.samples = dataset.samples.double()
    if "accumulation" in case:
        trainer.callbacks.append(GradientAccumulationScheduler(case["accumulation"]))
    trainer.fit(module, loader(dataset, BATCH, size))
    return {"losses": module.losses, "weights": plain(module.state_dict()), "steps": trainer.global_step}


def in_processes(rank: int, size: int, cases: list[Case]) -> list[Any]:
    results = []
    for case in cases:
        trainer = joined(case.get("ddp"), **{"max_epochs": 2, **case.get("trainer", {})})
        results.append(trained(trainer, size, case))
    return results


def check(size: int, cases: list[Case], tolerance: float = TOLERANCE) -> None:
    """Compare runs in ``size`` processes with those of one."""
    ranks = run(in_processes, size, cases)
    for index, case in enumerate(cases):
        arguments = {"max_epochs": 2, **case.get("trainer", {})}
        arguments.pop("strategy", None)
        alone = trained(quiet(**arguments), 1, case)
        here = [results[index] for results in ranks]
        assert all(result["weights"] == here[0]["weights"] for result in here), case
        assert largest_difference(here[0]["weights"], alone["weights"]) < tolerance, case
        assert all(result["steps"] == alone["steps"] for result in here), case
        losses = torch.tensor([result["losses"] for result in here], dtype=torch.float64).mean(0)
        assert len(losses) == len(alone["losses"]), case
        torch.testing.assert_close(losses, torch.tensor(alone["losses"], dtype=torch.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [2, 3])
def test_plain_training_is_that_of_one_process(size: int) -> None:
    check(size, [{}, {"trainer": {"limit_train_batches": 3, "max_epochs": 3}}, {"trainer": {"max_steps": 7, "max_epochs": -1}}])


@pytest.mark.parametrize("size", [2, 3])
def test_accumulation_is_that_of_one_process_also_in_a_smaller_last_window(size: int) -> None:
    check(size, [{"trainer": {"accumulate_grad_batches": 2}}, {"trainer": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3}}])


def test_accumulation_that_changes_is_that_of_one_process() -> None:
    schedule = {0: 1, 1: 3, 2: 2}
    check(2, [{"accumulation": schedule, "trainer": {"max_epochs": 4}, "ddp": ddp} for ddp in ({}, {"static_graph": True})])


def test_validation_in_the_middle_of_windows_changes_nothing() -> None:
    check(2, [{"model": "Validated", "trainer": {"accumulate_grad_batches": 2, "val_check_interval": 1}}, {"model": "Validated"}])


def test_clipping_is_that_of_one_process() -> None:
    by_value = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    check(2, [{"trainer": {"gradient_clip_val": 0.1}}, {"trainer": by_value}])


def test_double_precision_is_that_of_one_process() -> None:
    check(2, [{"trainer": {"precision": "64-true"}}], tolerance=1e-13)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_is_that_of_one_process_as_far_as_its_digits_reach(precision: str) -> None:
    check(2, [{"trainer": {"precision": precision}}], tolerance=0.1)


def test_manual_optimization_of_two_optimizers_is_that_of_one_process() -> None:
    # Each step uses one of the networks; the gradients of the other are switched off by `toggle_optimizer`.
    check(2, [{"model": "Adversarial", "ddp": {"find_unused_parameters": True}}])


def test_steps_of_the_users_own_are_those_of_one_process() -> None:
    check(2, [{"model": "Overriding"}, {"model": "Overriding", "trainer": {"accumulate_grad_batches": 2}}])
    in_double: Case = {"trainer": {"precision": "64-true"}}  # in which rounding does not grow from step to step
    check(2, [{"model": "SecondOrder", **in_double}, {"model": "Searching", **in_double}])


def test_schedulers_and_frozen_layers_are_those_of_one_process() -> None:
    check(2, [{"model": "Freezing"}, {"model": "Plateau", "trainer": {"max_epochs": 4}}])


def test_options_of_ddp_change_nothing_in_the_result() -> None:
    unused: Case = {"model": "Skipping", "trainer": {"strategy": "ddp_find_unused_parameters_true"}}
    options: list[Case] = [{"static_graph": True}, {"gradient_as_bucket_view": False}, {"bucket_cap_mb": 0.0001}]
    accumulating = {"accumulate_grad_batches": 2}
    check(2, [*({"ddp": ddp, "trainer": trainer} for ddp in options for trainer in ({}, accumulating)), unused])


@pytest.mark.parametrize("size", [2, 3])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(size: int) -> None:
    net = {"net": {"normalises": True}}
    check(size, [{**net, "trainer": {"sync_batchnorm": True, **more}} for more in ({}, {"accumulate_grad_batches": 2})])
