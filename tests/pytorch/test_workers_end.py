"""Worker processes of loaders end with what they were started for, at once: nobody has to wait for the garbage collector."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from trainers import quiet

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import CombinedLoader


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = [part for part in tree_leaves(batch) if part is not None]
        return self.layer(torch.cat(rows)).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Evaluated(Model):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return torch.zeros(())

    predict_step = validation_step


class Fails(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise ValueError("bad batch")
        return super().training_step(batch, batch_idx)


class FailsInEvaluation(Model):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        raise ValueError("bad batch")


def loader(count: int, persistent: bool) -> DataLoader[Any]:
    return DataLoader(torch.arange(float(count))[:, None], batch_size=2, num_workers=1, persistent_workers=persistent)  # type: ignore[arg-type]


def side_by_side(mode: Any) -> Callable[[bool], Any]:
    return lambda persistent: CombinedLoader({"long": loader(7, persistent), "short": loader(3, persistent)}, mode)


GIVEN = {
    "one": lambda persistent: loader(7, persistent),
    "one after another": lambda persistent: CombinedLoader([loader(7, persistent), loader(3, persistent)], "sequential"),
    "side by side": side_by_side("max_size"),
    "again and again": side_by_side("max_size_cycle"),
}


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


RUNS = [(what, given) for what in ("fit", "validate", "predict") for given in GIVEN if (what, given) != ("fit", "one after another")]


@pytest.mark.parametrize(("what", "given"), RUNS)
@pytest.mark.parametrize(("persistent", "limit"), [(False, None), (False, 1), (True, None)], ids=str)
def test_run_leaves_no_workers(what: str, given: str, persistent: bool, limit: int | None) -> None:
    loaders = GIVEN[given](persistent)
    limits = {f"limit_{name}_batches": limit for name in ("train", "val", "predict")}
    getattr(quiet(max_epochs=2, **limits), what)(Model() if what == "fit" else Evaluated(), loaders)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("given", GIVEN)
def test_run_that_fails_leaves_no_workers(given: str) -> None:
    loaders = GIVEN[given](False)
    run, model = (quiet().validate, FailsInEvaluation()) if given == "one after another" else (quiet().fit, Fails())
    with pytest.raises(ValueError, match="bad batch") as caught:
        run(model, loaders)
    assert caught.value.__traceback__ is not None  # which keeps frames, but not what they held
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("given", GIVEN)
def test_validation_that_is_cut_short_leaves_no_workers_beside_training(given: str) -> None:
    seen: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(len(multiprocessing.active_children()))

    train = DataLoader(torch.arange(4.0)[:, None], batch_size=2)  # type: ignore[arg-type]
    trainer = quiet(max_epochs=2, limit_val_batches=1, num_sanity_val_steps=1, callbacks=[Count()])
    trainer.fit(Evaluated(), train, GIVEN[given](False))
    assert seen == [0, 0, 0, 0]
    assert multiprocessing.active_children() == []
