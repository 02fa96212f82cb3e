"""BasePredictionWriter: which of its methods is called when, and with what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.prediction_writer import BasePredictionWriter, WriteInterval


class Recorder(BasePredictionWriter):
    def __init__(self, write_interval: Any) -> None:
        super().__init__(write_interval)
        self.calls: list[tuple[Any, ...]] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.calls.append(("batch", *args))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.calls.append(("epoch", *args))


def run(writer: BasePredictionWriter) -> None:
    loop = SimpleNamespace(current_batch_indices=[0, 1], predictions=["p"], epoch_batch_indices=[[[0, 1]]])
    trainer = SimpleNamespace(predict_loop=loop)
    writer.on_predict_batch_end(trainer, None, "p", "batch", 4, 2)
    writer.on_predict_epoch_end(trainer, None)


BATCH = ("batch", "p", [0, 1], "batch", 4, 2)
EPOCH = ("epoch", ["p"], [[[0, 1]]])


@pytest.mark.parametrize(
    ("interval", "calls"),
    [("batch", [BATCH]), ("epoch", [EPOCH]), ("batch_and_epoch", [BATCH, EPOCH]), (WriteInterval.EPOCH, [EPOCH])],
)
def test_interval_says_what_is_written(interval: str, calls: list[tuple[Any, ...]]) -> None:
    writer = Recorder(interval)
    run(writer)
    assert writer.calls == calls
    assert writer.interval is WriteInterval(interval)


@pytest.mark.parametrize(("interval", "method"), [("batch", "write_on_batch_end"), ("epoch", "write_on_epoch_end")])
def test_method_that_is_not_overridden_is_named(interval: Any, method: str) -> None:
    with pytest.raises(NotImplementedError, match=f"override `{method}`"):
        run(BasePredictionWriter(interval))


@pytest.mark.parametrize("interval", ["step", None, 3])
def test_unknown_interval_is_refused(interval: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"write_interval=.*'batch', 'epoch', 'batch_and_epoch'"):
        BasePredictionWriter(interval)


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def loaders(*lengths: int) -> list[Any]:
    from torch.utils.data import DataLoader

    from lightning.pytorch.demos.boring_classes import RandomDataset

    return [DataLoader(RandomDataset(32, length), batch_size=2) for length in lengths]


def test_writer_is_told_which_samples_a_batch_holds() -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    writer = Recorder("batch_and_epoch")
    returned = Trainer(callbacks=writer, **QUIET).predict(BoringModel(), loaders(4, 3))
    *batches, (_, predictions, indices) = writer.calls
    assert [(call[2], *call[4:]) for call in batches] == [([0, 1], 0, 0), ([2, 3], 1, 0), ([0, 1], 0, 1), ([2], 1, 1)]
    assert [tuple(call[1].shape) for call in batches] == [(2, 2), (2, 2), (2, 2), (1, 2)]
    assert indices == [[[0, 1], [2, 3]], [[0, 1], [2]]]
    assert [len(of_loader) for of_loader in predictions] == [2, 2]
    assert [len(of_loader) for of_loader in returned] == [2, 2]


@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_writer_works_without_returned_predictions(interval: str) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    writer = Recorder(interval)
    returned = Trainer(callbacks=writer, **QUIET).predict(BoringModel(), loaders(4), return_predictions=False)
    assert returned is None
    if interval == "batch":
        assert [call[2] for call in writer.calls] == [[0, 1], [2, 3]]
    else:
        ((_, predictions, indices),) = writer.calls
        assert [tuple(prediction.shape) for prediction in predictions] == [(2, 2), (2, 2)]
        assert indices == [[[0, 1], [2, 3]]]
