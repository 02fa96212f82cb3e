"""Which hooks run, in which order, and which methods only look like hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.core.hooks import EVENT_HOOKS, REMOVED_HOOKS
from lightning.pytorch.dispatch import Hooks, check_names, no_op, override_of, sorted_callbacks
from lightning.pytorch.metrics import Metrics
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

MakeTrainer = Callable[..., Any]


def ones(count: int = 1) -> DataLoader[Any]:
    """A loader of so many batches ``[[1.0]]``."""
    return DataLoader(TensorDataset(torch.ones(count, 1)), collate_fn=lambda samples: samples[0][0].unsqueeze(0))


class Attached:
    """What resolving asks of a trainer: the module that callbacks get, and the strategy, which hears too."""

    def __init__(self, module: LightningModule) -> None:
        self.lightning_module = module
        self.strategy = SingleDeviceStrategy("cpu")


def hooks_of(module: LightningModule, *callbacks: Callback) -> Hooks:
    return Hooks(Attached(module), module, callbacks, Metrics())


# ---- what counts as overridden ---------------------------------------------------------------------------------------


def test_every_hook_that_nobody_overrides_is_the_same_function() -> None:
    class WithHelper(LightningModule):
        def helper(self) -> None:
            pass

    hooks = hooks_of(WithHelper(), Callback(), ModelCheckpoint())
    silent = [name for name in EVENT_HOOKS if getattr(hooks, name) is no_op]
    heard = {name for name in EVENT_HOOKS if name in vars(ModelCheckpoint)}
    assert set(silent) >= set(EVENT_HOOKS) - heard - set(vars(Checkpoint))
    assert "on_after_backward" in silent
    assert hooks.on_train_epoch_end_checkpoints is not no_op


def test_an_unknown_event_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="on_coffee_break"):
        hooks_of(LightningModule()).on_coffee_break()


def test_overrides_are_found_in_the_class_its_bases_and_on_the_instance() -> None:
    class Mixin:
        def on_fit_end(self) -> None:
            pass

    class Base(LightningModule):
        def on_fit_start(self) -> None:
            pass

    class Model(Mixin, Base):
        pass

    model = Model()
    assert override_of(model, "on_fit_start", LightningModule) == model.on_fit_start
    assert override_of(model, "on_fit_end", LightningModule) == model.on_fit_end
    assert override_of(model, "on_train_start", LightningModule) is None
    model.on_train_start = mock.Mock()  # type: ignore[method-assign]
    assert override_of(model, "on_train_start", LightningModule) is model.on_train_start


def test_a_patched_class_counts_while_it_is_patched() -> None:
    class Model(LightningModule):
        pass

    with mock.patch.object(Model, "on_train_start") as patched:
        hooks_of(Model()).on_train_start()
    patched.assert_called_once_with()
    assert hooks_of(Model()).on_train_start is no_op


def test_a_hook_back_at_the_default_counts_as_not_overridden() -> None:
    class Model(LightningModule):
        def on_train_start(self) -> None:
            pass

    class Silenced(Model):
        on_train_start = LightningModule.on_train_start

    assert hooks_of(Silenced()).on_train_start is no_op


# ---- order, scope and results ----------------------------------------------------------------------------------------


class Noted(Callback):
    """Notes its name at each of a few events."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.notes.append(self.name)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.notes.append(self.name)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.notes.append(self.name)


class NotedCheckpoint(Noted, Checkpoint):
    pass


class NotedModel(LightningModule):
    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def on_train_start(self) -> None:
        self.notes.append("module")

    def on_train_epoch_end(self) -> None:
        self.notes.append("module")

    def on_validation_end(self) -> None:
        self.notes.append("module")


@pytest.mark.parametrize(
    ("event", "order"), [("on_train_start", ["a", "b", "saver", "module"]), ("on_validation_end", ["a", "b", "module", "saver"])]
)
def test_callbacks_come_in_their_order_before_the_module_and_savers_where_they_save_after_it(event: str, order: list[str]) -> None:
    notes: list[str] = []
    hooks = hooks_of(NotedModel(notes), Noted("a", notes), Noted("b", notes), NotedCheckpoint("saver", notes))
    getattr(hooks, event)()
    assert notes == order


def test_checkpoints_have_an_event_of_their_own_after_the_modules_epoch_end() -> None:
    notes: list[str] = []
    hooks = hooks_of(NotedModel(notes), NotedCheckpoint("saver", notes), Noted("a", notes))
    hooks.on_train_epoch_end()
    assert notes == ["a", "module"]
    hooks.on_train_epoch_end_checkpoints()
    assert notes == ["a", "module", "saver"]


def test_callbacks_are_sorted_with_checkpoints_last() -> None:
    a, b, first, second = Noted("a", []), Noted("b", []), NotedCheckpoint("1", []), NotedCheckpoint("2", [])
    assert sorted_callbacks([first, a, second, b]) == [a, b, first, second]


