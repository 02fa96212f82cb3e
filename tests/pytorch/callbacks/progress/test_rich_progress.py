from __future__ import annotations

import copy
import importlib.util
import io
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from rich.progress import TextColumn

import lightning.pytorch.callbacks.progress.rich_progress as rich_progress
from lightning.pytorch.callbacks.progress import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    CustomInfiniteTask,
    CustomProgress,
    CustomTimeColumn,
    MetricsTextColumn,
    ProcessingSpeedColumn,
    RichProgressBarTheme,
)


class Terminal(io.StringIO):
    """A wide terminal to write to, without colours."""

    @property
    def console_kwargs(self) -> dict[str, Any]:
        return {"file": self, "force_terminal": True, "width": 150, "color_system": None}


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def screen(terminal: Terminal, rendered: Callable[[str], list[str]]) -> Callable[[], list[str]]:
    return lambda: rendered(terminal.getvalue())


def test_training_bar_stays_and_the_others_go(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    run(RichProgressBar(console_kwargs=terminal.console_kwargs))()
    (line,) = screen()
    assert line.startswith("Epoch 1/1 ━━━━━")
    assert " 5/5 0:00:00 • 0:00:00 " in line
    assert line.endswith("it/s loss: 4.500 val: 1.000 loss_epoch: 7.000 late: 9.000")


def test_bar_of_each_epoch_stays_with_leave(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    run(RichProgressBar(leave=True, console_kwargs=terminal.console_kwargs))()
    assert [line.split(" ━")[0] for line in screen()] == ["Epoch 0/1", "Epoch 1/1"]


@pytest.mark.parametrize(("fn", "text"), [("validate", "Validation"), ("test", "Testing"), ("predict", "Predicting")])
@pytest.mark.parametrize(("loaders", "which"), [(1, ""), (2, " DataLoader 1")])
def test_bar_of_an_evaluation_stays_and_ends_with_it(
    run: Any, terminal: Terminal, screen: Callable[[], list[str]], fn: str, text: str, loaders: int, which: str
) -> None:
    test = run(RichProgressBar(console_kwargs=terminal.console_kwargs), fn=fn, loaders=loaders)
    ended = []
    test.bar.teardown = lambda *args: ended.append(test.bar.progress)
    test()
    (line,) = screen()
    assert line.startswith(f"{text}{which} ━")
    assert " 3/3 " in line
    assert ended == [None]  # so that the table of results is printed below the bar


def test_validation_bar_stands_below_the_training_bar(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    test = run(RichProgressBar(console_kwargs=terminal.console_kwargs), epochs=1)
    shown: list[list[str]] = []

    def look(event: str) -> None:
        if event == "validation 0 0":
            shown.append([line.split("  ")[0] for line in screen()])

    test.at = look
    test()
    assert shown == [["Sanity Checking"], ["Epoch 0/0", "Validation"]]


def test_tasks_are_there_while_their_loops_run(run: Any, terminal: Terminal) -> None:
    bar = RichProgressBar(console_kwargs=terminal.console_kwargs)
    names = {"train 1": "train_progress_bar", "validation 0 0": "val_progress_bar", "test 0 0": "test_progress_bar"}
    seen = {}
    for fn in ("fit", "test"):
        test = run(bar, fn=fn, epochs=1)

        def look(event: str, test: Any = test) -> None:
            name = "val_sanity_check_bar" if test.trainer.sanity_checking else names.get(event)
            if name:
                seen[name] = getattr(bar, name).total

        test.at = look
        test()
    assert seen == {"train_progress_bar": 5, "val_progress_bar": 3, "test_progress_bar": 3, "val_sanity_check_bar": 2}
    for name in seen:
        with pytest.raises(TypeError, match=rf"RichProgressBar.{name}` is not set"):
            getattr(bar, name)


def test_output_that_is_no_terminal_gets_the_finished_bar_alone(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(RichProgressBar(console_kwargs={"width": 150}))()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Epoch 1/1 ━")


def test_unknown_length_ends_with_the_right_number(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    run(RichProgressBar(console_kwargs=terminal.console_kwargs, refresh_rate=1e-6), batches=math.inf, epochs=1)()
    (line,) = screen()
    assert " 5/-- 0:00:00 • -:--:-- " in line
    run(RichProgressBar(console_kwargs=terminal.console_kwargs, refresh_rate=1e-6), batches=math.inf, fn="test")()
    assert " 3/-- " in screen()[-1]


def test_bar_is_drawn_no_more_often_than_the_refresh_rate(run: Any, terminal: Terminal) -> None:
    class Counting(RichProgressBar):
        asked = 0

        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            self.asked += 1
            return super().get_metrics(trainer, pl_module)

    test = run(Counting(refresh_rate=1e-6, console_kwargs=terminal.console_kwargs), batches=500, epochs=1)
    asked = []
    test.at = lambda event: asked.append(test.bar.asked) if event in ("train 0", "train 499", "validation 0 0") else None
    test()
    assert asked == [0, 0, 0, 1]


def test_resume_in_the_middle_of_an_epoch_goes_on_from_there(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    test = run(RichProgressBar(console_kwargs=terminal.console_kwargs), epochs=1)
    initial = []
    test.at = lambda event: initial.append(test.bar.train_progress_bar.fields["initial"]) if event == "train 4" else None
    test(first_batch=3)
    assert initial == [3]
    assert " 5/5 " in screen()[0]


def test_print_stands_above_the_bar(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    test = run(RichProgressBar(console_kwargs={**terminal.console_kwargs}), epochs=1)
    test.at = lambda event: test.bar.print("hello", 2, sep="-") if event == "train 2" else None
    test()
    above, line = screen()
    assert above == "hello-2"
    assert line.startswith("Epoch 0/0 ━")


@pytest.mark.parametrize("how", ["refresh_rate", "disable", "rank"])
def test_disabled_bar_writes_nothing(run: Any, terminal: Terminal, how: str) -> None:
    bar = RichProgressBar(refresh_rate=0 if how == "refresh_rate" else 1, console_kwargs=terminal.console_kwargs)
    if how == "disable":
        bar.disable()
    for fn in ("fit", "validate", "test", "predict"):
        test = run(bar, fn=fn)
        test.trainer.is_global_zero = how != "rank"
        test()
    assert bar.is_disabled
    assert not bar.is_enabled
    assert terminal.getvalue() == ""
    bar.enable()
    assert bar.is_enabled is (how != "refresh_rate")


def test_exception_restores_the_terminal_and_shows_how_far_it_came(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    test = run(RichProgressBar(console_kwargs=terminal.console_kwargs), epochs=1)

    def fail(event: str) -> None:
        if event == "train 3":
            raise RuntimeError

    test.at = fail
    test()
    assert " 3/5 " in screen()[0]
    assert terminal.getvalue().endswith("\n\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(
    ("theme", "end"),
    [
        (RichProgressBarTheme(), "loss: 4.500 v: 3 name: x"),
        (RichProgressBarTheme(metrics_format=".2e", metrics_text_delimiter=" | "), "loss: 4.50e+00 | v: 3 | name: x"),
    ],
)
def test_theme_formats_the_metrics(
    run: Any, terminal: Terminal, screen: Callable[[], list[str]], theme: RichProgressBarTheme, end: str
) -> None:
    class Bar(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            return {"loss": super().get_metrics(trainer, pl_module)["loss"], "v": 3, "name": "x"}

    run(Bar(theme=theme, console_kwargs=terminal.console_kwargs), epochs=1)()
    assert screen()[0].endswith(end)


def test_theme_gives_the_bar_its_colour(run: Any, terminal: Terminal) -> None:
    kwargs = {**terminal.console_kwargs, "color_system": "truecolor"}
    run(RichProgressBar(theme=RichProgressBarTheme(progress_bar_finished="#010203"), console_kwargs=kwargs), epochs=1)()
    assert "\x1b[38;2;1;2;3m━" in terminal.getvalue()


def test_own_columns_come_before_the_metrics(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    class Bar(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            return [TextColumn("{task.description}:"), BatchesProcessedColumn("")]

    run(Bar(console_kwargs=terminal.console_kwargs), epochs=1)()
    assert screen() == ["Epoch 0/0: 5/5 loss: 4.500 val: 1.000 loss_epoch: 7.000 late: 9.000"]


@pytest.mark.parametrize(("max_epochs", "text"), [(3, "Epoch 0/2"), (-1, "Epoch 0"), (None, "Epoch 0")])
def test_description_names_the_last_epoch_if_there_is_one(
    run: Any, terminal: Terminal, screen: Callable[[], list[str]], max_epochs: int | None, text: str
) -> None:
    test = run(RichProgressBar(console_kwargs=terminal.console_kwargs), epochs=1)
    test.trainer.max_epochs = max_epochs
    test()
    assert screen()[0].split(" ━")[0] == text


def test_speed_is_known_after_the_first_drawing(run: Any, terminal: Terminal, screen: Callable[[], list[str]]) -> None:
    run(RichProgressBar(console_kwargs=terminal.console_kwargs), batches=1, epochs=1)
    test = run(RichProgressBar(console_kwargs=terminal.console_kwargs), epochs=1, batches=2)
    test()
    assert " 0.00it/s" not in screen()[-1]


def test_bar_starts_no_thread(run: Any, terminal: Terminal) -> None:
    before = threading.active_count()
    test = run(RichProgressBar(console_kwargs=terminal.console_kwargs), epochs=1)
    during = []
    test.at = lambda event: during.append(threading.active_count())
    test()
    assert set(during) == {before}


def test_bar_survives_pickle_and_copy(run: Any) -> None:
    test = run(RichProgressBar(leave=True, console_kwargs={"width": 90}), epochs=1)
    copies = []
    test.at = lambda event: copies.append(copy.copy(test.bar).__getstate__()) if event == "train 2" else None
    test()
    assert copies[0]["progress"] is None
    test.bar._trainer = None  # the stand-in has functions that can't be pickled
    copied = pickle.loads(pickle.dumps(test.bar))
    assert (copied.is_enabled, copied.theme) == (True, RichProgressBarTheme())
    run(copied)()


@pytest.mark.parametrize("refresh_rate", [-1, "1", None, math.inf, math.nan])
def test_wrong_refresh_rate_raises(refresh_rate: Any) -> None:
    with pytest.raises(ValueError, match=r"RichProgressBar\(`refresh_rate`\) must be a number"):
        RichProgressBar(refresh_rate=refresh_rate)


def test_missing_rich_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "keraunos\[rich\]"'):
        RichProgressBar()


def test_parts_can_be_used_alone() -> None:
    progress = CustomProgress(CustomBarColumn(), CustomTimeColumn("dim"), ProcessingSpeedColumn(""), auto_refresh=False)
    progress.add_task("x", total=None)
    (task,) = progress.tasks
    assert CustomTimeColumn("dim").render(task).plain == "0:00:00 • -:--:--"
    assert ProcessingSpeedColumn("").render(task).plain == "0.00it/s"
    assert BatchesProcessedColumn("").render(task).plain == "0/--"
    assert CustomBarColumn().render(task).pulse
    assert CustomInfiniteTask(task.id, "x", 3, 1, lambda: 0.0).time_remaining is None
    metrics = MetricsTextColumn(None, "italic", " ", ".1f")  # type: ignore[arg-type]
    metrics.update({"a": 1.25})
    assert metrics.render(task).plain == ""
    task.fields["shows_metrics"] = True
    assert metrics.render(task).plain == "a: 1.2"


def test_module_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Progress'"):
        _ = rich_progress.Progress
