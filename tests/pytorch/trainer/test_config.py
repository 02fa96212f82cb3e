"""Every argument of the Trainer: what is accepted and what it becomes, what is refused and what the error says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.trainer.config import BAREBONES_CONFLICTS, CHECKS, SWITCHES, as_list

MakeTrainer = Callable[..., Any]
INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def determinism() -> Iterator[None]:
    """Put back what some arguments set for the whole process."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


# ---- what is accepted ------------------------------------------------------------------------------------------------

ACCEPTED: list[tuple[str, Any, Any]] = [
    ("fast_dev_run", False, 0), ("fast_dev_run", None, 0), ("fast_dev_run", True, 1), ("fast_dev_run", 0, 0), ("fast_dev_run", 7, 7),
    ("fast_dev_run", np.int64(2), 2),
    ("max_epochs", None, None), ("max_epochs", -1, -1), ("max_epochs", 0, 0), ("max_epochs", 3, 3), ("max_epochs", 3.0, 3),
    ("max_epochs", np.int32(4), 4), ("min_epochs", None, None), ("min_epochs", 0, 0), ("min_epochs", 2, 2),
    ("max_steps", -1, -1), ("max_steps", 0, 0), ("max_steps", 1e5, 100_000), ("min_steps", None, None), ("min_steps", 5, 5),
    *(
        (f"limit_{stage}_batches", given, kept)
        for stage in ("train", "val", "test", "predict")
        for given, kept in ((None, 1.0), (0, 0), (0.0, 0.0), (3, 3), (0.5, 0.5), (1.0, 1.0), (np.float32(0.5), 0.5), (Fraction(1, 4), 0.25))
    ),
    ("overfit_batches", 0.0, 0.0), ("overfit_batches", None, 0.0), ("overfit_batches", 2, 2), ("overfit_batches", 0.1, 0.1),
    ("val_check_interval", None, 1.0), ("val_check_interval", 1.0, 1.0), ("val_check_interval", 0.25, 0.25), ("val_check_interval", 10, 10),
    ("check_val_every_n_epoch", 1, 1), ("check_val_every_n_epoch", 5, 5),
    ("num_sanity_val_steps", None, 2), ("num_sanity_val_steps", 0, 0), ("num_sanity_val_steps", -1, INFINITY),
    ("num_sanity_val_steps", 4, 4),
    ("log_every_n_steps", None, 50), ("log_every_n_steps", 0, 0), ("log_every_n_steps", 1, 1),
    ("accumulate_grad_batches", 1, 1), ("accumulate_grad_batches", 8, 8),
    ("gradient_clip_val", None, None), ("gradient_clip_val", 0, 0), ("gradient_clip_val", 0.5, 0.5),
    ("gradient_clip_val", np.float32(2), 2.0),
    ("gradient_clip_algorithm", None, None), ("gradient_clip_algorithm", "norm", "norm"), ("gradient_clip_algorithm", "VALUE", "value"),
    ("reload_dataloaders_every_n_epochs", 0, 0), ("reload_dataloaders_every_n_epochs", 2, 2),
    ("enable_autolog_hparams", False, False), ("sync_batchnorm", True, True), ("barebones", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "kept"), ACCEPTED)
def test_an_accepted_value_becomes_an_attribute(name: str, given: Any, kept: Any, make_trainer: MakeTrainer) -> None:
    found = getattr(make_trainer(**{name: given}), name)
    assert found == kept
    assert not isinstance(found, np.generic)


@pytest.mark.parametrize("argument", inspect.signature(Trainer).parameters)
def test_the_default_of_every_argument_is_accepted_when_given(argument: str, make_trainer: MakeTrainer) -> None:
    make_trainer(**{argument: inspect.signature(Trainer).parameters[argument].default})