def test_in_a_run_checkpoints_save_after_the_modules_epoch_end(make_trainer: MakeTrainer, Weight: Any) -> None:
    notes: list[str] = []

    class Model(Weight):  # type: ignore[misc]
        def on_train_epoch_end(self) -> None:
            notes.append("module")

    trainer = make_trainer(callbacks=[NotedCheckpoint("saver", notes), Noted("a", notes)], enable_checkpointing=True)
    trainer.fit(Model(), ones())
    assert notes == ["saver", "a", "module", "saver"] or notes == ["a", "saver", "a", "module", "saver"]


def test_callbacks_get_trainer_and_module_then_what_the_module_gets() -> None:
    class Model(LightningModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((outputs, batch, batch_idx))

    class Listening(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(args)

    seen: list[Any] = []
    model = Model()
    trainer = Attached(model)
    Hooks(trainer, model, [Listening()], Metrics()).on_train_batch_end({"loss": 1}, "batch", 3)
    assert seen == [(trainer, model, {"loss": 1}, "batch", 3), ({"loss": 1}, "batch", 3)]


def test_the_modules_result_counts_and_the_callbacks_do_not() -> None:
    class Skips(Callback):
        def on_train_batch_start(self, *args: Any) -> int:  # type: ignore[override]
            return -1

    class Model(LightningModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            return -1 if batch_idx == 2 else 0

    assert hooks_of(LightningModule(), Skips()).on_train_batch_start(None, 0) is None
    assert hooks_of(Model(), Skips()).on_train_batch_start(None, 2) == -1
    assert hooks_of(Model(), Skips()).on_train_batch_start(None, 1) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_metrics_know_which_hook_runs_and_forget_it_afterwards(fails: bool) -> None:
    seen: list[str | None] = []
    metrics = Metrics()

    class Model(LightningModule):
        def on_train_start(self) -> None:
            seen.append(metrics.scope)
            if fails:
                raise RuntimeError("no")

    class Listening(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(metrics.scope)

    model = Model()
    metrics.scope = "outer"
    hooks = Hooks(Attached(model), model, [Listening()], metrics)
    if fails:
        with pytest.raises(RuntimeError):
            hooks.on_train_start()
    else:
        hooks.on_train_start()
    assert seen == ["on_train_start", "on_train_start"]
    assert metrics.scope == "outer"


# ---- in a run: instances, mocks, late comers -------------------------------------------------------------------------


def test_hooks_set_on_instances_run(make_trainer: MakeTrainer, Weight: Any) -> None:
    notes: list[str] = []
    model, callback = Weight(), Callback()
    model.on_train_start = lambda: notes.append("module")
    callback.on_train_start = lambda trainer, pl_module: notes.append("callback")  # type: ignore[method-assign]
    make_trainer(callbacks=callback).fit(model, ones())
    assert notes == ["callback", "module"]


def test_mocks_in_place_of_methods_are_called(make_trainer: MakeTrainer, Weight: Any) -> None:
    model = Weight()
    model.on_train_batch_end = mock.Mock()
    model.training_step = mock.Mock(side_effect=model.training_step)
    model.transfer_batch_to_device = mock.Mock(side_effect=model.transfer_batch_to_device)
    make_trainer().fit(model, ones(2))
    assert model.on_train_batch_end.call_count == model.training_step.call_count == model.transfer_batch_to_device.call_count == 2
    outputs, batch, batch_idx = model.on_train_batch_end.call_args.args
    assert (outputs["loss"].item(), batch.tolist(), batch_idx) == (-1.0, [[1.0]], 1)


def test_a_mock_of_a_callback_hears_every_event(make_trainer: MakeTrainer, Evaluated: Any) -> None:
    callback = mock.Mock(spec=Callback)
    callback.state_key = "mock"
    make_trainer(callbacks=[callback]).fit(Evaluated(), ones(), ones())
    heard = {call[0] for call in callback.method_calls}
    unheard = {name for name in EVENT_HOOKS if "sanity" in name or "test" in name or "predict" in name}
    assert heard >= (set(EVENT_HOOKS) - unheard) | {"setup", "teardown"}


def test_what_setup_adds_is_heard(make_trainer: MakeTrainer, Weight: Any) -> None:
    notes: list[str] = []

    class Adds(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.callbacks.append(Noted("late", notes))
            pl_module.on_train_start = lambda: notes.append("module")

    make_trainer(callbacks=[Adds()]).fit(Weight(), ones())
    assert notes == ["late", "module", "late"]


# ---- spans of the profiler -------------------------------------------------------------------------------------------


def test_overridden_hooks_are_spans_of_the_profiler(make_trainer: MakeTrainer, Weight: Any) -> None:
    names: list[str] = []

    class Profiler(SimpleProfiler):
        @contextmanager
        def profile(self, action_name: str) -> Any:
            names.append(action_name)
            yield

    class Listening(Callback):
        state_key = "mine"  # type: ignore[assignment]

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pass

    class Model(Weight):  # type: ignore[misc]
        def on_train_start(self) -> None:
            pass

        def on_after_backward(self) -> None:
            pass

    make_trainer(callbacks=[Listening()], profiler=Profiler()).fit(Model(), ones(2))
    hooks = [name for name in names if name.startswith(("[Callback]", "[LightningModule]"))]
    assert [name for name in hooks if "on_" in name] == [
        "[Callback]mine.on_train_start",
        "[LightningModule]Model.on_train_start",
        "[LightningModule]Model.on_after_backward",
        "[LightningModule]Model.on_after_backward",
    ]


# ---- methods that only look like hooks -------------------------------------------------------------------------------


def define(base: type, *names: str) -> Any:
    """An instance of a class of the name ``Mine`` with methods of these names."""
    return type("Mine", (base,), dict.fromkeys(names, lambda self, *args: None))()


@pytest.mark.parametrize(
    ("name", "function", "refused"),
    [
        ("training_epoch_end", "fit", True),
        ("training_epoch_end", "validate", False),
        ("validation_epoch_end", "fit", True),
        ("validation_epoch_end", "validate", True),
        ("validation_epoch_end", "test", False),
        ("test_epoch_end", "test", True),
        ("test_epoch_end", "fit", False),
        ("predict_epoch_end", "predict", False),
        ("on_epoch_end", "fit", False),
        ("training_step_end", "fit", False),
    ],
)
def test_removed_hooks_are_refused_where_they_were_called_and_warn_elsewhere(
    name: str, function: str, refused: bool, make_trainer: MakeTrainer, Evaluated: Any
) -> None:
    model = define(Evaluated, name)
    message = f"`Mine.{name}` would never run: that hook was removed in Lightning 2.0. Use `{REMOVED_HOOKS[name]}` instead"
    arguments = (model, ones(), ones()) if function == "fit" else (model, ones())
    run = getattr(make_trainer(), function)
    if refused:
        with pytest.raises(NotImplementedError, match=message):
            run(*arguments)
    else:
        with pytest.warns(UserWarning, match=message):
            run(*arguments)


def test_removed_hooks_of_callbacks_warn(make_trainer: MakeTrainer, Weight: Any) -> None:
    with pytest.warns(UserWarning, match=r"`Mine\.on_epoch_end` would never run"):
        make_trainer(callbacks=[define(Callback, "on_epoch_end")]).fit(Weight(), ones())


def test_every_replacement_of_a_removed_hook_exists() -> None:
    assert all(hasattr(LightningModule, replacement) for replacement in REMOVED_HOOKS.values())


@pytest.mark.parametrize(
    ("base", "name", "meant"),
    [
        (LightningModule, "on_train_epoch_strat", "on_train_epoch_start"),
        (LightningModule, "train_step", "training_step"),
        (LightningModule, "validate_step", "validation_step"),
        (LightningModule, "configure_optimizer", "configure_optimizers"),
        (LightningModule, "train_dataloaders", "train_dataloader"),
        (LightningModule, "on_validation_epoch_ends", "on_validation_epoch_end"),
        (Callback, "on_train_batch_ends", "on_train_batch_end"),
        (Callback, "on_exeption", "on_exception"),
        (LightningDataModule, "val_dataloaders", "val_dataloader"),
        (LightningDataModule, "prepare_datas", "prepare_data"),
        (LightningDataModule, "on_exceptions", "on_exception"),
    ],
)
def test_a_misspelt_hook_warns_with_the_right_name(base: type, name: str, meant: str, make_trainer: MakeTrainer, Weight: Any) -> None:
    owner = define(base, name)
    module = owner if base is LightningModule else Weight()
    make_trainer_of(make_trainer, module)
    with pytest.warns(UserWarning, match=f"`Mine.{name}` is not a hook and will not be called by the trainer. Did you mean `{meant}`?"):
        check_names(module, owner if base is LightningDataModule else None, [owner] if base is Callback else [])


def make_trainer_of(make_trainer: MakeTrainer, module: LightningModule) -> None:
    trainer = make_trainer()
    trainer.state.fn = "fit"
    module.trainer = trainer


@pytest.mark.parametrize(
    "names",
    [
        ("forward", "helper", "compute_loss", "encode", "step", "shared_step", "plot"),
        ("_on_train_epoch_strat",),
        ("training_step", "train_step"),
        ("configure_optimizers", "configure_optimizer"),
        ("on_predict_model_train", "load_data"),
        ("state", "val_step_loss", "test_metrics"),
    ],
)
def test_other_methods_do_not_warn(names: tuple[str, ...], make_trainer: MakeTrainer) -> None:
    module = define(LightningModule, *names)
    make_trainer_of(make_trainer, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_names(module, define(LightningDataModule, "load", "split"), [define(Callback, "report"), ModelCheckpoint()])
