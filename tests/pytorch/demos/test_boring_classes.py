"""The demo models and data have the shapes, lengths and outputs that users of them count on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning.pytorch.demos import boring_classes
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    DemoModel,
    IterableBoringDataModule,
    ManualOptimBoringModel,
    Net,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDataset,
    RandomIterableDatasetWithLen,
)

TASKS = ("train", "val", "test", "predict")


def test_random_dataset_draws_once() -> None:
    torch.manual_seed(7)
    data = RandomDataset(3, 5)
    torch.manual_seed(7)
    assert torch.equal(torch.stack([data[i] for i in range(len(data))]), torch.randn(5, 3))


def test_random_dict_dataset_holds_noise_and_noise_plus_two() -> None:
    data = RandomDictDataset(3, 5)
    assert len(data) == 5
    assert data[4].keys() == {"a", "b"}
    assert torch.equal(data[4]["b"], data[4]["a"] + 2)


def test_random_iterable_dataset_draws_anew_and_hides_its_length() -> None:
    data = RandomIterableDataset(3, 5)
    first, second = list(data), list(data)
    assert [x.shape for x in first] == [(3,)] * 5
    assert not torch.equal(first[0], second[0])
    with pytest.raises(TypeError, match="has no len"):
        len(data)  # type: ignore[arg-type]


def test_random_iterable_dataset_with_len_tells_its_length() -> None:
    assert len(RandomIterableDatasetWithLen(3, 5)) == 5
    assert len(list(RandomIterableDatasetWithLen(3, 5))) == 5


def test_boring_model_steps_return_the_loss_under_their_names() -> None:
    model, batch = BoringModel(), torch.randn(4, 32)
    expected = F.mse_loss(model(batch), torch.ones(4, 2))
    assert torch.equal(model.step(batch), expected)
    for step, key in ((model.training_step, "loss"), (model.validation_step, "x"), (model.test_step, "y")):
        outputs = step(batch, 0)
        assert isinstance(outputs, dict)
        assert outputs.keys() == {key}
        assert torch.equal(outputs[key], expected)


def test_boring_model_loss_takes_labels() -> None:
    assert BoringModel().loss(torch.full((2, 2), 3.0), torch.zeros(2, 2)) == 9.0


def test_boring_model_optimizer_is_sgd_with_a_tenfold_decay() -> None:
    [optimizer], [scheduler] = BoringModel().configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert type(scheduler) is StepLR
    assert (scheduler.step_size, scheduler.gamma) == (1, 0.1)


@pytest.mark.parametrize("task", TASKS)
def test_boring_model_loaders_have_64_batches_of_one_sample(task: str) -> None:
    loader = getattr(BoringModel(), f"{task}_dataloader")()
    assert [batch.shape for batch in loader] == [(1, 32)] * 64


def test_manual_model_turns_automatic_optimization_off() -> None:
    assert not ManualOptimBoringModel().automatic_optimization


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("fit", {"random_train", "random_val"}),
        ("validate", {"random_val"}),
        ("test", {"random_test"}),
        ("predict", {"random_predict"}),
    ],
)
@pytest.mark.parametrize("kind", [BoringDataModule, BoringDataModuleNoLen])
def test_datamodule_setup_makes_what_its_stage_needs(
    kind: type[BoringDataModule] | type[BoringDataModuleNoLen], stage: str, names: set[str]
) -> None:
    module = kind()
    before = set(vars(module))
    module.setup(stage)
    assert set(vars(module)) - before == names


def _loaders(module: BoringDataModule | BoringDataModuleNoLen | IterableBoringDataModule, task: str) -> list[DataLoader[Tensor]]:
    for stage in ("fit", "test", "predict"):
        module.setup(stage)
    loaders = getattr(module, f"{task}_dataloader")()
    return loaders if isinstance(loaders, list) else [loaders]


@pytest.mark.parametrize(("task", "part"), list(zip(TASKS, range(4))))
def test_datamodule_gives_each_task_its_quarter(task: str, part: int) -> None:
    module = BoringDataModule()
    [loader] = _loaders(module, task)
    assert torch.equal(torch.cat(list(loader)), module.random_full.data[64 * part : 64 * (part + 1)])


@pytest.mark.parametrize(("task", "count"), list(zip(TASKS, (512, 128, 256, 64))))
def test_datamodule_without_length_streams_its_count(task: str, count: int) -> None:
    [loader] = _loaders(BoringDataModuleNoLen(), task)
    assert sum(batch.shape == (1, 32) for batch in loader) == count
    with pytest.raises(TypeError, match="has no len"):
        len(loader)


@pytest.mark.parametrize(("task", "count"), list(zip(TASKS, (16, 32, 64, 128))))
def test_iterable_datamodule_gives_a_sized_loader_and_a_stream(task: str, count: int) -> None:
    sized, stream = _loaders(IterableBoringDataModule(), task)
    assert len(sized) == count
    assert [batch.shape for batch in stream] == [(1, 4)] * count


def test_demo_model_sums_its_outputs_and_uses_adam() -> None:
    model, batch = DemoModel(out_dim=5, learning_rate=0.5), torch.randn(3, 4, 8)
    out = model(batch)
    assert out.shape == (3, 5)
    assert (out >= 0).all()
    assert torch.equal(model.training_step(batch, 0), out.sum())
    optimizer = model.configure_optimizers()
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_net_gives_log_probabilities_of_ten_classes() -> None:
    out = Net().eval()(torch.randn(3, 1, 28, 28))
    assert out.shape == (3, 10)
    assert torch.allclose(out.exp().sum(1), torch.ones(3))


def test_demos_offer_their_main_classes_lazily() -> None:
    import lightning.pytorch.demos as demos

    assert demos.BoringModel is boring_classes.BoringModel
    assert "BoringDataModule" in dir(demos)
    with pytest.raises(AttributeError, match="Nothing"):
        demos.Nothing  # noqa: B018
