"""What a run keeps of a batch: nothing once the next one is computed, and no more at the peak than a hand-written loop."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from live_tensors import LiveTensors

STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore")  # of small runs


class Watch:
    """Weak references to what belongs to a batch, by its number; a step may see nothing of those before it."""

    def __init__(self) -> None:
        self.refs: list[tuple[int, str, weakref.ref[Any]]] = []
        self.steps = 0
        self.found: set[str] = set()
        self.stage: Any = None

    def note(self, **things: Any) -> None:
        """Take note of what the current step has made."""
        self.refs += [(self.steps, name, weakref.ref(thing)) for name, thing in things.items()]

    def begin_step(self, stage: Any = None) -> None:
        """A forward pass begins: whatever was noted in steps before is to be gone, but for the batch after which a validation runs."""
        if stage != self.stage:
            self.refs = [(step, name, ref) for step, name, ref in self.refs if not name.startswith("batch")]
            self.stage = stage
        self.found |= {f"{name} of step {step}, in step {self.steps}" for step, name, ref in self.refs if ref() is not None}
        self.refs.clear()

    def end_step(self) -> None:
        self.steps += 1


class Model(LightningModule):
    """Notes what each step makes: its batch, activations, outputs, and what it logs."""

    def __init__(self, watch: Watch, automatic: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.watch = watch
        self.automatic_optimization = automatic

    def step(self, batch: Any) -> dict[str, Tensor]:
        self.watch.begin_step(self.trainer.state.stage)
        tensors = [batch] if isinstance(batch, Tensor) else list(batch.values())
        hidden = torch.relu(self.layer(sum(tensors)))
        loss = hidden.square().mean()
        logged, extra = loss * 2, hidden * hidden  # whose graph keeps `hidden`
        if self.trainer.state.fn != "predict":
            self.log("loss", loss, prog_bar=True)
            self.log("both", logged, on_step=True, on_epoch=True, batch_size=3)
            self.log("largest", logged, on_epoch=True, reduce_fx="max", batch_size=3)
        for index, tensor in enumerate(tensors):
            self.watch.note(**{f"batch[{index}]": tensor})
        self.watch.note(hidden=hidden, loss=loss, logged=logged, extra=extra)
        self.watch.end_step()
        return {"loss": loss, "extra": extra}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = self.step(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(outputs["loss"])
            optimizer.step()  # type: ignore[union-attr]
        return outputs

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(batch)["extra"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer), "interval": "step"}}


class Moving(Model):
    """Moves a batch by making another: what came from the loader is then of no use."""

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        moved = batch.clone()
        self.watch.note(raw=batch)
        return moved

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + 1


class Listener(Callback):
    """Hears of every batch, keeps nothing."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trainer.callback_metrics  # noqa: B018

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.watch.note(outputs_of_hook=outputs["loss"], extra_of_hook=outputs["extra"])

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert set(trainer.progress_bar_metrics) is not None


