"""Learning rates follow their schedulers exactly as in a hand-written loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

EPOCHS = 4


def configured(build: Callable[[Any], Any], optimizer: Callable[[Any], Any] | None = None, **settings: Any) -> Callable[[Any], Any]:
    """What ``configure_optimizers`` returns: an optimizer, and a scheduler with its settings."""

    def configure(net: Any) -> Any:
        chosen = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9) if optimizer is None else optimizer(net)
        return {"optimizer": chosen, "lr_scheduler": {"scheduler": build(chosen), **settings}}

    return configure


def by_hand(net: Any, loader: Any, given: Any) -> list[Tensor]:
    """A hand-written loop that steps the scheduler as its settings say."""
    optimizer, settings = given["optimizer"], given["lr_scheduler"]
    scheduler, frequency, losses = settings["scheduler"], settings.get("frequency", 1), []
    for epoch in range(EPOCHS):
        for batch in loader:
            loss = net.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if settings.get("interval") == "step" and len(losses) % frequency == 0:
                scheduler.step()
        if settings.get("interval", "epoch") == "epoch" and (epoch + 1) % frequency == 0:
            scheduler.step()
    return losses


@pytest.mark.parametrize(
    "configure",
    [
        configured(lambda o: lr_scheduler.StepLR(o, step_size=1, gamma=0.5)),
        configured(lambda o: lr_scheduler.StepLR(o, step_size=1, gamma=0.5), frequency=2),
        configured(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=EPOCHS), interval="epoch"),
        configured(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.4, total_steps=11 * EPOCHS), interval="step"),
        configured(lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), interval="step", frequency=3),
        configured(
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 40)], milestones=[5]
            ),
            interval="step",
        ),
        configured(
            lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=11 * EPOCHS),
            lambda net: torch.optim.AdamW(net.parameters(), lr=0.01),
            interval="step",
        ),
    ],
    ids=["StepLR", "StepLR every 2", "Cosine", "OneCycle", "Lambda every 3 steps", "Sequential", "OneCycle with AdamW"],
)
def test_parity_of_scheduler(parity: Any, configure: Any) -> None:
    parity(by_hand, configure, max_epochs=EPOCHS)


def test_parity_of_a_scheduler_that_watches_the_validation_loss(parity: Any, batches: Any, Validated: Any) -> None:
    learning_rates = []

    def plateau(net: Any, loader: Any, given: Any, val_loader: Any) -> list[Tensor]:
        optimizer, scheduler = given["optimizer"], given["lr_scheduler"]["scheduler"]
        losses = []
        for _ in range(EPOCHS):
            for batch in loader:
                loss = net.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            net.eval()
            with torch.no_grad():
                scheduler.step(torch.stack([net.loss(batch) for batch in val_loader]).mean())
            net.train()
            learning_rates.append(optimizer.param_groups[0]["lr"])
        return losses

    configure = configured(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.1), monitor="val_loss")
    parity(plateau, configure, module=Validated, val_loader=lambda: batches(shuffle=False, samples=8), max_epochs=EPOCHS)
    assert len(set(learning_rates)) > 1
