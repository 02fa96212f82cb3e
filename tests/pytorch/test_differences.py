"""Runs in which Lightning is known to do something else: each test stands for a line of ``docs/differences.md``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint


class Save(Callback):
    """Saves a checkpoint in one hook, at its ``at``-th call."""

    def __init__(self, at: int, hook: str = "on_train_batch_end") -> None:
        self.at, self.calls = at, 0
        setattr(self, hook, self._save)

    def _save(self, trainer: Any, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            trainer.save_checkpoint("saved.ckpt")


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_run_resumed_in_mid_epoch_goes_on_with_the_next_batch(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    whole = Weight()
    make_trainer(max_epochs=2, callbacks=Save(at=2)).fit(whole, numbers(4))
    resumed = Weight()
    make_trainer(max_epochs=2).fit(resumed, numbers(4), ckpt_path="saved.ckpt")
    assert resumed.seen == whole.seen[2:]
    assert torch.equal(resumed.weight, whole.weight)


def test_validation_that_was_due_comes_first_in_the_resumed_run(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    events: list[str] = []

    class Model(Evaluated):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            events.append(f"train {batch_idx}")

        def on_validation_start(self) -> None:
            events.append("validate")

    arguments = {"val_check_interval": 2}
    make_trainer(callbacks=Save(at=2), **arguments).fit(Model(), numbers(4), numbers(1))
    assert events == ["train 0", "train 1", "validate", "train 2", "train 3", "validate"]
    events.clear()
    make_trainer(**arguments).fit(Model(), numbers(4), numbers(1), ckpt_path="saved.ckpt")
    assert events == ["validate", "train 2", "train 3", "validate"]


def test_gradients_of_half_an_accumulation_window_are_in_the_checkpoint(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    make_trainer(accumulate_grad_batches=4, callbacks=Save(at=2)).fit(Weight(), numbers(4, start=1))
    resumed = Weight()
    make_trainer(accumulate_grad_batches=4).fit(resumed, numbers(4, start=1), ckpt_path="saved.ckpt")
    assert resumed.seen == [[3.0], [4.0]]
    assert resumed.weight.item() == -2.5  # the mean of 1, 2, 3 and 4


@pytest.mark.parametrize("saved", ["on_train_epoch_end", "on_train_end", "on_fit_end", "after fit"])
def test_run_that_max_steps_ended_goes_on_in_its_epoch(Weight: Any, make_trainer: Any, numbers: Any, saved: str) -> None:
    at_end = saved == "after fit"
    save = Save(at=2 if saved == "on_train_epoch_end" else 1, hook="on_train_end" if at_end else saved)
    trainer = make_trainer(max_epochs=-1, max_steps=6, callbacks=None if at_end else save)
    trainer.fit(Weight(), numbers(4))
    assert trainer.current_epoch == 2
    if at_end:
        trainer.save_checkpoint("saved.ckpt")
    resumed = Weight()
    make_trainer(max_epochs=-1, max_steps=9).fit(resumed, numbers(4), ckpt_path="saved.ckpt")
    assert resumed.seen == [[2.0], [3.0], [0.0]]


@pytest.mark.parametrize(("saved", "given"), [((1, 1), (1, 0)), ((1, 0), (1, 1)), ((2, 0), (1, 0)), ((1, 0), (2, 0))])
def test_other_number_of_optimizers_or_schedulers_is_refused(
    Weight: Any, make_trainer: Any, numbers: Any, saved: tuple[int, int], given: tuple[int, int]
) -> None:
    class Model(Weight):  # type: ignore[misc]
        def __init__(self, optimizers: int, schedulers: int) -> None:
            super().__init__()
            self.counts = optimizers, schedulers
            self.automatic_optimization = optimizers == 1

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(self.counts[0])]
            return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1) for _ in range(self.counts[1])]

    trainer = make_trainer()
    trainer.fit(Model(*saved), numbers(2))
    trainer.save_checkpoint("saved.ckpt")
    model, differs = Model(*given), 0 if saved[0] != given[0] else 1
    name = ("SGD", "StepLR")[differs]
    with pytest.raises(MisconfigurationException) as raised:
        make_trainer(max_epochs=2).fit(model, numbers(2), ckpt_path="saved.ckpt")
    assert all(str([name] * counts[differs]) in str(raised.value) for counts in (saved, given))
    assert model.seen == []


def test_rows_of_validation_steps_go_on_after_a_resume(Evaluated: Any, Rows: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", batch.mean(), on_step=True, on_epoch=False)

    whole, first, second = Rows(), Rows(), Rows()
    make_trainer(max_epochs=2, logger=whole).fit(Model(), numbers(2), numbers(3))
    trainer = make_trainer(logger=first)
    trainer.fit(Model(), numbers(2), numbers(3))
    trainer.save_checkpoint("saved.ckpt")
    make_trainer(max_epochs=2, logger=second).fit(Model(), numbers(2), numbers(3), ckpt_path="saved.ckpt")
    assert len(whole.of("val_step") or whole.of("val")) == 6
    assert first.rows + second.rows == whole.rows


def test_checkpoint_has_one_more_key_and_the_place_in_the_data(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    make_trainer(callbacks=Save(at=2)).fit(Weight(), numbers(4))
    checkpoint = torch.load("saved.ckpt", weights_only=True)
    assert "keraunos" in checkpoint
    assert {"state_dict", "epoch", "global_step", "optimizer_states", "lr_schedulers", "callbacks", "loops"} <= set(checkpoint)


# ---- schedulers -----------------------------------------------------------------------------------------------------


def test_frequency_of_a_scheduler_counts_the_optimizer_steps_of_the_run(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    rates: list[float] = []

    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}

        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])

    make_trainer(max_epochs=2).fit(Model(), numbers(3))
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_plateau_scheduler_by_steps_steps_at_every_optimizer_step(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "monitor": "loss"}}

    trainer = make_trainer(accumulate_grad_batches=2)
    trainer.fit(Model(), numbers(6))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25  # the first value is the best, the two others halve the rate


def test_plateau_scheduler_has_stepped_in_the_checkpoint_of_its_epoch(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Evaluated):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "val"},
            }

    saver = ModelCheckpoint(dirpath=".", save_on_train_epoch_end=True)
    make_trainer(callbacks=saver, enable_checkpointing=True).fit(Model(), numbers(2), numbers(1))
    assert torch.load(saver.best_model_path, weights_only=True)["lr_schedulers"][0]["last_epoch"] == 1


# ---- the numbers that a run tells -----------------------------------------------------------------------------------


def test_reading_the_estimated_steps_changes_nothing(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    def run(read: bool) -> tuple[Any, list[str]]:
        events: list[str] = []

        class Model(Weight):  # type: ignore[misc]
            def train_dataloader(self) -> Any:
                events.append("loader")
                return numbers(7, shuffle=True)

            def configure_optimizers(self) -> Any:
                if read:
                    estimates.append(self.trainer.estimated_stepping_batches)
                    estimates.append(self.trainer.estimated_stepping_batches)
                return super().configure_optimizers()

        torch.manual_seed(3)
        model = Model()
        make_trainer(max_epochs=2, accumulate_grad_batches=3).fit(model)
        return model, events

    estimates: list[Any] = []
    (one, once), (other, again) = run(read=False), run(read=True)
    assert estimates == [6, 6]
    assert once == again == ["loader"]
    assert one.seen == other.seen
    assert torch.equal(one.weight, other.weight)


def test_estimated_steps_follow_a_schedule_of_accumulation(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    estimates: list[Any] = []

    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            estimates.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    trainer = make_trainer(max_epochs=3, callbacks=GradientAccumulationScheduler({1: 2, 2: 4}))
    trainer.fit(Model(), numbers(5))
    assert estimates == [5 + 3 + 2] == [trainer.global_step]


def test_stream_without_a_bound_has_no_end(Weight: Any, make_trainer: Any, stream: Any) -> None:
    estimates: list[Any] = []

    class Model(Weight):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            estimates.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    make_trainer(max_epochs=1).fit(Model(), stream(2))
    assert estimates == [float("inf")]


def test_metrics_of_several_validation_loaders_are_there_in_the_sanity_check_too(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[dict[str, float]] = []

    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val", batch.mean())

    class Look(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

        on_validation_end = on_validation_epoch_end

    make_trainer(callbacks=Look(), num_sanity_val_steps=1).fit(Model(), numbers(1), [numbers(1, start=3), numbers(1, start=5)])
    assert seen == [{"val/dataloader_idx_0": 3.0, "val/dataloader_idx_1": 5.0}] * 4


def test_max_epochs_is_none_until_fit(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    trainer = make_trainer(max_epochs=None, callbacks=Stop())
    assert trainer.max_epochs is None
    with pytest.warns(UserWarning, match="1000 epochs"):
        trainer.fit(Weight(), numbers(1))
    assert trainer.max_epochs == 1000


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_outputs_carry_no_graph_in_any_key(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[Any] = []

    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "more": [self.weight * 2]}

        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            seen.extend([outputs["loss"], *outputs["more"]])

    make_trainer().fit(Model(), numbers(1))
    assert len(seen) == 2
    assert not any(value.requires_grad for value in seen)


@pytest.mark.parametrize("result", ["text", 1, [torch.ones(1)], object()], ids=["text", "number", "list", "object"])
def test_evaluation_steps_may_return_anything(Weight: Any, make_trainer: Any, numbers: Any, result: Any) -> None:
    seen: list[Any] = []

    class Model(Weight):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            return result

        def on_validation_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            seen.append(outputs)

    make_trainer().validate(Model(), numbers(1), verbose=False)
    assert len(seen) == 1
    assert type(seen[0]) is type(result)


def test_hook_that_is_set_within_an_epoch_counts_from_the_next_one_on(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    calls: list[tuple[int, int]] = []

    class Model(Weight):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            self.on_train_batch_end = lambda outputs, batch, batch_idx: calls.append((self.trainer.current_epoch, batch_idx))

    make_trainer(max_epochs=2).fit(Model(), numbers(2))
    assert calls == [(1, 0), (1, 1)]


def test_callback_that_is_added_in_a_hook_hears_the_next_one(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    heard: list[str] = []

    class Late(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            heard.append("on_train_start")

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            heard.append("on_train_end")

    class Adds(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.callbacks.append(Late())

    make_trainer(callbacks=Adds()).fit(Weight(), numbers(1))
    assert heard == ["on_train_end"]


@pytest.mark.parametrize("function", ["test", "validate"])
def test_evaluation_without_a_model_takes_the_weights_at_hand(Weight: Any, make_trainer: Any, numbers: Any, function: str) -> None:
    class Model(Weight):  # type: ignore[misc]
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("weight", self.weight.detach())

        validation_step = test_step

    trainer, model = make_trainer(), Model()
    trainer.fit(model, numbers(3), numbers(1))
    assert model.weight.item() == -3.0
    assert getattr(trainer, function)(dataloaders=numbers(1), verbose=False) == [{"weight": -3.0}]


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_interrupt_reaches_the_caller_after_the_run_was_closed(Weight: Any, Rows: Any, make_trainer: Any, numbers: Any) -> None:
    heard: list[BaseException] = []

    class Model(Weight):  # type: ignore[misc]
        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            raise KeyboardInterrupt

    class Listen(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            heard.append(exception)

    rows, model = Rows(), Model()
    trainer = make_trainer(callbacks=Listen(), logger=rows)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(model, numbers(4))
    assert trainer.interrupted
    assert [type(error) for error in heard] == [KeyboardInterrupt]
    assert len(rows.finalized) == 1
    assert len(model.seen) == 1


def test_modes_are_restored_before_on_exception(Evaluated: Any, make_trainer: Any, numbers: Any) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Model(Evaluated):  # type: ignore[misc]
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise RuntimeError("broken")

    class Listen(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append((pl_module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(callbacks=Listen()).fit(Model(), numbers(1), numbers(1))
    assert seen == [(True, True, False)]


def test_error_in_on_exception_does_not_hide_the_first_one(Weight: Any, make_trainer: Any, numbers: Any) -> None:
    class Model(Weight):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raise RuntimeError("the first")

    class Fails(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            raise ValueError("the second")

    with pytest.warns(UserWarning, match="the second"), pytest.raises(RuntimeError, match="the first"):
        make_trainer(callbacks=Fails()).fit(Model(), numbers(1))


def test_loader_without_batches_is_refused(Evaluated: Any, make_trainer: Any, numbers: Any, stream: Any) -> None:
    model = Evaluated()
    with pytest.raises(MisconfigurationException, match="train"):
        make_trainer().fit(model, numbers(0), numbers(1))
    with pytest.raises(MisconfigurationException, match="train"):
        make_trainer().fit(model, stream(0), numbers(1))
    with pytest.raises(MisconfigurationException, match="val"):
        make_trainer().fit(model, numbers(1), numbers(0))
    with pytest.raises(MisconfigurationException, match="test"):
        make_trainer().test(model, numbers(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", 1.5),
        ("callbacks", [object()]),
        ("callbacks", ModelCheckpoint),
        ("deterministic", "x"),
        ("fast_dev_run", 1.0),
        ("logger", object()),
        ("max_epochs", "2"),
        ("max_steps", None),
        ("val_check_interval", 0),
        ("check_val_every_n_epoch", 0),
        ("num_sanity_val_steps", -2),
        ("log_every_n_steps", -1),
        ("limit_train_batches", "all"),
        ("min_epochs", -1),
    ],
)
def test_wrong_argument_of_the_trainer_is_refused_at_once(make_trainer: Any, name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=name):
        make_trainer(**{name: value})
