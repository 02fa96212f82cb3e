"""The loaders of validation, test and prediction: collections of them, what is refused, when they are asked for again."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

TASKS = {"validate": "val", "test": "test", "predict": "predict"}
each_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture
def batches(Weight: Any, make_trainer: Any) -> Any:
    """``batches(task, loaders, **arguments)``: what each step got, as (loader, numbers), and the trainer."""

    def run(task: str, loaders: Any, **arguments: Any) -> tuple[list[Any], Any]:
        taken: list[Any] = []

        def step(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            values = [each.item() if each is not None else None for each in (batch if isinstance(batch, list) else [batch])]
            taken.append((dataloader_idx, *values))

        model = type("Model", (Weight,), {f"{name}_step": step for name in ("validation", "test", "predict")})()
        trainer = make_trainer(**arguments)
        options = {"return_predictions": False} if task == "predict" else {"verbose": False}
        with pytest.MonkeyPatch.context() as patch:  # steps that predict nothing are told
            patch.setattr("lightning.pytorch.loops.predict.rank_zero_warn", lambda *args, **kwargs: None)
            getattr(trainer, task)(model, loaders, **options)
        return taken, trainer

    return run


# ---- collections ----------------------------------------------------------------------------------------------------


@each_task
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [(0, 0.0, 5.0), (0, 1.0, 6.0)]),
        ("max_size", [(0, 0.0, 5.0), (0, 1.0, 6.0), (0, 2.0, None)]),
        ("max_size_cycle", [(0, 0.0, 5.0), (0, 1.0, 6.0), (0, 2.0, 5.0)]),
        ("sequential", [(0, 0.0), (0, 1.0), (0, 2.0), (1, 5.0), (1, 6.0)]),
    ],
)
def test_combined_loaders_run_side_by_side_or_one_after_another(
    batches: Any, numbers: Any, task: str, mode: str, expected: list[Any]
) -> None:
    taken, trainer = batches(task, CombinedLoader([numbers(3), numbers(2, start=5)], mode))
    assert taken == expected
    counts = [3, 2] if mode == "sequential" else [len(expected)]
    assert getattr(trainer, f"num_{TASKS[task]}_batches") == counts


@each_task
def test_limit_holds_for_loaders_side_by_side(batches: Any, numbers: Any, task: str) -> None:
    combined = CombinedLoader([numbers(4), numbers(2, start=5)], "max_size_cycle")
    taken, _ = batches(task, combined, **{f"limit_{TASKS[task]}_batches": 0.75})
    assert taken == [(0, 0.0, 5.0), (0, 1.0, 6.0), (0, 2.0, 5.0)]


def test_streams_side_by_side_run_to_their_end(batches: Any, numbers: Any, stream: Any) -> None:
    taken, trainer = batches("test", CombinedLoader([stream(2), stream(3, start=5)], "min_size"))
    assert taken == [(0, 0.0, 5.0), (0, 1.0, 6.0)]
    assert trainer.num_test_batches == [float("inf")]


def test_collections_of_loaders_are_flattened_in_their_order(batches: Any, numbers: Any) -> None:
    taken, trainer = batches("test", {"a": numbers(1), "b": [numbers(1, start=1), numbers(1, start=2)]})
    assert taken == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert trainer.test_dataloaders.keys() == {"a", "b"}


# ---- what is refused ------------------------------------------------------------------------------------------------


@each_task
@pytest.mark.parametrize("wrong", [3, "loader", object()], ids=["a number", "a string", "an object"])
def test_what_cannot_be_iterated_is_refused(batches: Any, task: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"The {TASKS[task]} loader that was passed to the trainer gave .* cannot be iterated"):
        batches(task, wrong)


@each_task
@pytest.mark.parametrize("owner", ["Model", "Data"])
@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        (None, TypeError, "returned None; return a loader"),
        ([], MisconfigurationException, "gave a loader of length 0"),
    ],
    ids=["none", "no batches"],
)
def test_hook_that_gives_nothing_is_told_by_name(
    Evaluated: Any, make_trainer: Any, numbers: Any, task: str, owner: str, loaders: Any, error: type[Exception], message: str
) -> None:
    given = numbers(0) if loaders == [] else None
    hook = {f"{TASKS[task]}_dataloader": lambda self: given}
    model = type("Model", (Evaluated,), hook if owner == "Model" else {})()
    datamodule = type("Data", (LightningDataModule,), hook)() if owner == "Data" else None
    with pytest.raises(error, match=f"`{owner}.{TASKS[task]}_dataloader` {message}"):
        getattr(make_trainer(), task)(model, datamodule=datamodule)


@pytest.mark.parametrize("task", ["fit", *TASKS])
def test_what_is_no_datamodule_is_refused(Evaluated: Any, make_trainer: Any, numbers: Any, task: str) -> None:
    with pytest.raises(TypeError, match="is a DataLoader; a LightningDataModule is needed"):
        getattr(make_trainer(), task)(Evaluated(), datamodule=numbers(1))


# ---- when they are asked for ----------------------------------------------------------------------------------------


def test_training_data_are_asked_for_anew_every_so_many_epochs(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    asked: list[int] = []
    counts: list[float] = []

    class Model(Weight):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            asked.append(self.trainer.current_epoch)
            return numbers(len(asked))

        def on_train_epoch_start(self) -> None:
            counts.append(self.trainer.num_training_batches)

    model = Model()
    make_trainer(max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(model)
    assert asked == [0, 2, 4]
    assert counts == [1, 1, 2, 2, 3]
    assert [len(model.seen), model.seen[-1]] == [9, [2.0]]


def test_resumed_run_asks_for_loaders_in_the_epochs_of_the_whole_run(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    asked: list[int] = []

    class Model(Weight):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            asked.append(self.trainer.current_epoch)
            return numbers(1)

    trainer = make_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=2)
    trainer.fit(Model())
    trainer.save_checkpoint("three.ckpt")
    asked.clear()
    make_trainer(max_epochs=7, reload_dataloaders_every_n_epochs=2).fit(Model(), ckpt_path="three.ckpt")
    assert asked == [2, 4, 6]  # those of epoch 3 are of epoch 2


@pytest.mark.parametrize("stage", ["train", "val"])
def test_new_loaders_change_where_validation_falls(Evaluated: Any, make_trainer: Any, numbers: Any, stage: str) -> None:
    validated: list[tuple[int, int]] = []

    class Model(Evaluated):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return numbers(2 if self.trainer.current_epoch == 0 else 4)

        def val_dataloader(self) -> Any:
            return numbers(1)

        def on_validation_start(self) -> None:
            validated.append((self.trainer.current_epoch, self.trainer.fit_loop.progress.batch_idx))

    make_trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1, val_check_interval=0.5).fit(Model())
    assert validated == [(0, 1), (0, 2), (1, 2), (1, 4)]


def test_samplers_of_evaluation_are_told_the_epoch(Evaluated: Any, make_trainer: Any, numbers: Any, Numbers: Any) -> None:
    told: list[int] = []

    class Told(DistributedSampler[Any]):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    data = Numbers(2)
    loader = DataLoader(data, sampler=Told(data, num_replicas=1, rank=0, shuffle=False))
    make_trainer(max_epochs=3).fit(Evaluated(), numbers(1), loader)
    assert told == [0, 1, 2]


# ---- hints ----------------------------------------------------------------------------------------------------------


def test_loggers_that_would_rarely_get_a_row_are_told(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any) -> None:
    with pytest.warns(PossibleUserWarning, match="has 3 training batches, fewer than log_every_n_steps=4"):
        make_trainer(logger=Rows(), log_every_n_steps=4).fit(Weight(), numbers(3))


@pytest.mark.parametrize(
    "arguments", [{"logger": False, "log_every_n_steps": 4}, {"logger": True, "log_every_n_steps": 3}, {"fast_dev_run": True}]
)
def test_nothing_is_told_where_rows_are_not_wanted_or_come(Weight: Any, make_trainer: Any, numbers: Any, Rows: Any, arguments: Any) -> None:
    arguments = {**arguments, "logger": Rows() if arguments.get("logger") else False}
    model = Weight()
    make_trainer(**arguments).fit(model, numbers(3))
    assert model.seen


@each_task
def test_what_a_loader_hook_logs_is_refused(Evaluated: Any, make_trainer: Any, numbers: Any, task: str) -> None:
    def hook(self: Any) -> Any:
        self.log("a", 1.0)
        return numbers(1)

    name = f"{TASKS[task]}_dataloader"
    with pytest.raises(MisconfigurationException, match=name):
        getattr(make_trainer(), task)(type("Model", (Evaluated,), {name: hook})())


def test_batches_of_evaluation_come_as_they_are(batches: Any, Numbers: Any) -> None:
    def collate(samples: list[Tensor]) -> list[Tensor]:
        return [samples[0], samples[1] * 10]

    taken, _ = batches("test", DataLoader(Numbers(4), batch_size=2, collate_fn=collate))
    assert taken == [(0, 0.0, 10.0), (0, 2.0, 30.0)]


@pytest.mark.parametrize("none", [[], {}])
def test_model_may_say_that_it_has_no_validation_loaders(Weight: Any, make_trainer: Any, numbers: Any, none: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise AssertionError

        def val_dataloader(self) -> Any:
            return none

    model = Model()
    trainer = make_trainer(num_sanity_val_steps=2, max_epochs=2)
    trainer.fit(model, numbers(3))
    assert trainer.state.finished
    assert len(model.seen) == 6
    assert trainer.num_val_batches == []