def test_arguments_go_by_name_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        Trainer("cpu")  # type: ignore[misc]
    with pytest.raises(TypeError, match="epochs"):
        Trainer(epochs=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("00:00:00:05", 5),
        ("1:2:3:4", 93_784),
        (timedelta(minutes=2), 120),
        ({"hours": 1, "seconds": 1}, 3601),
        (timedelta(milliseconds=500), 0.5),
    ],
)
def test_the_validation_interval_may_be_a_duration(given: Any, seconds: float, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(val_check_interval=given)
    assert trainer._config.val_check_seconds == seconds
    assert trainer.val_check_interval == 1.0
    make_trainer(val_check_interval=given, check_val_every_n_epoch=None)


@pytest.mark.parametrize("given", ["00:00:00:05", timedelta(seconds=5), {"seconds": 5}])
def test_max_time_makes_a_timer(given: Any, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_time=given)
    (timer,) = (c for c in trainer.callbacks if type(c).__name__ == "Timer")
    assert timer.time_remaining() == 5
    assert trainer.max_time == given


def test_batches_are_counted_across_epochs_by_whole_numbers(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(val_check_interval=7, check_val_every_n_epoch=None)
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (7, None)


@pytest.mark.parametrize("given", [None, ".", "logs", Path("logs"), "~/logs", "a/../logs"])
def test_the_root_folder_is_a_path_in_its_plain_form(given: Any, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    expected = {None: str(tmp_path), ".": ".", "~/logs": str(Path.home() / "logs")}.get(given, "logs")
    assert make_trainer(default_root_dir=given).default_root_dir == expected


def test_the_root_folder_may_be_a_url(make_trainer: MakeTrainer) -> None:
    assert make_trainer(default_root_dir="memory://logs/a").default_root_dir == "memory://logs/a"


@pytest.mark.parametrize(("name", "none"), SWITCHES.items())
def test_switches_take_what_equals_true_or_false(name: str, none: bool, make_trainer: MakeTrainer) -> None:
    for value in (True, False, 1, 0, np.True_, *([None] if none else [])):
        if name == "barebones":
            Trainer(accelerator="cpu", barebones=value)
        else:
            make_trainer(**{name: value})


def test_switches_given_as_numbers_mean_the_same(make_trainer: MakeTrainer) -> None:
    on = make_trainer(enable_checkpointing=1, enable_progress_bar=1, enable_model_summary=1)
    off = make_trainer(enable_checkpointing=0, enable_progress_bar=0, enable_model_summary=0)
    assert (len(on.callbacks), len(off.callbacks)) == (3, 0)


def test_limits_of_one_batch_and_of_all_are_told_apart(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert type(make_trainer(limit_train_batches=1.0).limit_train_batches) is float
        assert "limit_train_batches" not in caplog.text
        assert type(make_trainer(limit_train_batches=1).limit_train_batches) is int
    assert "limit_train_batches=1 runs 1 batch; for all batches give 1.0" in caplog.text


# ---- what is refused -------------------------------------------------------------------------------------------------

COUNT_OR_NONE = "a whole number, 0 or more, or None"
NOT_A_COUNT = [1.5, "3", True, [1], NAN, INFINITY, torch.tensor(3)]
NOT_A_LIMIT = [1.5, -1, -0.5, "half", True, NAN, INFINITY, [1]]

REFUSED: list[tuple[str, list[Any], str]] = [
    ("fast_dev_run", [-1, 1.5, 1.0, "yes", [1]], "True, False, or the number of batches to run (0 or more)"),
    ("max_epochs", [-2, *NOT_A_COUNT], "a whole number, -1 or more (-1: no bound), or None"),
    ("min_epochs", [-1, *NOT_A_COUNT], COUNT_OR_NONE),
    ("max_steps", [-2, None, *NOT_A_COUNT], "a whole number, -1 or more (-1: no bound)"),
    ("min_steps", [-1, *NOT_A_COUNT], COUNT_OR_NONE),
    ("limit_train_batches", NOT_A_LIMIT, "a number of batches (a whole number, 0 or more) or a fraction of them"),
    ("limit_val_batches", NOT_A_LIMIT, "a float from 0.0 to 1.0"),
    ("limit_test_batches", NOT_A_LIMIT, "a float from 0.0 to 1.0"),
    ("limit_predict_batches", NOT_A_LIMIT, "a float from 0.0 to 1.0"),
    ("overfit_batches", NOT_A_LIMIT, "a float from 0.0 to 1.0"),
    ("val_check_interval", [0, 0.0, -1, 1.5, True, NAN, [1]], "a fraction of the epoch (a float above 0.0 and up to 1.0), or a duration"),
    ("val_check_interval", ["often", "1:2", "1:2:3", "-1:00:00:00"], "a string must have the form 'DD:HH:MM:SS'"),
    ("val_check_interval", [{"fortnights": 1}, {"hours": "2"}], "a dict must hold arguments of timedelta, such as hours=2"),
    ("check_val_every_n_epoch", [0, -1, *NOT_A_COUNT], "a whole number, 1 or more, or None"),
    ("num_sanity_val_steps", [-2, 1.5, "all", True, NAN], "a number of batches, 0 for none, -1 for all"),
    ("log_every_n_steps", [-1, *NOT_A_COUNT], "a whole number, 0 or more"),
    ("accumulate_grad_batches", [0, -1, None, {0: 2}, *NOT_A_COUNT], "a whole number, 1 or more"),
    ("gradient_clip_algorithm", ["median", 2, "norms"], "'norm', 'value', or None for 'norm'"),
    ("deterministic", ["maybe", 2, "True"], "True, False, 'warn', or None"),
    ("reload_dataloaders_every_n_epochs", [-1, None, *NOT_A_COUNT], "a whole number, 0 or more"),
    ("model_registry", [3, ["a"], True], "the name of a model as a string, or None"),
    *((name, ["yes", "True", 2, [], *([] if none else [None])], "True and False") for name, none in SWITCHES.items()),
]


@pytest.mark.parametrize(("name", "value", "accepted"), [(name, value, text) for name, values, text in REFUSED for value in values])
def test_a_refused_value_is_named_with_what_is_accepted(name: str, value: Any, accepted: str, make_trainer: MakeTrainer) -> None:
    with pytest.raises(MisconfigurationException) as error:
        make_trainer(**{name: value})
    assert f"{name}={value!r}: accepted " in str(error.value) or f"{name}={value!r}: a " in str(error.value)
    assert accepted in str(error.value)


@pytest.mark.parametrize("value", [timedelta(0), timedelta(seconds=-1), {"seconds": 0}, "00:00:00:00"])
def test_a_duration_must_be_longer_than_zero(value: Any, make_trainer: MakeTrainer) -> None:
    with pytest.raises(MisconfigurationException, match=r"val_check_interval=.*: a duration must be longer than zero"):
        make_trainer(val_check_interval=value)


@pytest.mark.parametrize("value", ["1", [1.0], True, NAN])
def test_a_wrong_clip_value_is_a_type_error(value: Any, make_trainer: MakeTrainer) -> None:
    with pytest.raises(TypeError) as error:
        make_trainer(gradient_clip_val=value)
    assert str(error.value) == f"gradient_clip_val={value!r}: accepted are a number, or None for no clipping."


@pytest.mark.parametrize("value", [3, ["a"]])
def test_a_wrong_root_folder_is_a_type_error(value: Any, make_trainer: MakeTrainer) -> None:
    with pytest.raises(TypeError) as error:
        make_trainer(default_root_dir=value)
    assert str(error.value) == f"default_root_dir={value!r}: accepted is a path or a URL."


@pytest.mark.parametrize("value", ["one day", 3, {"fortnights": 1}])
def test_a_wrong_max_time_is_refused(value: Any, make_trainer: MakeTrainer) -> None:
    with pytest.raises((MisconfigurationException, TypeError), match="duration="):
        make_trainer(max_time=value)


@pytest.mark.parametrize("interval", [None, 1.0, 0.5])
def test_a_fraction_of_an_epoch_is_refused_where_batches_are_counted_across_epochs(interval: Any, make_trainer: MakeTrainer) -> None:
    message = r"check_val_every_n_epoch=None: batches are then counted across epochs, so give the interval as a whole number"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(val_check_interval=interval, check_val_every_n_epoch=None)


# ---- arguments that change others ------------------------------------------------------------------------------------


def test_a_trial_run_bounds_everything(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        fast_dev_run=3, max_epochs=10, max_steps=100, num_sanity_val_steps=2, limit_val_batches=0.5, overfit_batches=0.5,
        val_check_interval=2, check_val_every_n_epoch=4, logger=CSVLogger("logs"),
    )  # fmt: skip
    assert (trainer.max_epochs, trainer.max_steps, trainer.num_sanity_val_steps) == (1, 3, 0)
    assert [trainer.limit_train_batches, trainer.limit_val_batches, trainer.limit_test_batches, trainer.limit_predict_batches] == [3] * 4
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (1.0, 1)
    assert [type(logger).__name__ for logger in trainer.loggers] == ["DummyLogger"]


def test_overfitting_takes_the_same_part_of_training_and_validation_data(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(overfit_batches=0.25, limit_train_batches=3, limit_test_batches=2)
    assert (trainer.limit_train_batches, trainer.limit_val_batches, trainer.limit_test_batches) == (0.25, 0.25, 2)


@pytest.mark.parametrize(("given", "on", "warns_only"), [(True, True, False), ("warn", True, True), (False, False, False)])
def test_deterministic_sets_torchs_switches(given: Any, on: bool, warns_only: bool, make_trainer: MakeTrainer) -> None:
    torch.backends.cudnn.benchmark = True
    make_trainer(deterministic=given)
    assert torch.are_deterministic_algorithms_enabled() is on
    assert torch.is_deterministic_algorithms_warn_only_enabled() is warns_only
    assert torch.backends.cudnn.benchmark is not on


def test_deterministic_and_benchmark_left_alone_change_nothing(make_trainer: MakeTrainer) -> None:
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
    make_trainer()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark is True


@pytest.mark.parametrize("benchmark", [True, False])
def test_benchmark_sets_cudnns_switch(benchmark: bool, make_trainer: MakeTrainer) -> None:
    torch.backends.cudnn.benchmark = not benchmark
    make_trainer(benchmark=benchmark)
    assert torch.backends.cudnn.benchmark is benchmark


def test_benchmark_against_determinism_warns(make_trainer: MakeTrainer) -> None:
    with pytest.warns(UserWarning, match="benchmark=True may choose another algorithm in each run"):
        make_trainer(benchmark=True, deterministic=True)


# ---- barebones -------------------------------------------------------------------------------------------------------

CONFLICTS: list[tuple[str, Any]] = [
    ("logger", True), ("logger", CSVLogger("logs")), ("enable_checkpointing", True), ("enable_progress_bar", True),
    ("enable_model_summary", True), ("log_every_n_steps", 2), ("num_sanity_val_steps", 1), ("num_sanity_val_steps", -1),
    ("fast_dev_run", True), ("fast_dev_run", 2), ("detect_anomaly", True), ("profiler", "simple"), ("profiler", SimpleProfiler()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CONFLICTS)
def test_barebones_refuses_what_it_leaves_out(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`Trainer\(barebones=True, {name}=.*Leave out `{name}`, or leave out `barebones`"):
        Trainer(accelerator="cpu", barebones=True, **{name: value})


@pytest.mark.parametrize(
    ("callback", "named"),
    [(ModelCheckpoint, "a checkpoint callback"), (TQDMProgressBar, "the progress bar TQDMProgressBar")],
)
def test_barebones_refuses_callbacks_of_what_it_leaves_out(callback: Any, named: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"barebones=True was given together with {named}"):
        Trainer(accelerator="cpu", barebones=True, callbacks=[callback()])


def test_barebones_accepts_what_is_off_anyway() -> None:
    off: dict[str, Any] = {name: False for name in BAREBONES_CONFLICTS if name.startswith("enable")}
    trainer = Trainer(
        accelerator="cpu", barebones=True, logger=False, profiler=None, detect_anomaly=False, fast_dev_run=0,
        log_every_n_steps=0, num_sanity_val_steps=0, **off,
    )  # fmt: skip
    assert (trainer.callbacks, trainer.loggers, trainer.log_every_n_steps, trainer.num_sanity_val_steps) == ([], [], 0, 0)
    assert trainer.barebones


# ---- setting arguments later -----------------------------------------------------------------------------------------

SETTABLE = (
    "fast_dev_run", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
    "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "reload_dataloaders_every_n_epochs",
)  # fmt: skip


@pytest.mark.parametrize("name", SETTABLE)
def test_an_argument_set_later_is_checked_like_the_first(name: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    setattr(trainer, name, 3)
    assert getattr(trainer, name) == 3
    with pytest.raises(MisconfigurationException, match=f"{name}='many': accepted"):
        setattr(trainer, name, "many")
    assert getattr(trainer, name) == 3


def test_the_validation_interval_set_later_is_checked_with_the_others(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(val_check_interval=2, check_val_every_n_epoch=None)
    with pytest.raises(MisconfigurationException, match="counted across epochs"):
        trainer.val_check_interval = 0.5
    trainer.val_check_interval = "00:00:00:05"
    assert trainer._config.val_check_seconds == 5
    trainer.val_check_interval = 4
    assert (trainer.val_check_interval, trainer._config.val_check_seconds) == (4, None)


def test_limits_set_between_runs_hold_in_the_next(make_trainer: MakeTrainer, Evaluated: Any, numbers: Any) -> None:
    model, trainer = Evaluated(), make_trainer(max_epochs=1)
    trainer.fit(model, numbers(4), numbers(4))
    assert len(model.seen) == 4
    trainer.limit_train_batches = 2
    trainer.limit_val_batches = 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, numbers(4), numbers(4))
    assert len(model.seen) == 4 + 2
    assert trainer.num_val_batches == [1]
    trainer.limit_test_batches = 0.5
    trainer.test(model, numbers(4), verbose=False)
    assert trainer.num_test_batches == [2]


def test_what_a_run_counts_cannot_be_set(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    for name in ("current_epoch", "global_step", "max_epochs", "max_steps", "min_epochs", "min_steps", "barebones", "max_time"):
        with pytest.raises(AttributeError):
            setattr(trainer, name, 1)


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_every_check_belongs_to_an_argument() -> None:
    assert set(CHECKS) | set(SWITCHES) | set(BAREBONES_CONFLICTS) <= set(inspect.signature(Trainer).parameters)


def test_one_object_none_or_a_sequence_become_a_list() -> None:
    assert as_list("x", None) == []
    assert as_list("x", 3) == [3]
    assert as_list("x", "ab") == ["ab"]
    assert as_list("x", (1, 2)) == [1, 2]
    given = [1]
    assert as_list("x", given) is not given
