"""The loaders of a run: where they come from, what is accepted, how much of them is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.data import limited
from lightning.pytorch.utilities import CombinedLoader


@pytest.fixture
def batches(Weight: Any, make_trainer: Any) -> Any:
    """``batches(loader, **arguments)``: the training batches of each epoch, as lists and numbers."""

    def run(loader: Any, **arguments: Any) -> list[list[Any]]:
        taken: list[list[Any]] = []

        class Model(Weight):  # type: ignore[misc]
            def on_train_epoch_start(self) -> None:
                taken.append([])

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                taken[-1].append(plain(batch))
                return self.weight * 1.0

        make_trainer(**arguments).fit(Model(), loader)
        return taken

    return run


def plain(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(value) for value in batch]
    return batch.flatten().tolist() if isinstance(batch, Tensor) else batch


class Endless:
    """Batches without end and without length."""

    def __iter__(self) -> Iterator[Tensor]:
        number = 0.0
        while True:
            yield torch.tensor([number])
            number += 1


# ---- what is accepted -----------------------------------------------------------------------------------------------


def test_any_iterable_can_be_trained_on(batches: Any, numbers: Any, stream: Any) -> None:
    class Plain:
        def __iter__(self) -> Iterator[Tensor]:
            return iter([torch.zeros(1), torch.ones(1)])

    assert batches(numbers(3, batch_size=2)) == [[[0.0, 1.0], [2.0]]]
    assert batches(stream(2)) == [[[0.0], [1.0]]]
    assert batches(Plain(), max_epochs=2) == [[[0.0], [1.0]]] * 2
    assert batches(range(3)) == [[0, 1, 2]]
    assert batches([1.0, 2.0]) == [[1.0, 2.0]]
    assert batches(Endless(), limit_train_batches=3, max_epochs=2) == [[[0.0], [1.0], [2.0]]] * 2
    assert len(batches(Endless(), max_steps=5, max_epochs=-1)[0]) == 5


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [[[0.0], [5.0]], [[1.0], [6.0]]]),
        ("max_size", [[[0.0], [5.0]], [[1.0], [6.0]], [[2.0], None]]),
        ("max_size_cycle", [[[0.0], [5.0]], [[1.0], [6.0]], [[2.0], [5.0]]]),
    ],
)
@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_uneven_loaders_side_by_side_end_by_their_mode(
    batches: Any, numbers: Any, stream: Any, mode: Any, expected: Any, kind: str
) -> None:
    second = numbers(2, start=5) if kind == "sized" else stream(2, start=5)
    assert batches(CombinedLoader([numbers(3), second], mode), max_epochs=2) == [expected] * 2


def test_collections_of_loaders_keep_their_structure_and_start_short_ones_again(batches: Any, numbers: Any) -> None:
    loaders = {"a": numbers(1), "b": [numbers(3, start=5), numbers(2, start=8)]}
    assert batches(loaders) == [
        [{"a": [0.0], "b": [[5.0], [8.0]]}, {"a": [0.0], "b": [[6.0], [9.0]]}, {"a": [0.0], "b": [[7.0], [8.0]]}],
    ]
    assert batches(loaders, limit_train_batches=2) == [[{"a": [0.0], "b": [[5.0], [8.0]]}, {"a": [0.0], "b": [[6.0], [9.0]]}]]


def test_loaders_one_after_the_other_are_refused_in_training(batches: Any, numbers: Any) -> None:
    with pytest.raises(ValueError, match="sequential"):
        batches(CombinedLoader([numbers(1), numbers(1)], "sequential"))


@pytest.mark.parametrize(
    ("wrong", "hint"), [(3, "an int"), ("data", "a str"), (object(), "an object"), (torch.nn.Linear(1, 1), "a Linear")]
)
def test_what_cannot_be_iterated_is_refused(batches: Any, wrong: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=f"train loader that was passed.*{hint.split()[1]}.*cannot be iterated"):
        batches(wrong)


def test_dataset_in_the_place_of_a_loader_is_told_what_is_missing(batches: Any) -> None:
    class Data:
        def __getitem__(self, index: int) -> int:
            return index

        def __len__(self) -> int:
            return 3

    with pytest.raises(TypeError, match="Wrap the data set into a DataLoader"):
        batches(Data())


def test_loader_without_batches_is_refused(batches: Any, numbers: Any, Stream: Any) -> None:
    with pytest.raises(MisconfigurationException, match="length 0"):
        batches(numbers(0))
    with pytest.raises(MisconfigurationException, match="length 0"):
        batches(numbers(1, batch_size=2, drop_last=True))
    with pytest.raises(MisconfigurationException, match="gave no batch in this epoch"):
        batches(DataLoader(Stream(0)))
    with pytest.raises(MisconfigurationException, match="length 0"):
        batches({"a": numbers(2), "b": numbers(0)})


def test_generator_that_is_used_up_is_told(batches: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"a generator, gave no batch in this epoch.*anew in each epoch"):
        batches((torch.zeros(1) for _ in range(2)), max_epochs=2)


def test_stream_that_knows_its_length_wrongly_is_read_as_far_as_it_goes(batches: Any) -> None:
    class Wrong(IterableDataset[Tensor]):
        def __init__(self, says: int) -> None:
            self.says = says

        def __iter__(self) -> Iterator[Tensor]:
            return iter([torch.tensor([float(number)]) for number in range(3)])

        def __len__(self) -> int:
            return self.says

    assert batches(DataLoader(Wrong(5)), max_epochs=2) == [[[0.0], [1.0], [2.0]]] * 2
    assert batches(DataLoader(Wrong(2))) == [[[0.0], [1.0]]]


# ---- where they come from -------------------------------------------------------------------------------------------


def test_loader_of_the_datamodule_wins_over_that_of_the_model(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return numbers(1)

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return numbers(2, start=5)

    for given, expected in (({}, [[0.0]]), ({"datamodule": Data()}, [[5.0], [6.0]]), ({"train_dataloaders": numbers(1, start=9)}, [[9.0]])):
        model = Model()
        make_trainer().fit(model, **given)
        assert model.seen == expected


@pytest.mark.filterwarnings("ignore:.*no validation loader")
@pytest.mark.parametrize(("task", "name"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_missing_loader_is_told_by_name(Evaluated: Any, make_trainer: Any, task: str, name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{name}_dataloader"):
        getattr(make_trainer(), task)(Evaluated())


def test_hook_that_returns_none_is_told_by_name(Weight: Any, make_trainer: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return None

    with pytest.raises(TypeError, match=r"`Model\.train_dataloader` returned None"):
        make_trainer().fit(Model())


def test_loaders_and_datamodule_together_are_refused(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    with pytest.raises(MisconfigurationException, match="both loaders and a datamodule"):
        make_trainer().fit(Weight(), numbers(1), datamodule=LightningDataModule())


def test_trainer_shows_the_loaders_it_runs_on(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    train, val = numbers(4), [numbers(2), numbers(3)]

    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> None:
            pass

    trainer = make_trainer(limit_val_batches=1)
    trainer.fit(Model(), train, val)
    assert trainer.train_dataloader is train
    assert trainer.val_dataloaders is val
    assert trainer.num_training_batches == 4
    assert trainer.num_val_batches == [1, 1]


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (10, 1.0, 10), (10, 0.5, 5), (10, 0.19, 1), (10, 3, 3), (10, 30, 10), (10, 0, 0), (10, 0.0, 0), (10, 1, 1),
        (float("inf"), 1.0, float("inf")), (float("inf"), 3, 3), (float("inf"), 0, 0),
    ],
)  # fmt: skip
def test_limit_is_a_count_or_a_fraction(length: float, limit: float, expected: float) -> None:
    assert limited(length, limit, "limit_train_batches") == expected


def test_fraction_that_comes_to_nothing_is_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match=r"limit_val_batches=0\.1 of 5 batches.*at least 0\.2"):
        limited(5, 0.1, "limit_val_batches")
    with pytest.raises(MisconfigurationException, match=r"limit_val_batches=0\.5 is a fraction, and the loader has no length"):
        limited(float("inf"), 0.5, "limit_val_batches")


def test_overfitting_takes_the_same_batches_in_order_and_leaves_the_users_loader_alone(batches: Any, numbers: Any) -> None:
    loader = numbers(8, shuffle=True)
    with pytest.warns(UserWarning, match="shuffling of the train loader is turned off"):
        taken = batches(loader, overfit_batches=2, max_epochs=3)
    assert taken == [[[0.0], [1.0]]] * 3
    assert isinstance(loader.sampler, RandomSampler)


def test_overfitting_on_an_unshuffled_loader_says_nothing(batches: Any, numbers: Any) -> None:
    assert batches(numbers(8), overfit_batches=0.25, max_epochs=2) == [[[0.0], [1.0]]] * 2


def test_overfitting_validates_on_as_much(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer(overfit_batches=2)
    with pytest.warns(UserWarning, match="shuffling of the val loader is turned off"):
        trainer.fit(Evaluated(), numbers(8), numbers(8, shuffle=True))
    assert trainer.callback_metrics["val"].item() == 0.5
    assert isinstance(trainer._data.evaluation("val").loaders[0].sampler, SequentialSampler)


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_shuffled_evaluation_is_told(Evaluated: Any, make_trainer: Any, numbers: Any, task: str) -> None:
    with pytest.warns(UserWarning, match="shuffles its data"):
        getattr(make_trainer(), task)(Evaluated(), numbers(3, shuffle=True))


# ---- epochs and workers ---------------------------------------------------------------------------------------------


def test_samplers_are_told_the_epoch(batches: Any, Numbers: Any) -> None:
    data = Numbers(8)
    sampler: Any = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=3)
    taken = batches(DataLoader(data, sampler=sampler), max_epochs=3)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append([[float(index)] for index in sampler])
    assert taken == expected
    assert taken[0] != taken[1]


def test_shuffling_continues_from_epoch_to_epoch(batches: Any, numbers: Any) -> None:
    first, second = batches(numbers(16, shuffle=True), max_epochs=2)
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_batches(batches: Any, numbers: Any, persistent: bool) -> None:
    loader = numbers(5, batch_size=2, num_workers=2, persistent_workers=persistent)
    assert batches(loader, max_epochs=2) == [[[0.0, 1.0], [2.0, 3.0], [4.0]]] * 2


def test_workers_get_seeds_of_their_own_where_asked_for(monkeypatch: pytest.MonkeyPatch, batches: Any, numbers: Any) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    mine, theirs = numbers(2, worker_init_fn=print), numbers(2)
    batches(mine)
    batches(theirs)
    assert mine.worker_init_fn is print
    assert theirs.worker_init_fn is not None


def test_batches_of_any_structure_reach_the_step_as_they_are(batches: Any) -> None:
    data = TensorDataset(torch.arange(4.0), torch.arange(4.0) + 10)
    assert batches(DataLoader(data, batch_size=2)) == [[[[0.0, 1.0], [10.0, 11.0]], [[2.0, 3.0], [12.0, 13.0]]]]
    texts = DataLoader([{"x": 1.0, "name": "a"}, {"x": 2.0, "name": "b"}], batch_size=2)  # type: ignore[arg-type]
    assert batches(texts) == [[{"x": [1.0, 2.0], "name": ["a", "b"]}]]


# ---- workers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``cores(n)``: let the machine have so many."""
    return lambda count: monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(count)), raising=False)


@pytest.mark.parametrize(("task", "stage"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_few_workers_are_told_where_there_are_cores_for_more(
    Weight: Any, Evaluated: Any, make_trainer: Any, numbers: Any, cores: Any, task: str, stage: str
) -> None:
    cores(4)
    trainer, model = make_trainer(), Weight() if task == "fit" else Evaluated()
    with pytest.warns(PossibleUserWarning, match=f"'{stage}_dataloader' does not have many workers.*num_workers=3") as told:
        getattr(trainer, task)(model, numbers(1))
    assert len(told) == 1
    getattr(trainer, task)(model, numbers(1))  # once is enough


@pytest.mark.parametrize(("count", "workers"), [(2, 0), (4, 2)], ids=["few cores", "workers"])
def test_nothing_is_told_of_workers_where_nothing_would_be_won(batches: Any, numbers: Any, cores: Any, count: int, workers: int) -> None:
    cores(count)
    assert batches(numbers(2, num_workers=workers)) == [[[0.0], [1.0]]]


def test_nothing_is_told_of_workers_to_those_that_have_no_data_loader(batches: Any, cores: Any) -> None:
    cores(16)
    assert batches(Endless(), limit_train_batches=1) == [[[0.0]]]