class Endless(IterableDataset[Tensor]):
    """Batches without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((3, 3), float(i)) for i in range(STEPS))


def batches() -> Any:
    return DataLoader([torch.full((3,), float(i)) for i in range(3 * STEPS)], batch_size=3)  # type: ignore[arg-type]


def loaders_of_every_kind() -> dict[str, Callable[[], Any]]:
    return {
        "loader": batches,
        "iterable": lambda: DataLoader(Endless(), batch_size=None),
        "generator": Fresh,
        "dict": lambda: {"a": batches(), "b": batches()},
        "combined": lambda: CombinedLoader({"a": batches(), "b": batches()}, "min_size"),
    }


class Fresh:
    """Gives tensors that nobody else holds."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((3, 3), float(i)) for i in range(STEPS))


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    """What only the cyclic collector would free counts as kept."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def quiet(**arguments: Any) -> Trainer:
    silent: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**{**silent, **arguments})


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bare": dict,
    "accumulation": lambda: {"accumulate_grad_batches": 4},
    "clipping": lambda: {"gradient_clip_val": 1.0},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "progress bar": lambda: {"callbacks": [TQDMProgressBar(refresh_rate=1)], "enable_progress_bar": True},
    "rows": lambda: {"logger": CSVLogger("."), "callbacks": [LearningRateMonitor("step")]},
    "callbacks": lambda: {"callbacks": [Listener(), EarlyStopping("loss", patience=100)]},
    "checkpoints": lambda: {"callbacks": [ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)], "enable_checkpointing": True},
    "validation in mid-epoch": lambda: {"val_check_interval": 2},
    "nonfinite": lambda: {"on_nonfinite": "skip"},
    "splitting": lambda: {"on_out_of_memory": "split_batch"},
    "profiler": lambda: {"profiler": "simple"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [Model, Moving])
def test_no_training_step_sees_anything_of_the_steps_before(options: str, kind: Any) -> None:
    watch = Watch()
    trainer = quiet(**OPTIONS[options]())
    trainer.fit(kind(watch), Fresh(), Fresh() if options == "validation in mid-epoch" else None)
    assert watch.steps >= 2 * STEPS
    assert not watch.found


@pytest.mark.parametrize("loader", loaders_of_every_kind())
def test_no_loader_keeps_a_batch(loader: str) -> None:
    watch = Watch()
    quiet().fit(Model(watch), loaders_of_every_kind()[loader](), batches())
    assert watch.steps == 4 * STEPS
    assert not watch.found


def test_no_manual_step_sees_anything_of_the_steps_before() -> None:
    watch = Watch()
    quiet(callbacks=[Listener()]).fit(Model(watch, automatic=False), batches())
    assert watch.steps == 2 * STEPS
    assert not watch.found


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
@pytest.mark.parametrize("options", ["bare", "progress bar", "rows", "callbacks", "profiler"])
@pytest.mark.parametrize("kind", [Model, Moving])
@pytest.mark.parametrize("several", [False, True])
def test_no_step_of_evaluation_sees_anything_of_the_steps_before(entry: str, options: str, kind: Any, several: bool) -> None:
    watch = Watch()
    arguments = {"return_predictions": False} if entry == "predict" else {"verbose": False}
    getattr(quiet(**OPTIONS[options]()), entry)(kind(watch), [Fresh(), batches()] if several else Fresh(), **arguments)
    assert watch.steps == STEPS * (2 if several else 1)
    assert not watch.found


def test_no_prediction_is_kept_for_writers_of_batches() -> None:
    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *_: Any) -> None:
            assert len(batch_indices) == 3

    watch = Watch()
    trainer = quiet(callbacks=[Writer("batch")])
    trainer.predict(Model(watch), batches(), return_predictions=False)
    assert watch.steps == STEPS
    assert not watch.found
    assert trainer.predict_loop.epoch_batch_indices == [[]]


@pytest.mark.parametrize("entry", ["fit", "validate", "predict"])
def test_nothing_of_the_batches_is_there_after_the_run(entry: str) -> None:
    watch = Watch()
    trainer, model = quiet(callbacks=[Listener()]), Model(watch)
    getattr(trainer, entry)(model, Fresh(), **({"return_predictions": False} if entry == "predict" else {}))
    watch.begin_step()
    assert not watch.found


# ---- bytes ----------------------------------------------------------------------------------------------------------


class Wide(LightningModule):
    """A model whose activations and batches weigh about as much as its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    def loss(self, batch: Tensor) -> Tensor:
        return self.layers(batch).square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log_dict({"a": loss, "b": loss * 2}, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("v", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Samples(Dataset[Tensor]):
    """Samples of 64 KB, made when they are asked for."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(256, 64)


def large() -> Any:
    """Batches of 64 KB. Of a loader whose length is not known a fit fetches one batch ahead, which is not the point here."""
    return DataLoader(Samples(), batch_size=None)


def peak_of(run: Callable[[], Any]) -> int:
    gc.collect()
    with LiveTensors() as tensors:
        run()
    return tensors.peak


def fitted_by_hand(model: Wide) -> None:
    optimizer = model.configure_optimizers()
    for batch in large():
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()


def evaluated_by_hand(model: Wide) -> None:
    with torch.no_grad():
        for batch in large():
            model.loss(batch)


def predicted_by_hand(model: Wide) -> None:
    with torch.inference_mode():
        for batch in large():
            output = model.layers(batch)  # noqa: F841


@pytest.mark.parametrize("options", ["bare", "progress bar", "rows", "callbacks"])
def test_a_fit_takes_at_its_peak_what_the_hand_written_loop_takes(options: str) -> None:
    trainer = quiet(max_epochs=1, **({} if options == "callbacks" else OPTIONS[options]()))
    model, twin = Wide(), Wide()
    ours, theirs = peak_of(lambda: trainer.fit(model, large())), peak_of(lambda: fitted_by_hand(twin))
    assert theirs > 5 * 64 * 1024
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("entry", ["validate", "predict", "stream"])
def test_an_evaluation_takes_at_its_peak_what_the_hand_written_loop_takes(entry: str) -> None:
    trainer, model, twin = quiet(), Wide(), Wide()

    def ours() -> None:
        if entry == "validate":
            trainer.validate(model, large(), verbose=False)
        elif entry == "predict":
            trainer.predict(model, large(), return_predictions=False)
        else:
            for _ in trainer.predict_stream(model, large()):
                pass

    by_hand = evaluated_by_hand if entry == "validate" else predicted_by_hand
    assert peak_of(ours) <= 1.01 * peak_of(lambda: by_hand(twin))


@pytest.mark.parametrize("entry", ["fit", "validate", "predict", "stream"])
def test_memory_does_not_grow_with_the_number_of_batches(entry: str) -> None:
    def run(count: int) -> tuple[int, int]:
        class Counted(Wide):
            seen, objects = 0, (0, 0)

            def note(self, batch_idx: int) -> None:
                if batch_idx in (count // 2, count - 1):
                    self.objects = (*self.objects, len(gc.get_objects()))[-2:]

            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.note(batch_idx)

            def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.note(batch_idx)

            def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.note(batch_idx)

        trainer, model = quiet(max_epochs=1, limit_val_batches=0 if entry == "fit" else None), Counted()
        data = (torch.ones(2, 64) for _ in range(count))
        if entry == "stream":
            for _ in trainer.predict_stream(model, data):
                pass
        else:
            getattr(trainer, entry)(model, data, **({"return_predictions": False} if entry == "predict" else {}))
        return model.objects

    half, end = run(300)
    assert end - half <= 20
