"""``predict``: what it returns and keeps, and which samples prediction writers are told of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter


class Writer(BasePredictionWriter):
    """Keeps what it is told of each batch, and of the epoch."""

    def __init__(self, interval: Any = "batch_and_epoch") -> None:
        super().__init__(interval)
        self.batches: list[tuple[list[int], list[float], int, int]] = []
        self.epoch: Any = None

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Tensor, batch_idx: int, dataloader_idx: int
    ) -> None:
        self.batches.append((list(batch_indices), batch.flatten().tolist(), batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = (predictions, batch_indices)


# ---- what is returned and kept --------------------------------------------------------------------------------------


def test_one_loader_gives_a_list_of_batches(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    predictions = make_trainer().predict(Evaluated(), numbers(5, batch_size=2))
    assert [batch.flatten().tolist() for batch in predictions] == [[0.0, 1.0], [2.0, 3.0], [4.0]]
    assert not any(batch.requires_grad for batch in predictions)


def test_several_loaders_give_a_list_each(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> Any:
            return (batch.item(), batch_idx, dataloader_idx)

    predictions = make_trainer().predict(Model(), [numbers(2), numbers(1, start=5)])
    assert predictions == [[(0.0, 0, 0), (1.0, 1, 0)], [(5.0, 0, 1)]]


@pytest.mark.parametrize(
    ("arguments", "expected"), [({"limit_predict_batches": 2}, 2), ({"limit_predict_batches": 0.75}, 3), ({"fast_dev_run": True}, 1)]
)
def test_limits_count(Evaluated: Any, make_trainer: Any, numbers: Any, arguments: Any, expected: int) -> None:
    assert len(make_trainer(**arguments).predict(Evaluated(), numbers(4))) == expected


def test_nothing_is_returned_without_batches(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    assert not make_trainer(limit_predict_batches=0).predict(Evaluated(), numbers(4))


def test_nothing_is_kept_where_predictions_are_not_returned(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    kept: list[int] = []

    class Model(Evaluated):  # type: ignore[misc]
        def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            kept.append(len(self.trainer.predict_loop.predictions))

    trainer = make_trainer(callbacks=[Writer("batch")])
    assert trainer.predict(Model(), numbers(4), return_predictions=False) is None
    assert kept == [0, 0, 0, 0]
    assert trainer.predict_loop.predictions == []


def test_writer_of_whole_epochs_gets_all_where_nothing_is_returned(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    writer = Writer("epoch")
    assert make_trainer(callbacks=[writer]).predict(Evaluated(), numbers(3), return_predictions=False) is None
    predictions, indices = writer.epoch
    assert [batch.item() for batch in predictions] == [0.0, 1.0, 2.0]
    assert indices == [[[0], [1], [2]]]


def test_tensors_anywhere_in_a_prediction_are_brought_to_the_host(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Device(Tensor):
        """A tensor that tells when it is brought to the host."""

        def to(self, *args: Any, **kwargs: Any) -> Any:
            brought.append(self.item())
            return torch.tensor(self.item())

    brought: list[float] = []

    class Model(Weight):  # type: ignore[misc]
        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            value = torch.tensor([1.0, 2.0, 3.0])
            return {"a": value[0].as_subclass(Device), "b": [value[1].as_subclass(Device), ("text", value[2].as_subclass(Device))]}

    (prediction,) = make_trainer(inference_mode=False).predict(Model(), numbers(1))
    assert brought == [1.0, 2.0, 3.0]
    assert prediction == {"a": 1.0, "b": [2.0, ("text", 3.0)]}
    assert type(prediction["b"][1][1]) is Tensor


def test_step_returning_none_warns_and_gives_none(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model = type("Model", (Weight,), {"predict_step": lambda self, batch, batch_idx: None})()
    with pytest.warns(UserWarning, match="`predict_step` returned None"):
        assert make_trainer().predict(model, numbers(2)) == [None, None]


def test_forward_predicts_where_there_is_no_step(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model = type("Model", (Weight,), {"forward": lambda self, batch: batch * 2})()
    assert [p.item() for p in make_trainer().predict(model, numbers(3))] == [0.0, 2.0, 4.0]
    with pytest.raises(MisconfigurationException, match="`predict_step`, or `forward`"):
        make_trainer().predict(Weight(), numbers(1))


def test_step_may_take_the_batch_alone(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    model = type("Model", (Weight,), {"predict_step": lambda self, batch: batch.item()})()
    assert make_trainer().predict(model, numbers(2)) == [0.0, 1.0]


def test_prediction_runs_in_evaluation_mode_and_restores_what_was(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[Any] = []

    class Model(Evaluated):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.fails = nn.Dropout().eval(), False

        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            if self.fails:
                raise RuntimeError("boom")
            return batch

    model, trainer = Model(), make_trainer()
    trainer.predict(model, numbers(1))
    model.fails = True
    with pytest.raises(RuntimeError, match="boom"):
        trainer.predict(model, numbers(1))
    assert seen == [(False, False, True)] * 2
    assert (model.training, model.frozen.training) == (True, False)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_predictions_of_a_run_are_gone_in_the_next(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    trainer = make_trainer()
    first = trainer.predict(Evaluated(), numbers(3))
    second = trainer.predict(Evaluated(), numbers(1))
    assert (len(first), len(second)) == (3, 1)


# ---- which samples --------------------------------------------------------------------------------------------------


class Pairs:
    """A batch sampler of its own kind: no sampler inside, batches of changing size."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([4, 0], [1], [3, 2, 5])

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shuffled", "batch sampler", "own batch sampler", "limited"])
def test_writer_is_told_which_samples_each_batch_holds(Evaluated: Any, make_trainer: Any, Numbers: Any, workers: int, kind: str) -> None:
    data = Numbers(6)
    arguments: dict[str, Any] = {
        "shuffled": {"batch_size": 2, "shuffle": True},
        "batch sampler": {"batch_sampler": BatchSampler(SequentialSampler(data), 4, drop_last=False)},
        "own batch sampler": {"batch_sampler": Pairs()},
        "limited": {"batch_size": 1},
    }[kind]
    loader, writer = DataLoader(data, num_workers=workers, **arguments), Writer()
    trainer = make_trainer(callbacks=[writer], limit_predict_batches=2 if kind == "limited" else None)
    if kind == "shuffled":
        with pytest.warns(UserWarning, match="shuffle"):
            trainer.predict(Evaluated(), loader)
    else:
        trainer.predict(Evaluated(), loader)
    assert len(writer.batches) == (2 if kind in ("batch sampler", "limited") else 3)
    for indices, samples, _, _ in writer.batches:
        assert [float(index) for index in indices] == samples
    assert writer.epoch[1] == [[indices for indices, *_ in writer.batches]]


