"""Datamodules: made from data sets, printed, copied, and attached to a trainer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule

STAGES = ("train", "val", "test", "predict")


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


# ---- from_datasets ---------------------------------------------------------------------------------------------------


def test_each_data_set_gets_a_loader_and_training_data_are_shuffled() -> None:
    datamodule = LightningDataModule.from_datasets(range(8), range(6), range(4), range(2), batch_size=3)
    loaders = [getattr(datamodule, f"{stage}_dataloader")() for stage in STAGES]
    assert [len(loader.dataset) for loader in loaders] == [8, 6, 4, 2]
    assert [loader.batch_size for loader in loaders] == [3] * 4
    assert [type(loader.sampler) for loader in loaders] == [RandomSampler, SequentialSampler, SequentialSampler, SequentialSampler]
    assert [loader.num_workers for loader in loaders] == [0] * 4


@pytest.mark.parametrize("wrap", [list, tuple, lambda sets: dict(zip("ab", sets))])
@pytest.mark.parametrize("stage", STAGES)
def test_a_collection_of_data_sets_gets_the_same_collection_of_loaders(wrap: Callable[..., Any], stage: str) -> None:
    given = wrap([range(3), range(5)])
    datamodule = LightningDataModule.from_datasets(**{f"{stage}_dataset": given})
    loaders = getattr(datamodule, f"{stage}_dataloader")()
    assert type(loaders) is type(given)
    found = list(loaders.values() if isinstance(loaders, dict) else loaders)
    assert [len(loader) for loader in found] == [3, 5]
    assert {type(loader.sampler) for loader in found} == {RandomSampler if stage == "train" else SequentialSampler}


def test_streams_are_not_shuffled() -> None:
    loader = LightningDataModule.from_datasets(Endless(), batch_size=2).train_dataloader()
    assert [batch.tolist() for batch in loader] == [[0, 1], [2]]


def test_loaders_are_made_anew_each_time() -> None:
    datamodule = LightningDataModule.from_datasets(range(8))
    assert datamodule.train_dataloader() is not datamodule.train_dataloader()


def test_workers_load_without_a_warning() -> None:
    loader = LightningDataModule.from_datasets(val_dataset=range(4), num_workers=1, batch_size=2).val_dataloader()
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("stage", "function"), [("train", "fit"), ("val", "validate"), ("test", "test"), ("predict", "predict")])
def test_a_stage_without_data_set_has_no_loader(stage: str, function: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"`Trainer\.{function}` needs data: .* or define `{stage}_dataloader`"):
        getattr(LightningDataModule.from_datasets(), f"{stage}_dataloader")()


def test_the_class_gets_its_own_arguments_and_those_of_the_loaders_that_it_takes() -> None:
    class TakesAll(LightningDataModule):
        def __init__(self, scale: float, **rest: Any) -> None:
            super().__init__()
            self.given = {"scale": scale, **rest}

    class TakesOne(LightningDataModule):
        def __init__(self, scale: float, batch_size: int = 7) -> None:
            super().__init__()
            self.given = {"scale": scale, "batch_size": batch_size}

    class TakesNone(LightningDataModule):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.given = {"scale": scale}

    def given_to(cls: Any) -> dict[str, Any]:
        datamodule = cls.from_datasets(range(4), batch_size=3, num_workers=0, scale=2.0)
        assert isinstance(datamodule, cls)
        assert datamodule.train_dataloader().batch_size == 3
        return datamodule.given  # type: ignore[no-any-return]

    assert given_to(TakesAll) == {"scale": 2.0, "batch_size": 3, "num_workers": 0}
    assert given_to(TakesOne) == {"scale": 2.0, "batch_size": 3}
    assert given_to(TakesNone) == {"scale": 2.0}


def test_arguments_that_nobody_takes_are_refused() -> None:
    class Takes(LightningDataModule):
        def __init__(self, scale: float) -> None:
            super().__init__()

    with pytest.raises(TypeError, match=r"`LightningDataModule.from_datasets` got \['bacth_size'\]"):
        LightningDataModule.from_datasets(range(4), bacth_size=3)
    with pytest.raises(TypeError, match="bacth_size"):
        Takes.from_datasets(range(4), bacth_size=3, scale=1.0)


def test_it_trains_from_data_sets(make_trainer: Callable[..., Any], Evaluated: Any) -> None:
    numbers = torch.arange(4.0).unsqueeze(1)
    model = Evaluated()
    trainer = make_trainer()
    trainer.fit(model, datamodule=LightningDataModule.from_datasets(numbers, numbers[:2], batch_size=2))
    assert sorted(number for batch in model.seen for number in batch) == [0, 1, 2, 3]
    assert trainer.callback_metrics["val"] == 0.5


# ---- printing --------------------------------------------------------------------------------------------------------


class Described(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(range(8), batch_size=2)

    def val_dataloader(self) -> Any:
        return [DataLoader(range(6)), DataLoader(Endless())]

    def test_dataloader(self) -> Any:
        return {"easy": DataLoader(range(4)), "hard": DataLoader(range(2))}

    def predict_dataloader(self) -> Any:
        return self.not_set_up_yet  # type: ignore[attr-defined]


def test_printing_tells_the_sizes_of_the_data_sets() -> None:
    assert str(Described()).splitlines() == [
        "{Train dataloader: size=8}",
        "{Validation dataloader: 1. size=6 ; 2. size=NA}",
        "{Test dataloader: easy. size=4 ; hard. size=2}",
        "{Predict dataloader: None}",
    ]


def test_printing_one_without_loaders_does_not_fail() -> None:
    assert str(LightningDataModule()).count("None") == 4
    assert "LightningDataModule object" in repr(LightningDataModule())


# ---- attached to a trainer -------------------------------------------------------------------------------------------


def test_a_new_one_has_no_trainer_and_prepares_on_each_node() -> None:
    datamodule = LightningDataModule()
    assert datamodule.trainer is None
    assert datamodule.prepare_data_per_node is True
    assert datamodule.allow_zero_length_dataloader_with_multiple_devices is False
    assert datamodule.state_dict() == {}
    assert (datamodule.name, dict(datamodule.hparams)) == (None, {})


def test_what_a_subclass_passes_on_is_accepted() -> None:
    class Old(LightningDataModule):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.save_hyperparameters()

    assert dict(Old(1, scale=2).hparams) == {"scale": 2}


def test_copies_and_pickles_leave_the_trainer_behind(make_trainer: Callable[..., Any], Weight: Any) -> None:
    datamodule = LightningDataModule.from_datasets(torch.ones(2, 1))
    trainer = make_trainer()
    trainer.fit(Weight(), datamodule=datamodule)
    assert datamodule.trainer is trainer
    for duplicate in (copy.deepcopy(datamodule), pickle.loads(pickle.dumps(datamodule))):
        assert duplicate.trainer is None
        assert len(duplicate.train_dataloader()) == 2
    assert datamodule.trainer is trainer


def test_hooks_run_in_their_order_with_the_stage(make_trainer: Callable[..., Any], Weight: Any) -> None:
    calls: list[Any] = []

    class Noting(LightningDataModule):
        def prepare_data(self) -> None:
            calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            calls.append(f"setup {stage}")

        def train_dataloader(self) -> Any:
            calls.append("train_dataloader")
            return DataLoader(torch.ones(1, 1))

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("before")
            return batch

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            calls.append(f"to {device}")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("after")
            return batch + 1

        def teardown(self, stage: str) -> None:
            calls.append(f"teardown {stage}")

    model = Weight()
    make_trainer().fit(model, datamodule=Noting())
    assert calls == ["prepare_data", "setup fit", "train_dataloader", "before", "to cpu", "after", "teardown fit"]
    assert model.seen == [[2.0]]


def test_an_exception_of_the_run_reaches_it(make_trainer: Callable[..., Any], Weight: Any) -> None:
    heard: list[BaseException] = []

    class Listening(LightningDataModule):
        def train_dataloader(self) -> Any:
            raise RuntimeError("no data today")

        def on_exception(self, exception: BaseException) -> None:
            heard.append(exception)

    with pytest.raises(RuntimeError, match="no data today") as raised:
        make_trainer().fit(Weight(), datamodule=Listening())
    assert heard == [raised.value]


def test_its_state_is_saved_and_restored(make_trainer: Callable[..., Any], Weight: Any) -> None:
    class Counting(LightningDataModule):
        loaded: Any = None

        def train_dataloader(self) -> Any:
            return DataLoader(torch.ones(2, 1))

        def state_dict(self) -> dict[str, Any]:
            return {"position": 5}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.loaded = state_dict

    trainer = make_trainer()
    trainer.fit(Weight(), datamodule=Counting())
    trainer.save_checkpoint("a.ckpt")
    restored = Counting()
    make_trainer(max_epochs=2).fit(Weight(), datamodule=restored, ckpt_path="a.ckpt")
    assert restored.loaded == {"position": 5}
