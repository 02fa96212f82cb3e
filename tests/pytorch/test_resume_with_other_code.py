"""A run that is resumed by other code than that which saved its checkpoint: what has changed is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule


class Net(LightningModule):
    def __init__(self, configure: Any = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.configure = configure or (lambda net: torch.optim.Adam(net.parameters(), lr=0.1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch.new_ones(1, 2)).square().mean()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def test_another_window_of_accumulation_is_told_within_one(make_trainer: Any, numbers: Any) -> None:
    def fit(accumulate: int, ckpt_path: Any = None) -> None:
        trainer = make_trainer(max_steps=-1, max_epochs=1, limit_train_batches=3, accumulate_grad_batches=accumulate)
        trainer.fit(Saving(), numbers(4), ckpt_path=ckpt_path)

    class Saving(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.save_checkpoint(f"{self.trainer.accumulate_grad_batches}-{batch_idx}.ckpt")

    fit(2)
    fit(2, "2-0.ckpt")
    fit(3, "2-1.ckpt")  # the window is over
    with pytest.warns(UserWarning, match=r"after 1 batches of a window of accumulate_grad_batches=2, and it is 3 now"):
        fit(3, "2-0.ckpt")


def one(net: Net) -> Any:
    return torch.optim.Adam(net.parameters(), lr=0.1)


def two_groups(net: Net) -> Any:
    return torch.optim.Adam([{"params": net.layers[0].parameters()}, {"params": net.layers[2].parameters()}], lr=0.1)


def other_sizes(net: Net) -> Any:
    return torch.optim.Adam([{"params": [*net.layers[0].parameters(), net.layers[2].weight]}, {"params": [net.layers[2].bias]}], lr=0.1)


def other_order(net: Net) -> Any:
    return torch.optim.Adam(reversed(list(net.parameters())), lr=0.1)


def other_class(net: Net) -> Any:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def scheduled(net: Net) -> Any:
    optimizer = one(net)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def otherwise_scheduled(net: Net) -> Any:
    optimizer = one(net)
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (one, two_groups, r"Adam \(number 0\): groups of \[4\] parameters, and `configure_optimizers` gives it \[2, 2\]"),
        (two_groups, one, r"groups of \[2, 2\] parameters, and `configure_optimizers` gives it \[4\]"),
        (two_groups, other_sizes, r"groups of \[2, 2\] parameters, and `configure_optimizers` gives it \[3, 1\]"),
        (one, other_order, r"'layers.0.weight' in the place where `configure_optimizers` has 'layers.2.bias' now"),
        (one, other_class, r"the optimizers \['Adam'\], and `configure_optimizers` returned \['SGD'\]"),
        (one, scheduled, r"the learning rate schedulers \[\], and `configure_optimizers` returned \['StepLR'\]"),
        (scheduled, otherwise_scheduled, r"schedulers \['StepLR'\], and `configure_optimizers` returned \['ExponentialLR'\]"),
    ],
)
def test_another_optimizer_or_scheduler_is_refused(make_trainer: Any, numbers: Any, then: Any, now: Any, message: str) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Net(then), numbers(2))
    trainer.save_checkpoint("then.ckpt")
    with pytest.raises(MisconfigurationException, match=message + r".*Model.load_from_checkpoint"):
        make_trainer(max_epochs=2).fit(Net(now), numbers(2), ckpt_path="then.ckpt")


def test_another_model_is_refused_with_its_keys(make_trainer: Any, numbers: Any) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1)
            del self.layers[2]

    trainer = make_trainer(max_epochs=1)
    trainer.fit(Net(), numbers(2))
    trainer.save_checkpoint("then.ckpt")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*head.weight.*Unexpected key.*layers.2.weight"):
        make_trainer(max_epochs=2).fit(Other(), numbers(2), ckpt_path="then.ckpt")


def decayed(net: Net, lr: float = 0.1, weight_decay: float = 0.01) -> Any:
    groups = [{"params": net.layers[0].parameters()}, {"params": net.layers[2].parameters(), "weight_decay": weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


def test_other_values_of_an_optimizer_are_told_and_those_of_the_checkpoint_stay(make_trainer: Any, numbers: Any) -> None:
    def fit(steps: int, ckpt_path: Any = None, **values: Any) -> Any:
        trainer = make_trainer(max_epochs=-1, max_steps=steps)
        trainer.fit(Net(lambda net: decayed(net, **values)), numbers(9), ckpt_path=ckpt_path)
        trainer.save_checkpoint(f"{steps}.ckpt")
        return trainer.optimizers[0].param_groups

    fit(2)
    fit(3, "2.ckpt")  # what the scheduler has changed is nobody's change
    found = r"lr=0\.1 then, 0\.2 now \(AdamW, group 0\); weight_decay=0\.01 then, 0\.5 now \(AdamW, group 1\); lr=0\.1 then"
    with pytest.warns(UserWarning, match=found):
        groups = fit(4, "3.ckpt", lr=0.2, weight_decay=0.5)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1 / 16, 0.0), (0.1 / 16, 0.01)]
    with pytest.warns(UserWarning, match="lr=0.1 then, 0.2 now"):  # these values still are not those of the run
        fit(5, "4.ckpt", lr=0.2)
    fit(6, "5.ckpt")
