from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lightning.pytorch.callbacks.progress import ProgressBar
from lightning.pytorch.callbacks.progress.progress_bar import get_standard_metrics


def trainer(**attributes: Any) -> Any:
    defaults = {
        "is_global_zero": True,
        "sanity_checking": False,
        "num_training_batches": 7,
        "max_steps": -1,
        "num_val_batches": [2, 3],
        "num_sanity_val_batches": [1, 2],
        "num_test_batches": [4],
        "num_predict_batches": [math.inf],
        "check_val_every_n_epoch": 2,
        "current_epoch": 0,
        "enable_validation": True,
        "loggers": [],
        "progress_bar_metrics": {},
        "state": SimpleNamespace(fn="fit"),
    }
    return SimpleNamespace(**{**defaults, **attributes})


def attached(**attributes: Any) -> ProgressBar:
    bar = ProgressBar()
    bar.setup(trainer(**attributes), None, "fit")  # type: ignore[arg-type]
    return bar


def versions(*values: Any) -> Any:
    return trainer(loggers=[SimpleNamespace(version=value) for value in values])


@pytest.mark.parametrize(
    ("loggers", "shown"),
    [
        ([], {}),
        ([0], {"v_num": 0}),
        ([None], {}),
        ([""], {}),
        (["version_7"], {"v_num": "on_7"}),
        ([1, 2], {"v_num": "1_2"}),
        ([3, 3], {"v_num": 3}),
        ([None, 3], {"v_num": 3}),
        (["abcdefgh", 2], {"v_num": "gh_2"}),
    ],
)
def test_version_number_comes_from_the_loggers(loggers: list[Any], shown: dict[str, Any]) -> None:
    assert get_standard_metrics(versions(*loggers)) == shown


def test_metrics_are_the_version_and_what_was_logged() -> None:
    run = versions(3)
    run.progress_bar_metrics = {"loss": 0.5}
    assert list(ProgressBar().get_metrics(run, None).items()) == [("v_num", 3), ("loss", 0.5)]  # type: ignore[arg-type]


def test_logged_metric_of_the_same_name_wins_with_a_warning() -> None:
    run = versions(3)
    run.progress_bar_metrics = {"v_num": 0.5}
    with pytest.warns(UserWarning, match=r"\['v_num'\] by itself"):
        assert ProgressBar().get_metrics(run, None) == {"v_num": 0.5}  # type: ignore[arg-type]


def test_trainer_before_setup_raises() -> None:
    with pytest.raises(TypeError, match=r"ProgressBar.trainer` is not set yet"):
        _ = ProgressBar().trainer


def test_totals_follow_the_loader_that_runs() -> None:
    bar = attached()
    assert bar.total_train_batches == 7
    with pytest.raises(RuntimeError, match="no evaluation loader runs now"):
        _ = bar.total_val_batches_current_dataloader
    assert bar.has_dataloader_changed(0)
    assert not bar.has_dataloader_changed(0)
    assert (bar.total_val_batches_current_dataloader, bar.total_test_batches_current_dataloader) == (2, 4)
    assert bar.total_predict_batches_current_dataloader == math.inf
    assert bar.has_dataloader_changed(1)
    assert bar.total_val_batches_current_dataloader == 3
    bar.trainer.sanity_checking = True  # type: ignore[misc]
    assert bar.total_val_batches_current_dataloader == 2
    bar.reset_dataloader_idx_tracker()
    assert bar.has_dataloader_changed(1)


@pytest.mark.parametrize(
    ("attributes", "total"),
    [
        ({"current_epoch": 0}, 0),
        ({"current_epoch": 1}, 5),
        ({"current_epoch": 0, "check_val_every_n_epoch": None}, 5),
        ({"current_epoch": 1, "enable_validation": False}, 0),
        ({"current_epoch": 0, "state": SimpleNamespace(fn="validate")}, 5),
    ],
)
def test_total_of_validation_is_zero_in_epochs_without_validation(attributes: dict[str, Any], total: int) -> None:
    assert attached(**attributes).total_val_batches == total


def test_own_bar_is_disabled_on_every_process_but_the_first() -> None:
    calls = []

    class Bar(ProgressBar):
        def disable(self) -> None:
            calls.append("disabled")

    for is_global_zero in (True, False):
        Bar().setup(trainer(is_global_zero=is_global_zero), None, "fit")  # type: ignore[arg-type]
    assert calls == ["disabled"]


def test_own_bar_must_implement_enable_and_disable() -> None:
    class Bar(ProgressBar):
        pass

    with pytest.raises(NotImplementedError, match=r"Bar must implement `disable\(\)`"):
        Bar().disable()
    with pytest.raises(NotImplementedError, match=r"Bar must implement `enable\(\)`"):
        Bar().enable()


def test_print_is_the_built_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressBar().print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


def test_what_draws_a_bar_is_not_imported_before_it_is_drawn() -> None:
    code = (
        "import sys, lightning.pytorch.callbacks.progress as p;"
        "p.TQDMProgressBar(); p.RichProgressBar();"
        "print([name for name in sys.modules if name == 'rich' or name.endswith(('._tqdm', '._rich'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
