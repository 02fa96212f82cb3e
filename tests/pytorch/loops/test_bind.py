"""What a step calls: the user's override where there is one, wherever it stands, else the shortest way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning.pytorch import LightningDataModule
from lightning.pytorch.loops.bind import detach_manual_outputs, detach_outputs, drop_gradients

TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["module", "datamodule", "instance"])
@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
def test_data_hooks_of_either_owner_see_each_batch_in_order(Evaluated: Any, make_trainer: Any, numbers: Any, owner: str, task: str) -> None:
    calls: list[Any] = []

    def before(self: Any, batch: Tensor, dataloader_idx: int) -> Tensor:
        calls.append(("before", batch.item(), dataloader_idx))
        return batch + 1

    def move(self: Any, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        calls.append(("move", batch.item(), device.type, dataloader_idx))
        return batch + 1

    def after(self: Any, batch: Tensor, dataloader_idx: int) -> Tensor:
        calls.append(("after", batch.item(), dataloader_idx))
        return batch + 1

    hooks = dict(zip(TRANSFER, (before, move, after)))
    loaders = {f"{name}_dataloader": lambda self: numbers(1) for name in ("train", "val", "test", "predict")}
    module = type("Model", (Evaluated,), hooks if owner == "module" else {})()
    if owner == "instance":
        module.__dict__.update({name: hook.__get__(module) for name, hook in hooks.items()})
    datamodule = type("Data", (LightningDataModule,), {**loaders, **(hooks if owner == "datamodule" else {})})()
    trainer = make_trainer(limit_val_batches=0 if task == "fit" else None)
    result = getattr(trainer, task)(module, datamodule=datamodule)
    assert calls == [("before", 0.0, 0), ("move", 1.0, "cpu", 0), ("after", 2.0, 0)]
    if task == "predict":
        assert result[0].item() == 3.0
    if task == "fit":
        assert module.seen == [[3.0]]


def test_data_hooks_are_told_the_loader(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[tuple[float, int]] = []

    class Model(Weight):  # type: ignore[misc]
        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            seen.append((batch.item(), dataloader_idx))
            return batch

        def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            pass

    make_trainer().test(Model(), [numbers(1), numbers(2, start=5)], verbose=False)
    assert seen == [(0.0, 0), (5.0, 1), (6.0, 1)]


def test_data_hook_of_the_datamodule_wins_with_a_warning(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch + 100

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return numbers(1)

        def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch + 1

    model = Model()
    with pytest.warns(UserWarning, match="the datamodule's is used"):
        make_trainer().fit(model, datamodule=Data())
    assert model.seen == [[1.0]]


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
@pytest.mark.parametrize("hooked", [False, True])
def test_batches_arrive_in_the_precision_of_the_run(
    make_trainer: Any, numbers: Any, Weight: Any, precision: str, dtype: Any, hooked: bool
) -> None:
    seen: list[tuple[Any, Any]] = []

    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.append((batch.dtype, self.weight.dtype))
            return self.weight * batch.mean()

    if hooked:
        Model.on_after_batch_transfer = lambda self, batch, dataloader_idx: batch
    make_trainer(precision=precision).fit(Model(), numbers(1))
    assert seen == [(dtype, dtype)]


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["trainer", "configure_gradient_clipping", "clip_gradients", "both"])
def test_clipping_goes_through_the_hooks_that_are_overridden(Weight: Any, make_trainer: Any, numbers: Any, way: str) -> None:
    calls: list[Any] = []

    def configure(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        calls.append(("configure", gradient_clip_val, str(gradient_clip_algorithm)))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        calls.append(("clip", gradient_clip_val))
        nn.utils.clip_grad_value_([self.weight], gradient_clip_val)

    members: dict[str, Any] = {"training_step": lambda self, batch, batch_idx: self.weight * 10.0}
    if way in ("configure_gradient_clipping", "both"):
        members["configure_gradient_clipping"] = configure
    if way in ("clip_gradients", "both"):
        members["clip_gradients"] = clip
    model = type("Model", (Weight,), members)()
    make_trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value").fit(model, numbers(1))
    assert model.weight.item() == -0.5
    expected = {"configure_gradient_clipping": ["configure"], "clip_gradients": ["clip"], "both": ["configure", "clip"]}.get(way, [])
    assert [name for name, *_ in calls] == expected


def test_hook_may_clip_on_its_own_where_the_trainer_does_not(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.weight * 10.0

        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
            assert gradient_clip_val is None
            self.clip_gradients(optimizer, gradient_clip_val=2.0, gradient_clip_algorithm="value")

    model = Model()
    make_trainer().fit(model, numbers(1))
    assert model.weight.item() == -2.0


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_outputs_lose_their_graphs_and_keep_their_structure() -> None:
    weight = nn.Parameter(torch.ones(()))
    outputs = {"loss": weight * 2, "more": {"a": [weight * 3], "b": "text"}}
    for detach in (detach_outputs, detach_manual_outputs):
        found = detach(outputs)
        assert found == {"loss": 2.0, "more": {"a": [3.0], "b": "text"}}
        assert not found["loss"].requires_grad
        assert not found["more"]["a"][0].requires_grad
        assert detach(weight * 5) == {"loss": 5.0}
        assert not detach(None)
    assert outputs["loss"].requires_grad  # type: ignore[union-attr]


def test_zero_grad_that_is_set_on_the_optimizer_is_called(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    calls: list[int] = []

    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            plain = optimizer.zero_grad

            def zero_grad(set_to_none: bool = True) -> None:
                calls.append(len(self.seen))
                plain(set_to_none)

            optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
            return optimizer

    model = Model()
    make_trainer(accumulate_grad_batches=2).fit(model, numbers(4))
    assert len(calls) == 2
    assert model.weight.item() == -3.0


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_are_dropped_in_all_groups_also_in_those_that_came_later() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(parameters[:2], 0.1)
    optimizer.add_param_group({"params": [parameters[2]]})
    for parameter in parameters[1:]:
        parameter.grad = torch.ones(2)
    drop_gradients(optimizer)
    assert [parameter.grad for parameter in parameters] == [None] * 3


@pytest.mark.parametrize("owner", ["instance", "class"])
def test_an_optimizers_own_zero_grad_is_called(Evaluated: Any, make_trainer: Any, numbers: Any, owner: str) -> None:
    calls: list[str] = []

    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            calls.append("class")
            super().zero_grad(set_to_none)

    class Model(Evaluated):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = (Own if owner == "class" else torch.optim.SGD)(self.parameters(), 0.1)
            if owner == "instance":
                zero = optimizer.zero_grad
                optimizer.zero_grad = lambda: (calls.append("instance"), zero())  # type: ignore[method-assign, func-returns-value, assignment]
            return optimizer

    make_trainer(limit_val_batches=0).fit(Model(), numbers(3), numbers(1))
    assert calls == [owner] * 3