def test_writer_is_told_of_the_samples_of_several_loaders(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int) -> Any:
            return batch

    writer = Writer()
    make_trainer(callbacks=[writer]).predict(Model(), [numbers(3, batch_size=2), numbers(2, start=7)])
    assert writer.batches == [([0, 1], [0.0, 1.0], 0, 0), ([2], [2.0], 1, 0), ([0], [7.0], 0, 1), ([1], [8.0], 1, 1)]
    assert writer.epoch[1] == [[[0, 1], [2]], [[0], [1]]]
    assert [[batch.flatten().tolist() for batch in part] for part in writer.epoch[0]] == [[[0.0, 1.0], [2.0]], [[7.0], [8.0]]]


@pytest.mark.parametrize("loader", ["stream", "list"])
def test_writer_of_a_loader_without_samplers_gets_no_indices(Evaluated: Any, make_trainer: Any, stream: Any, loader: str) -> None:
    writer = Writer()
    data = stream(2) if loader == "stream" else [torch.tensor([[0.0]]), torch.tensor([[1.0]])]

    class Data:
        def __iter__(self) -> Any:
            return iter(data)

    with pytest.warns(UserWarning, match="batch indices"):
        make_trainer(callbacks=[writer]).predict(Evaluated(), Data() if loader == "list" else data)
    assert [indices for indices, *_ in writer.batches] == [[], []]


def test_loader_of_the_user_stays_as_it_was(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    loader = numbers(3)
    before = dict(vars(loader))
    make_trainer(callbacks=[Writer()]).predict(Evaluated(), loader)
    assert vars(loader) == before
